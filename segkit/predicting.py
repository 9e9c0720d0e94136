"""One's own scans: read, segmented, and written for the viewers that people use."""

from __future__ import annotations

import stat
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from segkit import exports
from segkit.errors import Findings, SegkitError, SubjectError
from segkit.formats.nifti_writing import file_planes, write_nifti
from segkit.inference import Predictor, Segmentation
from segkit.locks import alone
from segkit.pictures import plot_slices, sample, spread_slices
from segkit.runs import discard, left_behind, lock_of, make_folder, write_whole_folder
from segkit.scans import Scan, ScanSource, read_scan
from segkit.settings import Segmenting
from segkit.splits import Part

PLAIN = Segmenting()


@dataclass
class Outcome:
    """What became of one scan: without `scan` it could not be read or written, and `findings` says why."""

    source: ScanSource
    findings: Findings
    scan: Scan | None = None
    segmentation: Segmentation | None = None
    folder: Path | None = None  # where its files are
    files: list[Path] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage

    @property
    def written(self) -> list[str]:
        """`files` for a person to read: a folder of them is one line, with their number."""
        home = self.folder or Path()
        counts = Counter(home / file.relative_to(home).parts[0] for file in self.files)
        return [f"{path} ({number} files)" if path.is_dir() else str(path) for path, number in counts.items()]

    def __str__(self) -> str:
        if self.segmentation is None:
            return f"{self.source.name}: not segmented"
        voxels = self.segmentation.codes.voxels()
        stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self.seconds.items())
        return f"{self.source.name}: {sum(n > 0 for n in voxels.values())} of {len(voxels)} structures; {stages}"


def predict_scans(
    predictor: Predictor,
    sources: Sequence[ScanSource],
    folder: str | Path,
    formats: Sequence[str] = ("nifti",),
    choices: Segmenting = PLAIN,
    progress: bool = True,
    resume: bool = False,
) -> Iterator[Outcome]:
    """Segment scans one after the other into `folder`/<name>/, in each of `formats` (`choices.FORMATS`).

    A scan's folder appears with all of its files or not at all; memory is that of one scan, if the caller keeps no
    Outcome. A scan that cannot be read, or not be written in a format, is an Outcome without files. With `resume` those
    whose folder is there are left out. Raises SegkitError before the first scan for a format that there is not or that
    its kind cannot have, for `mirror` with a model that was trained without mirrored slices, and where a scan's folder
    holds files; at a scan that another process segments into the same folder, and where there is no room.
    """
    exports.check_formats(formats, sources, predictor.structures)
    if choices.mirror:
        predictor.check_mirror()
    folders = {source.name: Path(folder) / source.name for source in sources}
    done = [there for there in folders.values() if _is_done(there)]
    if done and not resume:
        raise SegkitError(
            f"{done[0]}: holds files already, as do {len(done) - 1} more; resume leaves these scans out (from "
            "a shell: --resume), or choose another folder for the results"
        )
    left = [source for source in sources if folders[source.name] not in done]
    return _predict_each(predictor, left, make_folder(Path(folder)), formats, choices, progress)


def _is_done(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _predict_each(
    predictor: Predictor,
    sources: Sequence[ScanSource],
    folder: Path,
    formats: Sequence[str],
    choices: Segmenting,
    progress: bool,
) -> Iterator[Outcome]:
    _sweep(folder)
    for source in sources:
        target = folder / source.name
        with _claimed(target):
            # another process may have done it since this one looked
            done = [] if _is_done(target) else [_predict(predictor, source, target, formats, choices, progress)]
        while done:
            yield done.pop()  # its volumes are not kept here while the next scan is read


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from the same scan; those that segment others may write beside it."""
    lock = lock_of(folder)
    taken = f"{folder}: another process is segmenting this scan; wait until it ends, or choose another folder"
    with alone(lock, taken):
        try:
            yield
        finally:
            with suppress(OSError):  # who waits for no more than this cannot be misled: results are written whole
                lock.unlink()


def _sweep(folder: Path) -> None:
    """Remove what killed processes left behind; where one still runs, its scan is locked."""
    left = [(path, folder / name) for path, name in left_behind(folder) if path.is_dir()]
    left += [(lock, folder / lock.name[1:-5]) for lock in folder.glob(".*.lock") if _is_empty_file(lock)]
    for path, scan in left:
        with suppress(SegkitError, OSError), _claimed(scan):
            discard(path)


def _is_empty_file(path: Path) -> bool:
    """As locks are; what another program keeps under such a name is a folder, a link or holds something."""
    try:
        found = path.lstat()
    except OSError:  # it went meanwhile
        return False
    return stat.S_ISREG(found.st_mode) and not found.st_size


def _predict(
    predictor: Predictor, source: ScanSource, folder: Path, formats: Sequence[str], choices: Segmenting, progress: bool
) -> Outcome:
    outcome = Outcome(source, Findings(source.name))
    started = time.perf_counter()

    def stage_done(name: str) -> None:
        nonlocal started
        now = time.perf_counter()
        outcome.seconds[name], started = now - started, now

    try:
        scan = read_scan(source, outcome.findings)
        exports.check_scan(formats, scan, outcome.findings)
    except SubjectError:
        return outcome  # the error is among the findings
    outcome.scan = scan
    stage_done("read")
    outcome.segmentation = predictor.segment(scan, choices.mirror, choices.largest, choices.uncertainty, progress)
    stage_done("segmented")
    write_whole_folder(folder, lambda temporary: _write(outcome, temporary, formats))
    outcome.folder, outcome.files = folder, sorted(path for path in folder.rglob("*") if path.is_file())
    stage_done("written")
    return outcome


def _write(outcome: Outcome, folder: Path, formats: Sequence[str]) -> None:
    assert outcome.scan is not None and outcome.segmentation is not None
    exports.write(formats, outcome.scan, outcome.segmentation, folder, outcome.findings)
    if outcome.segmentation.uncertainty is not None:
        _write_uncertainty(folder, outcome.scan, outcome.segmentation.uncertainty)


def _write_uncertainty(folder: Path, scan: Scan, bits: np.ndarray) -> None:
    """`<name>_uncertainty.nii.gz`, float32: 0 to 1 bit, see `inference.Segmentation`."""
    planes = (plane.astype(np.float32) for plane in file_planes(bits, scan.grid))
    write_nifti(folder / f"{scan.name}_uncertainty.nii.gz", planes, scan.grid, np.dtype(np.float32))


def picture(outcome: Outcome, slices: int = 4) -> Figure:
    """Some slices of a scan with what was found in them, and where the model is unsure if that was kept.

    Raises SegkitError for a scan that was not segmented.
    """
    scan, found = outcome.scan, outcome.segmentation
    if scan is None or found is None:
        raise SegkitError(f"{outcome}; {'; '.join(map(str, outcome.findings.errors))}")
    chosen = spread_slices(found.codes, Part(scan.name), slices)
    samples = [sample(scan, z, found.codes.at(z)) for z in chosen]
    return plot_slices(samples, () if found.uncertainty is None else list(found.uncertainty[chosen]))
