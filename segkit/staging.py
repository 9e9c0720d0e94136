"""Subject folder -> staged store: read once, turned to the canonical grid, a compressed block a slice on disk.

A staged subject is a folder with `ct-<x>.b2nd` (int16 HU), `codes-<x>.b2nd` (label codes), both (z, y, x) on the
canonical grid of `segkit.formats.nifti`, and a readable `subject.json` with checksums of all three. It appears under
its name only when it is complete. <x> is of its sources: who reads it never gets the voxels of one version with the
codebook of another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import joblib
import numpy as np
from tqdm.auto import tqdm

from segkit.codes import CodeVolume, codebook_from_json, codebook_to_json
from segkit.errors import Finding, Findings, SegkitError, SubjectError
from segkit.formats.nifti import Grid
from segkit.locks import alone
from segkit.reading import read_ct, read_labels, refuse
from segkit.runs import make_folder, sweep, write_json, write_whole_folder
from segkit.stores import StoredArray, checksums, is_whole, save_array, sealed
from segkit.subjects import Subject
from segkit.untrusted import read_json

STORE_VERSION = 4
_ARRAYS = {"ct": "i", "codes": "u"}  # the kind of numbers in each, as numpy names it
MOST_OPEN = 64
"""Arrays that a process keeps open, each with a file: systems allow 256 to 1,024 files, a large data set has 2,456
arrays. blosc2 4.14 keeps the files of 96 arrays open (measured) and opens those of any more by name at each reading,
which would fail for a file that was staged anew meanwhile. Opening an array again takes about a third of a
millisecond."""

_open_arrays: OrderedDict[tuple[int, object, str], StoredArray] = OrderedDict()  # the last used at the end


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

    @property
    def checksums(self) -> list[int]:
        """CRC-32 of the HU of each slice: what a scan is known again by, whatever it is called."""
        return self.info["crc32"]["ct"]

    def contents(self) -> dict[str, str]:
        """SHA-256 of the CT ("ct") and of the labels with their names ("labels"), the same wherever the files lie."""
        parts = {"ct": self.checksums, "labels": [self.info["crc32"]["codes"], self.structures, self.info["codebook"]]}
        return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}

    def hu(self, z: int | slice = slice(None)) -> np.ndarray:
        """HU of one axial slice (y, x) or of several (z, y, x), int16. SegkitError for a damaged store."""
        return self._array("ct")[z]

    def labels(self, z: int | slice = slice(None)) -> CodeVolume:
        """Label codes of one axial slice (y, x) or of several (z, y, x). SegkitError for a damaged store."""
        return self.codebook.with_codes(self._array("codes")[z])

    @cached_property
    def codebook(self) -> CodeVolume:
        """What the codes mean, without any codes."""
        return codebook_from_json(self.info, np.zeros(0, np.uint8), str(self.folder / "subject.json"))

    def _array(self, name: str) -> StoredArray:
        key = (os.getpid(), self._itself, name)  # a forked worker opens its own
        array = _open_arrays.pop(key, None)
        if array is None:
            path = self.folder / _file_name(name, self.info["fingerprint"])
            array = StoredArray(path, self.shape, _ARRAYS[name], self.info["crc32"][name])
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


def _file_name(name: str, print_of_sources: str) -> str:
    return f"{name}-{print_of_sources[:12]}.b2nd"


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
    the errors that `segkit.reading` found, and SegkitError where the store cannot be written; then nothing is left
    behind, and a store of older sources stays.
    """
    target, print_of_sources = stage_dir / subject.name, fingerprint(subject)
    staged = _load(target, print_of_sources)
    if staged is not None:
        return staged
    info = {}
    write_whole_folder(
        target, lambda folder: info.update(_write_store(subject, folder, print_of_sources)), replace=True
    )
    return StagedSubject(target, info)


def _load(folder: Path, print_of_sources: str) -> StagedSubject | None:
    """What is staged in a folder; None where nothing is, or what is there is of other sources or damaged."""
    try:
        info = read_json(folder / "subject.json", "it is made again")
        known = is_whole(info) and info.get("version") == STORE_VERSION and info.get("fingerprint") == print_of_sources
        return StagedSubject(folder, info) if known and info["bytes"] == _sizes(folder, print_of_sources) else None
    except (OSError, SegkitError):
        return None


def _sizes(folder: Path, print_of_sources: str) -> dict[str, int]:
    """Bytes of each array: what was cut short is seen without reading it."""
    return {name: (folder / _file_name(name, print_of_sources)).stat().st_size for name in _ARRAYS}


def _write_store(subject: Subject, folder: Path, print_of_sources: str) -> dict:
    findings = Findings(subject.name)
    read = read_ct(subject, findings)
    refuse(findings)
    assert read is not None  # else there was an error among the findings
    hu, grid = read
    hu = grid.to_canonical(hu)
    shape = hu.shape
    save_array(folder / _file_name("ct", print_of_sources), hu)
    crc32 = {"ct": checksums(hu)}
    del read, hu  # the labels need the memory
    volume = read_labels(subject, grid, findings)
    refuse(findings)
    volume = volume.with_codes(grid.to_canonical(volume.codes))
    save_array(folder / _file_name("codes", print_of_sources), volume.codes)
    crc32["codes"] = checksums(volume.codes)
    voxels, slices = count_structures(volume)
    info = {
        "version": STORE_VERSION,
        "fingerprint": print_of_sources,
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
        "crc32": crc32,
        **codebook_to_json(volume),
    }
    info = sealed({**info, "bytes": _sizes(folder, print_of_sources)})
    write_json(folder / "subject.json", info)
    return info


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
    STAGE_DIR serves several; one process at a time stages into it, others wait for it. Raises SegkitError if STAGE_DIR
    lies inside the data or cannot be written, or if no subject is usable.
    """
    if jobs is not None and (not isinstance(jobs, int) or jobs < 1):
        raise SegkitError(f"JOBS = {jobs!r}: expected a whole number of 1 or more, or None")
    data_dir = subjects[0].data_dir.resolve()
    stage_dir = Path(stage_dir).resolve()
    if stage_dir == data_dir or data_dir in stage_dir.parents:
        raise SegkitError(f"STAGE_DIR {stage_dir} lies inside the data {data_dir}; choose a folder outside of it")
    home = stage_dir / f"{data_dir.name}-{hashlib.sha256(str(data_dir).encode()).hexdigest()[:8]}"
    make_folder(home)
    results: dict[str, StagedSubject | str | None] = {
        subject.name: _staged_before(subject, home) for subject in subjects
    }
    missing = [subject for subject in subjects if results[subject.name] is None]
    if missing:
        with alone(home / ".lock", f"{home}: another process stages into it, waiting until it is done", wait=True):
            sweep(home)
            for subject, result in _stage_all(missing, home, jobs, progress):
                if strict and isinstance(result, str):
                    raise SubjectError(result)
                results[subject.name] = result
    staged = [result for result in results.values() if isinstance(result, StagedSubject)]
    problems = [
        Finding(name, "error", "left out", result) for name, result in results.items() if isinstance(result, str)
    ]
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


def _staged_before(subject: Subject, home: Path) -> StagedSubject | None:
    try:
        return _load(home / subject.name, fingerprint(subject))
    except SubjectError:
        return None  # it will be said when it is staged


def _stage_or_problem(subject: Subject, home: Path) -> StagedSubject | str:
    try:
        return stage_subject(subject, home)
    except SubjectError as error:
        return str(error)


def structures_in(staged: Sequence[StagedSubject]) -> list[str]:
    """Every structure that at least one of the subjects annotates, sorted."""
    return sorted({name for subject in staged for name in subject.structures})
