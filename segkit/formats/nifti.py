"""NIfTI: checked reading, and the canonical grid that everything after it uses.

The canonical grid is RAS+ with the axial slices first: an array `volume[z, y, x]` whose z grows towards the head, y to
the front and x to the patient's right. Its voxels are the source's own, only turned round: nothing is resampled, so
the way back (`from_canonical`) is exact.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.volumeutils import apply_read_scaling

from segkit.errors import Findings, SubjectError
from segkit.formats import gunzip
from segkit.untrusted import read_file as read_regular_file

ENDINGS = (".nii.gz", ".nii")
"""How the names of the files that are read here end."""

PIECE = 1 << 20
"""Voxels that are looked at together."""

MOST_HEADER = 1 << 20
"""Bytes in which the header and its extensions must end; a table of 117 names has 15,000."""

SIDES_MM = (0.01, 100.0)
"""Sides of voxels that a scan of a patient can have, with room on both ends."""

RAS = np.array([[0, 1], [1, 1], [2, 1]])

PLACING = (
    "pixdim", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "sform_code",
    "srow_x", "srow_y", "srow_z",
)  # fmt: skip
"""The fields of a NIfTI header that place its voxels."""


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie: shape of its array and the 4 x 4 affine from voxel to world (RAS+, mm)."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    placing: Mapping[str, np.ndarray] | None = None
    """What a NIfTI header says of the place, the fields PLACING: viewers choose between its two affines by their own
    rules, and a file beside another one has to say the same. None of other files."""

    @property
    def orientation(self) -> str:
        """Towards what the file's axes grow, for example "RAS" or "LPS"."""
        return "".join(nib.aff2axcodes(self.affine))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size in mm on the canonical axes (z, y, x)."""
        affine = self.canonical_affine
        x, y, z = np.sqrt((affine[:3, :3] ** 2).sum(0)).tolist()
        return z, y, x

    @property
    def canonical_affine(self) -> np.ndarray:
        """The affine from canonical voxel (x, y, z), in this order, to world mm."""
        return self.affine @ inv_ornt_aff(io_orientation(self.affine), self.shape)

    def to_canonical(self, volume: np.ndarray) -> np.ndarray:
        """The file's array (i, j, k) as a view on canonical axes (z, y, x)."""
        return apply_orientation(volume, io_orientation(self.affine)).transpose(2, 1, 0)

    def from_canonical(self, volume: np.ndarray) -> np.ndarray:
        """A canonical array (z, y, x) as a view on the file's own axes (i, j, k)."""
        return apply_orientation(volume.transpose(2, 1, 0), ornt_transform(RAS, io_orientation(self.affine)))

    def distance_mm(self, other: Grid) -> float:
        """The largest distance in mm between the same corner of both grids; infinite for another shape."""
        if self.shape != other.shape:
            return float("inf")
        if np.array_equal(self.affine, other.affine):
            return 0.0
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij")).reshape(3, -1)
        apart = (self.affine - other.affine) @ np.vstack([corners, np.ones(corners.shape[1])])
        return float(np.linalg.norm(apart[:3], axis=0).max())


def stem(path: Path) -> str:
    """The file's name without `.nii.gz` or `.nii`."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def nifti_files(folder: Path) -> list[Path]:
    """The NIfTI files of a folder, sorted by name, hidden ones left out. Empty where there is no folder."""
    return sorted(path for path in folder.glob("[!.]*") if path.name.endswith(ENDINGS)) if folder.is_dir() else []


def read_volume(path: Path, subject: str, findings: Findings | None = None) -> tuple[np.ndarray, Grid]:
    """Read a 3-D NIfTI file (or 4-D with one volume): its array (i, j, k), stored dtype or scaled float, and its grid.

    The array is read-only and in the file's memory order, a view on what was decompressed wherever nothing is scaled.
    A header that does not say how the scan lies, or says two different things, is reported in `findings`.
    Raises SubjectError that names the subject and the file for a file that is missing, damaged, cut short, not 3-D, not
    of real numbers or without a usable affine; nothing is allocated for dimensions that the file cannot hold.
    """
    volume = open_volume(path, subject)
    if findings is not None and not volume.is_oriented:
        text = "its header says nothing of orientation (sform_code and qform_code are 0): left and right, front and "
        text += "back are guessed; compare with what is known of the scan"
        findings.add("warning", "no orientation", f"{path}: {text}")
    if findings is not None and (apart := volume.apart_mm()) > min(volume.grid.spacing_mm) / 2:
        text = (
            f"its two affines, sform and qform, lie {apart:.1f} mm apart: the sform is taken; programs that take the "
        )
        text += "qform, as those on ITK (3D Slicer, ITK-SNAP) may, show it elsewhere: make them the same"
        findings.add("warning", "two places", f"{path}: {text}", value=apart)
    [whole] = volume.pieces(math.prod(volume.grid.shape))
    return whole.reshape(volume.grid.shape, order="F"), volume.grid


def open_volume(path: Path, subject: str, content: bytes | None = None) -> Volume:
    """A file whose header was read and found usable. Raises SubjectError as `read_volume`.

    `content` is what the file holds on disk, where that was read already (`read_file`).
    """
    where = f"subject {subject}: {path}"
    with explained(where):
        return Volume(_NiftiFile(path, read_regular_file(path) if content is None else content), where)


def read_header(path: Path, subject: str) -> nib.Nifti1Header:
    """A file's header with its extensions, without reading its voxels. Raises SubjectError as `read_volume`."""
    with explained(f"subject {subject}: {path}"):
        return _NiftiFile(path, read_regular_file(path)).header


def read_file(path: Path, subject: str) -> bytes:
    """What a file holds, as it lies on disk. Raises SubjectError as `read_volume`."""
    with explained(f"subject {subject}: {path}"):
        return read_regular_file(path)


class Volume:
    """One volume whose voxels are still to be read, once and from front to back."""

    def __init__(self, file: _NiftiFile, where: str):
        self._file, self._where = file, where
        self.grid, self._dtype = _checked(file.header, where)
        self.is_oriented = bool(file.header["sform_code"] or file.header["qform_code"])
        slope, intercept = file.header.get_slope_inter()
        self._scaling = None if slope is None or (slope, intercept) == (1, 0) else (slope, intercept)

    def apart_mm(self) -> float:
        """How far apart the header's two affines, sform and qform, place a corner; 0 where it has one."""
        header = self._file.header
        if not (header["sform_code"] and header["qform_code"]):
            return 0.0
        try:
            return self.grid.distance_mm(Grid(self.grid.shape, header.get_qform()))
        except (ValueError, nib.spatialimages.HeaderDataError):  # numbers that are no rotation: nobody takes those
            return 0.0

    def pieces(self, voxels: int = PIECE) -> Iterator[np.ndarray]:
        """The voxels in the order of the file (i fastest), `voxels` at a time: flat arrays, read-only.

        Pieces that fit the processor's cache are looked through three times as fast as the whole (measured). Raises
        SubjectError, also at the end where the checksum is wrong.
        """
        total = math.prod(self.grid.shape)
        with explained(self._where):
            self._file.go_to_voxels(total * self._dtype.itemsize)
            for start in range(0, total, voxels):
                size = min(voxels, total - start) * self._dtype.itemsize
                content = self._file.read(size)
                if len(content) < size:
                    raise EOFError(f"{size - len(content)} bytes of voxels are missing")
                if start + voxels >= total:
                    self._file.finish()
                piece = np.frombuffer(content, self._dtype)
                yield piece if self._scaling is None else apply_read_scaling(piece, *self._scaling)


REPORTED_OFFSET_MM = 1e-3  # grids closer than this are the same grid


def offset_mm(grid: Grid, ct_grid: Grid, path: Path, findings: Findings, structure: str = "") -> float | None:
    """How far labels on `grid` lie beside the CT's grid; None, and an error in `findings`, for another grid.

    Up to half of the smallest voxel side counts as the same grid: affines of the public data set differ by up to
    0.21 mm where the voxels are the same (s0783).
    """
    apart = ct_grid.distance_mm(grid)
    if apart == 0:
        return 0.0
    tolerance = min(ct_grid.spacing_mm) / 2
    if apart <= tolerance:
        return apart if apart > REPORTED_OFFSET_MM else 0.0
    findings.add(
        "error",
        "other grid",
        f"{path}: another grid than the CT: expected shape {ct_grid.shape}, orientation {ct_grid.orientation}, "
        f"found {grid.shape}, {grid.orientation}, corners {apart:.2f} mm apart (at most {tolerance:.2f}); "
        "resample the labels to the CT",
        structure,
        apart if math.isfinite(apart) else None,
    )
    return None


class _NiftiFile:
    """A file opened for reading from front to back: first its header, then its voxels."""

    def __init__(self, path: Path, content: bytes):
        packed = path.name.endswith(".gz")
        self._source = gunzip.GzipReader(content) if packed else io.BytesIO(content)
        self._at_most = len(content) * (gunzip.LARGEST_RATIO if packed else 1)
        self._ahead = self._source.read(4)
        self._place = 0
        self._readable: float = MOST_HEADER
        nifti2 = self._ahead in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # size of its header, 540, either order
        self.header = (nib.Nifti2Header if nifti2 else nib.Nifti1Header).from_fileobj(self)
        self._readable = math.inf

    def tell(self) -> int:
        return self._place

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._readable - self._place:
            raise EOFError(f"expected a header of at most {MOST_HEADER:,} bytes, found a part of it with {size:,}")
        ahead, self._ahead = self._ahead[:size], self._ahead[size:]
        # not b"" + ...: the voxels are not copied
        content = ahead + self._source.read(size - len(ahead)) if ahead else self._source.read(size)
        self._place += len(content)
        return content

    def go_to_voxels(self, size: int) -> None:
        """Skip to where the `size` bytes of the voxels begin. EOFError where the file cannot hold as many."""
        start = int(self.header.get_data_offset())
        if not self._place <= start <= start + size <= self._at_most or start > MOST_HEADER:
            raise EOFError(f"expected {size} bytes of voxels from byte {start} on, more than the file can hold")
        self.read(start - self._place)

    def finish(self) -> None:
        """Verify the checksum."""
        if isinstance(self._source, gunzip.GzipReader):
            self._source.finish()


@contextmanager
def explained(where: str, kind: str = "NIfTI") -> Iterator[None]:
    """Whatever goes wrong inside with a file of that kind becomes a SubjectError that says what to do."""
    try:
        yield
    except SubjectError:
        raise
    except gunzip.ERRORS as error:
        raise SubjectError(f"{where}: damaged or cut short ({error}); copy or download it again") from error
    except OSError as error:
        raise SubjectError(f"{where}: cannot be read ({error}); copy or download it again") from error
    except Exception as error:  # libraries raise many kinds for a header that makes no sense
        raise SubjectError(f"{where}: no readable {kind} file ({type(error).__name__}: {error})") from error


def _checked(header: nib.Nifti1Header, where: str) -> tuple[Grid, np.dtype]:
    shape = tuple(int(n) for n in header.get_data_shape())
    if len(shape) > 3 and set(shape[3:]) == {1}:
        shape = shape[:3]
    if len(shape) != 3 or min(shape) < 1:
        raise SubjectError(f"{where}: expected one 3-D volume, found the shape {shape}")
    dtype = header.get_data_dtype()
    if dtype.kind not in "buif":
        raise SubjectError(f"{where}: expected one number a voxel, found {dtype}")
    grid = usable_grid(shape, np.asarray(header.get_best_affine(), float), where)
    return replace(grid, placing={name: header[name].copy() for name in PLACING}), dtype


def usable_grid(shape: tuple[int, int, int], affine: np.ndarray, where: str) -> Grid:
    """The grid of a file. Raises SubjectError, which starts with `where`, for an affine that makes no sense."""
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise SubjectError(f"{where}: its affine does not place the voxels in space: {affine[:3].round(3).tolist()}")
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    if sides.min() < SIDES_MM[0] or sides.max() > SIDES_MM[1]:
        found = " x ".join(f"{side:g}" for side in sides)
        raise SubjectError(
            f"{where}: expected voxel sides from {SIDES_MM[0]} to {SIDES_MM[1]:g} mm, found {found}: not in mm? Write "
            "an affine in mm"
        )
    return Grid(shape, affine)
