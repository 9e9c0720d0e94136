"""A scan of anybody's, without labels: NIfTI, NRRD or DICOM in, HU on the canonical grid out, checked.

A Scan has the face of a staged subject, so that what predicts one predicts the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from segkit.codes import CodeVolume
from segkit.errors import Findings, SegkitError, SubjectError
from segkit.formats import nifti, nrrd
from segkit.formats.dicom import Series, find_series, is_dicom
from segkit.formats.dicom_stack import read_stack
from segkit.formats.nifti import Grid
from segkit.labels import safe_name
from segkit.reading import as_hu, is_perpendicular, plausible, refuse

ENDINGS = (*nifti.ENDINGS, *nrrd.ENDINGS)

ACCEPTED = (
    "expected a .nii.gz, .nii or .nrrd file, a folder of such files, a folder of subjects (s0000/ct.nii.gz) or a "
    "folder of DICOM files"
)


@dataclass(frozen=True)
class ScanSource:
    """A scan that was found and is still to be read."""

    name: str  # safe as a file name
    path: Path  # its file, or the folder of a DICOM series
    series: Series | None = None  # of DICOM
    others: tuple[Path, ...] = ()  # files beside those of DICOM that are none by their content


@dataclass(frozen=True)
class Scan:
    """One scan in memory, with what `segkit.staging.StagedSubject` has; nobody looked for structures in it."""

    name: str
    hu_volume: np.ndarray  # int16 (z, y, x) on the canonical grid
    grid: Grid  # of the file: its shape (i, j, k) and affine
    files: tuple[Path, ...]  # the file, or those of a DICOM series in the order of k

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows and columns (z, y, x) on the canonical grid."""
        return self.hu_volume.shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size in mm along (z, y, x)."""
        return self.grid.spacing_mm

    @property
    def structures(self) -> tuple[str, ...]:
        """The annotated structures: none."""
        return ()

    @property
    def voxels(self) -> dict[str, int]:
        """Voxels of each annotated structure: empty."""
        return {}

    @property
    def info(self) -> dict:
        """What of `subject.json` a scan has: `slices`, in which each annotated structure occurs, empty."""
        return {"subject": self.name, "slices": {}}

    def hu(self, z: int | slice = slice(None)) -> np.ndarray:
        """HU of one axial slice (y, x) or of several (z, y, x), int16, contiguous."""
        return np.ascontiguousarray(self.hu_volume[z])

    def labels(self, z: int | slice = slice(None)) -> CodeVolume:
        """Label codes of one axial slice (y, x) or of several (z, y, x): all 0, no structure is annotated."""
        return self.codebook.with_codes(np.zeros(self.hu_volume[z].shape, np.uint8))

    @cached_property
    def codebook(self) -> CodeVolume:
        """What the codes mean, without any codes."""
        return CodeVolume(np.zeros(0, np.uint8), np.zeros((1, 0), bool), ())


def find_scans(source: str | Path, series: str | None = None) -> list[ScanSource]:
    """The scans of `source`, sorted by name: a NIfTI or NRRD file, a folder of such files or of subjects, or DICOM.

    A folder that holds neither files nor subjects is searched for DICOM, folders inside included. Of several DICOM
    series `series` takes one, by its UID or the end of it. Raises SegkitError where there is nothing to read, and where
    there are several series and none is chosen: it lists them.
    """
    source = Path(source)
    try:
        if source.is_file():
            return [_open_file(source, series)]
        if not source.is_dir():
            raise SegkitError(f"{source}: no such file or folder; {ACCEPTED}")
        found = None if series is not None else _volume_files(source)
        return _named(found) if found else [_dicom(source, _files_below(source), series)]
    except OSError as error:
        raise SegkitError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _open_file(path: Path, series: str | None) -> ScanSource:
    if path.name.endswith(ENDINGS):
        if series is not None:
            raise SegkitError(f"{path}: SERIES = {series!r} chooses among DICOM series, and this file is none")
        return _volume_source(path)
    if path.name.endswith(".nhdr"):
        raise SegkitError(f"{path}: keeps its voxels in another file; save the scan as one file, .nrrd or .nii.gz")
    if not is_dicom(path):
        raise SegkitError(f"{path}: neither NIfTI nor NRRD by its name, nor DICOM by its content; {ACCEPTED}")
    return _dicom(path, [path], series)


def _volume_files(folder: Path) -> list[Path]:
    """The scans among the NIfTI and NRRD files of a folder; of a subject's folder its `ct` alone."""
    cts = _cts(folder)
    if cts:
        return cts
    files = [path for path in sorted(folder.glob("[!.]*")) if path.name.endswith(ENDINGS) and path.is_file()]
    scans = [path for path in files if not path.name.endswith(".seg.nrrd")]
    return scans or [ct for inside in sorted(folder.glob("[!.]*/")) for ct in _cts(inside)]


def _cts(folder: Path) -> list[Path]:
    return [path for ending in nifti.ENDINGS if (path := folder / f"ct{ending}").is_file()][:1]


def _named(paths: Sequence[Path]) -> list[ScanSource]:
    sources: dict[str, ScanSource] = {}
    for source in map(_volume_source, paths):
        if source.name in sources:
            both = f"{sources[source.name].path} and {source.path}"
            raise SegkitError(f"{both} would both be called {source.name}: rename one of them")
        sources[source.name] = source
    return [sources[name] for name in sorted(sources)]


def _volume_source(path: Path) -> ScanSource:
    """Named after its file; `ct.nii.gz` is what every subject has, so it is named after its folder."""
    name = nifti.stem(path).removesuffix(".nrrd")
    return ScanSource(_name(path, _absolute(path).parent.name if name == "ct" else name), path)


def _absolute(path: Path) -> Path:
    """With the names of all folders, for those who say `..`. Links are not followed: git-annex's have other names."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _name(path: Path, text: str) -> str:
    try:
        return safe_name(text)
    except SegkitError as error:
        raise SegkitError(f"{path}: {error}; rename it") from error


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file in a folder and below it, hidden ones left out, sorted."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            yield path


def _dicom(source: Path, files: Iterator[Path] | Sequence[Path], wanted: str | None) -> ScanSource:
    marked = {path: is_dicom(path) for path in files}
    every = find_series([path for path, is_marked in marked.items() if is_marked])
    if not every:
        raise SegkitError(f"{source}: holds no scan; {ACCEPTED}")
    # what has no place in the patient is no scan, and is chosen only where there is nothing else or by its UID
    usable = [series for series in every if series.planes] or every
    chosen = _chosen(every, wanted) if wanted is not None else usable
    if len(chosen) != 1:
        problem = f"{len(usable)} series" if wanted is None else f"{len(chosen)} series whose UID ends in {wanted!r}"
        lines = "\n".join(f"  {series}" for series in (chosen or every))
        raise SegkitError(f"{source}: found {problem}, expected one; choose by the UID or the end of it:\n{lines}")
    [series] = chosen
    folder = source if source.is_dir() else source.parent
    text = nifti.stem(source).removesuffix(".dcm") if source.is_file() else _absolute(source).name
    return ScanSource(_name(source, text), folder, series, tuple(path for path in marked if not marked[path]))


def _chosen(every: Sequence[Series], wanted: str) -> list[Series]:
    exact = [series for series in every if series.uid == wanted]
    return exact or [series for series in every if series.uid.endswith(wanted)]


def read_scan(source: ScanSource, findings: Findings) -> Scan:
    """Read a scan; what is doubtful goes into `findings`, and for an error among them SubjectError is raised.

    HU are checked as those of a subject's CT (`segkit.reading.read_ct`); but a scan scaled to a unit range, one without
    air and an image that is no CT are reported and read all the same: it is the asker's decision what to do with them.
    An affine whose axes are not perpendicular is an error, a tilted gantry among them: distances and volumes are taken
    along the axes, and what other programs make of such a grid differs (those on ITK refuse it).
    """
    read = _read_series(source, source.series, findings) if source.series else _read_file(source, findings)
    refuse(findings)
    assert read is not None  # else there was an error among the findings
    hu, grid, files = read
    tilted = "the gantry was tilted" if source.series else "its axes are not perpendicular"
    is_perpendicular(grid, source.path, findings, tilted)
    refuse(findings)
    return Scan(source.name, hu, grid, files)


def _read_series(
    source: ScanSource, series: Series, findings: Findings
) -> tuple[np.ndarray, Grid, tuple[Path, ...]] | None:
    if source.others:
        names = ", ".join(path.name for path in source.others[:5])
        text = f"{source.path}: {len(source.others)} files are no DICOM by their content and left out: {names}"
        findings.add("info", "left out", f"{text}; a damaged slice at an end of the scan would be missing")
    stack = read_stack(series, findings)
    if stack is None or not plausible(*stack.range, source.path, findings, "warning"):
        return None
    return stack.hu, stack.grid, stack.files


def _read_file(source: ScanSource, findings: Findings) -> tuple[np.ndarray, Grid, tuple[Path, ...]] | None:
    path, subject = source.path, findings.subject
    try:
        if path.name.endswith(nrrd.ENDINGS):
            volume, grid = nrrd.read_volume(path, subject)
        else:
            volume, grid = nifti.read_volume(path, subject, findings)
    except SubjectError as error:
        findings.add("error", "unreadable", error)
        return None
    hu = as_hu(volume, path, findings, "warning")
    return None if hu is None else (grid.to_canonical(hu), grid, (path,))
