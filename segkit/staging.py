"""Subject folder -> staged store: read once, turned to the canonical grid, a compressed block a slice on disk.

A staged subject is a folder with `ct.b2nd` (int16 HU), `codes.b2nd` (label codes), both (z, y, x) on the canonical grid
of `segkit.formats.nifti`, and a readable `subject.json`. It appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import blosc2
import joblib
import numpy as np
from tqdm.auto import tqdm

from segkit.codes import CodeVolume, codebook_from_json, codebook_to_json
from segkit.errors import Finding, Findings, SegkitError, SubjectError
from segkit.formats.nifti import Grid
from segkit.reading import read_ct, read_labels, refuse
from segkit.runs import make_folder, write_json
from segkit.subjects import Subject

STORE_VERSION = 2
MOST_OPEN = 128
"""Arrays that a process keeps open, each with a file: systems allow 256 to 1,024 files, a large data set has 2,456
arrays. Opening one again takes about a third of a millisecond."""

_open_arrays: OrderedDict[tuple[int, object, str], blosc2.NDArray] = OrderedDict()  # the last used at the end


@dataclass(frozen=True)
class StagedSubject:
    """One subject in the store. Arrays are read when asked for, a slice at a time or whole."""

    folder: Path
    info: dict  # the content of subject.json

    @property
    def name(self) -> str:
        """The subject's name."""
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

    def hu(self, z: int | slice = slice(None)) -> np.ndarray:
        """HU of one axial slice (y, x) or of several (z, y, x), int16."""
        return self._array("ct")[z]

    def labels(self, z: int | slice = slice(None)) -> CodeVolume:
        """Label codes of one axial slice (y, x) or of several (z, y, x)."""
        return self.codebook.with_codes(self._array("codes")[z])

    @cached_property
    def codebook(self) -> CodeVolume:
        """What the codes mean, without any codes."""
        return codebook_from_json(self.info, np.zeros(0, np.uint8), str(self.folder / "subject.json"))

    def _array(self, name: str) -> blosc2.NDArray:
        key = (os.getpid(), self._itself, name)  # a forked worker opens its own
        array = _open_arrays.pop(key, None)
        if array is None:
            array = open_array(self.folder / f"{name}.b2nd", self.shape)
        _open_arrays[key] = array
        while len(_open_arrays) > MOST_OPEN:
            _open_arrays.popitem(last=False)
        return array

    @cached_property
    def _itself(self) -> object:
        return object()  # not the folder: it may be staged again

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
    """Write (z, y, x) as `.b2nd`, compressed without loss, a block a slice so that one slice can be read alone."""
    # noise in HU compresses better bit by bit; codes as they are. Level 3 would gain 0.2 % and take twice as long
    filters = [blosc2.Filter.NOFILTER if volume.dtype.itemsize == 1 else blosc2.Filter.BITSHUFFLE]
    packed = blosc2.asarray(
        np.ascontiguousarray(volume),
        # a file of few chunks is written many times faster; reading a slice touches its block alone all the same
        chunks=(min(16, len(volume)), *volume.shape[1:]),
        blocks=(1, *volume.shape[1:]),
        cparams=blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, filters=filters, nthreads=1),
    )
    path.write_bytes(packed.to_cframe())  # at once, not chunk by chunk


def fingerprint(subject: Subject) -> str:
    """Hash over name, size and modification time of all source files: another one means that the store is stale.

    Raises SubjectError for a file that cannot be looked at.
    """
    try:
        lines = [f"{path.name} {(stat := path.stat()).st_size} {stat.st_mtime_ns}" for path in subject.files]
    except OSError as error:
        raise SubjectError(f"subject {subject.name}: {error.filename}: cannot be read ({error.strerror})") from error
    return hashlib.sha256("\n".join([f"v{STORE_VERSION}", str(subject.ct.resolve()), *lines]).encode()).hexdigest()


def stage_subject(subject: Subject, stage_dir: Path) -> StagedSubject:
    """Stage one subject, or return it from the store where it is there and its sources are unchanged.

    Peak memory: the CT, or one mask and the codes. Raises SubjectError that names subject and file for the first of
    the errors that `segkit.reading` found; then nothing is left behind.
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
    staged = _load(target)
    assert staged is not None
    return staged


def _load(folder: Path) -> StagedSubject | None:
    try:
        info = json.loads((folder / "subject.json").read_text(encoding="utf-8"))
        return StagedSubject(folder, info) if info["version"] == STORE_VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, from another version or damaged: it is staged again


def _write_store(subject: Subject, folder: Path) -> dict:
    findings = Findings(subject.name)
    read = read_ct(subject, findings)
    refuse(findings)
    assert read is not None  # else there was an error among the findings
    hu, grid = read
    hu = grid.to_canonical(hu)
    shape = hu.shape
    save_array(folder / "ct.b2nd", hu)
    del read, hu  # the labels need the memory
    volume = read_labels(subject, grid, findings)
    refuse(findings)
    volume = volume.with_codes(grid.to_canonical(volume.codes))
    save_array(folder / "codes.b2nd", volume.codes)
    voxels, slices = count_structures(volume)
    return {
        "version": STORE_VERSION,
        "subject": subject.name,
        "source": str(subject.ct.resolve()),
        "ct_bytes": subject.ct.stat().st_size,
        "shape": list(shape),
        "spacing_mm": list(grid.spacing_mm),
        "source_orientation": grid.orientation,
        "source_shape": list(grid.shape),
        "source_affine": grid.affine.tolist(),
        "notes": [str(finding) for finding in findings],
        "voxels": voxels,
        "slices": slices,
        **codebook_to_json(volume),
    }


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
    subjects: Sequence[Subject],
    stage_dir: str | Path,
    jobs: int | None = 1,
    progress: bool = True,
    strict: bool = False,
) -> tuple[list[StagedSubject], list[Finding]]:
    """Stage subjects, `jobs` at a time; what is there and not stale is not read again.

    Returns the staged subjects, in the given order, and a finding for each that was left out; with `strict` the first
    such one is raised as SubjectError. `jobs=None` leaves the number and the place of the workers to the surrounding
    `joblib.parallel_config`: inside `parallel_config(backend="dask")` they are those of a cluster, which must see the
    data and STAGE_DIR under the same paths. The store lies in a folder of its own for each data folder, so that one
    STAGE_DIR serves several. Raises SegkitError if STAGE_DIR lies inside the data, or if no subject is usable.
    """
    if jobs is not None and (not isinstance(jobs, int) or jobs < 1):
        raise SegkitError(f"JOBS = {jobs!r}: expected a whole number of 1 or more, or None")
    data_dir = subjects[0].data_dir.resolve()
    stage_dir = Path(stage_dir).resolve()
    if stage_dir == data_dir or data_dir in stage_dir.parents:
        raise SegkitError(f"STAGE_DIR {stage_dir} lies inside the data {data_dir}; choose a folder outside of it")
    home = stage_dir / f"{data_dir.name}-{hashlib.sha256(str(data_dir).encode()).hexdigest()[:8]}"
    make_folder(home)
    staged, problems = [], []
    for subject, result in _stage_all(subjects, home, jobs, progress):
        if isinstance(result, StagedSubject):
            staged.append(result)
        elif strict:
            raise SubjectError(result)
        else:
            problems.append(Finding(subject.name, "error", "left out", result))
    if not staged:
        shown = " | ".join(map(str, problems[:5]))
        raise SegkitError(f"{data_dir}: none of the {len(subjects)} subjects can be used. {shown}")
    return staged, problems


def _stage_all(
    subjects: Sequence[Subject], home: Path, jobs: int | None, progress: bool
) -> Iterator[tuple[Subject, StagedSubject | str]]:
    """Each subject with its store, or with the reason why it has none, as they get ready, in order."""
    work = (joblib.delayed(_stage_or_problem)(subject, home) for subject in subjects)
    results = joblib.Parallel(n_jobs=jobs, return_as="generator")(work)
    # the bar counts bytes, so that the time left is right for subjects of unequal size
    sizes = [_size(subject) for subject in subjects]
    with tqdm(total=sum(sizes), desc="staging", unit="B", unit_scale=True, disable=not progress) as bar:
        for number, (subject, size, result) in enumerate(zip(subjects, sizes, results, strict=True), 1):
            bar.set_postfix_str(f"{number}/{len(subjects)} subjects", refresh=False)
            bar.update(size)
            yield subject, result


def _size(subject: Subject) -> int:
    return sum(path.stat().st_size for path in subject.files if path.is_file())


def _stage_or_problem(subject: Subject, home: Path) -> StagedSubject | str:
    try:
        return stage_subject(subject, home)
    except SubjectError as error:
        return str(error)


def structures_in(staged: Sequence[StagedSubject]) -> list[str]:
    """Every structure that at least one of the subjects annotates, sorted."""
    return sorted({name for subject in staged for name in subject.structures})
