"""Subject folder -> staged store: read once, turned to the canonical grid, a compressed chunk a slice on disk.

A staged subject is a folder with `ct.b2nd` (int16 HU), `codes.b2nd` (label codes), both (z, y, x) on the canonical grid
of `segkit.formats.nifti`, and a readable `subject.json`. It appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import blosc2
import joblib
import numpy as np
from tqdm.auto import tqdm

from segkit.codes import CodeVolume, codebook_from_json, codebook_to_json, encode
from segkit.errors import SegkitError, SubjectError
from segkit.formats.nifti import Grid, read_volume
from segkit.runs import make_folder, write_json
from segkit.subjects import Subject

STORE_VERSION = 1
HU_MIN, HU_MAX = np.iinfo(np.int16).min, np.iinfo(np.int16).max
REPORTED_OFFSET_MM = 1e-3  # grids closer than this are the same grid


@dataclass(frozen=True)
class StagedSubject:
    """One subject in the store. Arrays are read when asked for, a slice at a time or whole."""

    folder: Path
    info: dict  # the content of subject.json

    @property
    def name(self) -> str:
        return self.info["subject"]

    @property
    def grid(self) -> Grid:
        """The grid of the source CT."""
        return Grid(tuple(self.info["source_shape"]), np.array(self.info["source_affine"], float))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows and columns (z, y, x) on the canonical grid."""
        return tuple(self.info["shape"])

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size in mm along (z, y, x)."""
        return tuple(self.info["spacing_mm"])

    @property
    def structures(self) -> tuple[str, ...]:
        """The annotated structures, absent ones included."""
        return tuple(self.info["structures"])

    @property
    def voxels(self) -> dict[str, int]:
        """Voxels of each annotated structure."""
        return self.info["voxels"]

    @cached_property
    def _ct(self) -> blosc2.NDArray:
        return open_array(self.folder / "ct.b2nd", self.shape)

    @cached_property
    def _codes(self) -> blosc2.NDArray:
        return open_array(self.folder / "codes.b2nd", self.shape)

    def hu(self, z: int | slice = slice(None)) -> np.ndarray:
        """HU of one axial slice (y, x) or of several (z, y, x), int16."""
        return self._ct[z]

    def labels(self, z: int | slice = slice(None)) -> CodeVolume:
        """Label codes of one axial slice (y, x) or of several (z, y, x)."""
        return self._codebook.with_codes(self._codes[z])

    @cached_property
    def _codebook(self) -> CodeVolume:
        return codebook_from_json(self.info, np.zeros(0, np.uint8), str(self.folder / "subject.json"))

    def __getstate__(self) -> dict:
        # open arrays stay behind: a worker process opens its own
        return {"folder": self.folder, "info": self.info}


def open_array(path: Path, shape: tuple[int, int, int]) -> blosc2.NDArray:
    """Open a `.b2nd` for reading slices. SegkitError that names the file if it is damaged or of another shape."""
    try:
        array = blosc2.open(str(path), mode="r")
    except (RuntimeError, ValueError, OSError) as error:
        raise SegkitError(f"{path}: damaged store ({error}); delete its folder to have it staged again") from error
    if tuple(array.shape) != shape:
        raise SegkitError(
            f"{path}: expected the shape {shape}, found {tuple(array.shape)}; delete its folder to stage again"
        )
    return array


def save_array(path: Path, volume: np.ndarray) -> None:
    """Write (z, y, x) as `.b2nd`, compressed without loss, a chunk a slice so that one slice can be read alone."""
    chunk = (1, *volume.shape[1:])
    blosc2.asarray(
        np.ascontiguousarray(volume),
        urlpath=str(path),
        mode="w",
        chunks=chunk,
        blocks=chunk,
        cparams=blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=3, nthreads=1),
    )


def fingerprint(subject: Subject) -> str:
    """Hash over name, size and modification time of all source files: another one means that the store is stale."""
    try:
        lines = [f"{path.name} {(stat := path.stat()).st_size} {stat.st_mtime_ns}" for path in subject.files]
    except OSError as error:
        raise SubjectError(f"subject {subject.name}: {error.filename}: cannot be read ({error.strerror})") from error
    return hashlib.sha256("\n".join([f"v{STORE_VERSION}", str(subject.folder.resolve()), *lines]).encode()).hexdigest()


def stage_subject(subject: Subject, stage_dir: Path) -> StagedSubject:
    """Stage one subject, or return it from the store where it is there and its sources are unchanged.

    Peak memory: the CT, one mask and the codes. Raises SubjectError that names subject and file for a CT or mask that
    cannot be read, for NaN in the CT and for a mask on another grid; then nothing is left behind.
    """
    target = stage_dir / subject.name
    print_of_sources = fingerprint(subject)
    staged = _load(target)
    if staged is not None and staged.info.get("fingerprint") == print_of_sources:
        return staged
    temporary = stage_dir / f".{subject.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        info = _write_store(subject, temporary)
        write_json(temporary / "subject.json", {**info, "fingerprint": print_of_sources})
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
    except OSError:
        # another process may have staged the same subject in the meantime: then its store serves
        staged = _load(target)
        if staged is None or staged.info.get("fingerprint") != print_of_sources:
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _load(target)


def _load(folder: Path) -> StagedSubject | None:
    try:
        info = json.loads((folder / "subject.json").read_text(encoding="utf-8"))
        return StagedSubject(folder, info) if info["version"] == STORE_VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, from another version or damaged: it is staged again


def _write_store(subject: Subject, folder: Path) -> dict:
    notes: list[str] = []
    hu, grid = _read_ct(subject, notes)
    hu = grid.to_canonical(hu)
    shape = hu.shape
    save_array(folder / "ct.b2nd", hu)
    del hu  # the masks need the memory
    volume = encode(_read_masks(subject, grid, notes), grid.shape, order="F")
    volume = volume.with_codes(grid.to_canonical(volume.codes))
    save_array(folder / "codes.b2nd", volume.codes)
    voxels, slices = count_structures(volume)
    return {
        "version": STORE_VERSION,
        "subject": subject.name,
        "source": str(subject.folder.resolve()),
        "ct_bytes": subject.ct.stat().st_size,
        "shape": list(shape),
        "spacing_mm": list(grid.spacing_mm),
        "source_orientation": grid.orientation,
        "source_shape": list(grid.shape),
        "source_affine": grid.affine.tolist(),
        "notes": notes,
        "voxels": voxels,
        "slices": slices,
        **codebook_to_json(volume),
    }


def _read_ct(subject: Subject, notes: list[str]) -> tuple[np.ndarray, Grid]:
    """HU (i, j, k) as int16, rounded and clipped where the file holds more; what was clipped goes into `notes`."""
    volume, grid = read_volume(subject.ct, subject.name)
    if volume.dtype == np.int16:
        return volume, grid
    wrong = int(np.count_nonzero(~np.isfinite(volume)))
    if wrong:
        raise SubjectError(
            f"subject {subject.name}: {subject.ct}: {wrong} voxels are NaN or infinite, expected HU; "
            "repair the file or name the subject in EXCLUDE"
        )
    clipped = int(((volume < HU_MIN) | (volume > HU_MAX)).sum())
    if clipped:
        notes.append(f"ct: {clipped} voxels outside the range of int16 were clipped")
    return np.rint(np.clip(volume, HU_MIN, HU_MAX)).astype(np.int16), grid


def _read_masks(subject: Subject, grid: Grid, notes: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    tolerance = min(grid.spacing_mm) / 2
    for name, path in subject.masks.items():
        mask, mask_grid = read_volume(path, subject.name)
        if mask.dtype.kind == "f" and not np.isfinite(mask).all():
            raise SubjectError(f"subject {subject.name}: {path}: holds NaN or infinite values, expected a mask")
        apart = grid.distance_mm(mask_grid)
        if apart > tolerance:
            raise SubjectError(
                f"subject {subject.name}: {path}: another grid than {subject.ct.name}: expected shape {grid.shape}, "
                f"orientation {grid.orientation}, found {mask_grid.shape}, {mask_grid.orientation}, corners "
                f"{apart:.2f} mm apart (at most {tolerance:.2f}); resample the mask to the CT"
            )
        if apart > REPORTED_OFFSET_MM:
            notes.append(f"{name}: lies {apart:.3f} mm beside the CT's grid; taken as the same grid")
        yield name, mask


def count_structures(volume: CodeVolume) -> tuple[dict[str, int], dict[str, list[list[int]]]]:
    """Voxels of each structure, and the runs [start, stop) of slices in which it occurs, from codes (z, y, x)."""
    per_slice = np.array([np.bincount(codes.ravel(), minlength=len(volume.codebook)) for codes in volume.codes])
    voxels = per_slice @ volume.codebook.astype(np.int64)
    runs = {}
    for name, occurs in zip(volume.structures, (voxels > 0).T, strict=True):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], occurs.astype(np.int8), [0]])))
        runs[name] = edges.reshape(-1, 2).tolist()
    return dict(zip(volume.structures, voxels.sum(0).tolist(), strict=True)), runs


def stage(
    subjects: Sequence[Subject], stage_dir: str | Path, jobs: int = 1, progress: bool = True
) -> tuple[list[StagedSubject], list[str]]:
    """Stage subjects, `jobs` at a time; what is there and not stale is not read again.

    Returns the staged subjects, in the given order, and a sentence for each that was left out. The store lies in a
    folder of its own for each data folder, so that one STAGE_DIR serves several. Raises SegkitError if STAGE_DIR lies
    inside the data, or if no subject is usable.
    """
    if not isinstance(jobs, int) or jobs < 1:
        raise SegkitError(f"JOBS = {jobs!r}: expected a whole number of 1 or more")
    data_dir = subjects[0].folder.parent.resolve()
    stage_dir = Path(stage_dir).resolve()
    if stage_dir == data_dir or data_dir in stage_dir.parents:
        raise SegkitError(f"STAGE_DIR {stage_dir} lies inside the data {data_dir}; choose a folder outside of it")
    home = stage_dir / f"{data_dir.name}-{hashlib.sha256(str(data_dir).encode()).hexdigest()[:8]}"
    make_folder(home)
    work = (joblib.delayed(_stage_or_problem)(subject, home) for subject in subjects)
    results = joblib.Parallel(n_jobs=jobs, return_as="generator")(work)
    results = list(tqdm(results, total=len(subjects), desc="staging", unit="subject", disable=not progress))
    staged = [result for result in results if isinstance(result, StagedSubject)]
    problems = [result for result in results if isinstance(result, str)]
    if not staged:
        raise SegkitError(f"{data_dir}: none of the {len(subjects)} subjects can be used. " + " | ".join(problems[:5]))
    return staged, problems


def _stage_or_problem(subject: Subject, home: Path) -> StagedSubject | str:
    try:
        return stage_subject(subject, home)
    except SubjectError as error:
        return str(error)


def structures_in(staged: Sequence[StagedSubject]) -> list[str]:
    """Every structure that at least one of the subjects annotates, sorted."""
    return sorted({name for subject in staged for name in subject.structures})
