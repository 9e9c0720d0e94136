"""NIfTI: checked reading, and the canonical grid that everything after it uses.

The canonical grid is RAS+ with the axial slices first: an array `volume[z, y, x]` whose z grows towards the head, y to
the front and x to the patient's right. Its voxels are the source's own, only turned round: nothing is resampled, so
the way back (`from_canonical`) is exact.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from segkit.errors import SubjectError

RAS = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie: shape of its array and the 4 x 4 affine from voxel to world (RAS+, mm)."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def orientation(self) -> str:
        """Towards what the file's axes grow, for example "RAS" or "LPS"."""
        return "".join(nib.aff2axcodes(self.affine))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size in mm on the canonical axes (z, y, x)."""
        affine = self.canonical_affine
        return tuple(float(size) for size in np.sqrt((affine[:3, :3] ** 2).sum(0))[::-1])

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
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij")).reshape(3, -1)
        apart = (self.affine - other.affine) @ np.vstack([corners, np.ones(corners.shape[1])])
        return float(np.linalg.norm(apart[:3], axis=0).max())


def read_volume(path: Path, subject: str) -> tuple[np.ndarray, Grid]:
    """Read a 3-D NIfTI file (or 4-D with one volume): its array (i, j, k), stored dtype or scaled float, and its grid.

    Raises SubjectError that names the subject and the file for a file that is missing, damaged, cut short, not 3-D, not
    of real numbers or without a usable affine.
    """
    where = f"subject {subject}: {path}"
    try:
        raw = path.read_bytes()
        if path.name.endswith(".gz"):
            raw = igzip.decompress(raw)
    except OSError as error:  # isal's BadGzipFile is one too
        raise SubjectError(f"{where}: cannot be read ({error}); copy or download it again") from error
    except (EOFError, zlib.error, isal_zlib.error) as error:
        raise SubjectError(f"{where}: damaged or cut short ({error}); copy or download it again") from error
    try:
        kind = nib.Nifti2Image if raw[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nib.Nifti1Image
        header = kind.header_class.from_fileobj(io.BytesIO(raw))
        expected = int(header["vox_offset"]) + int(np.prod([int(n) for n in header.get_data_shape()])) * (
            header.get_data_dtype().itemsize
        )
        if len(raw) < expected:
            raise SubjectError(
                f"{where}: cut short: expected {expected} bytes, found {len(raw)}; copy or download it again"
            )
        image = kind.from_bytes(raw)
        volume = np.asanyarray(image.dataobj)
    except SubjectError:
        raise
    except Exception as error:  # nibabel raises many kinds for a header that makes no sense
        raise SubjectError(f"{where}: no readable NIfTI file ({type(error).__name__}: {error})") from error
    return _checked(volume, np.asarray(image.affine, float), where)


def _checked(volume: np.ndarray, affine: np.ndarray, where: str) -> tuple[np.ndarray, Grid]:
    if volume.ndim > 3 and set(volume.shape[3:]) == {1}:
        volume = volume.reshape(volume.shape[:3])
    if volume.ndim != 3 or 0 in volume.shape:
        raise SubjectError(f"{where}: expected one 3-D volume, found the shape {volume.shape}")
    if volume.dtype.kind not in "buif":
        raise SubjectError(f"{where}: expected one number a voxel, found {volume.dtype}")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise SubjectError(f"{where}: its affine does not place the voxels in space: {affine[:3].round(3).tolist()}")
    return volume, Grid(tuple(int(n) for n in volume.shape), affine)
