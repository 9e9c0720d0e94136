"""What is wrong with a data set: every subject read completely, all that is found in one table, nothing changed.

The files themselves are judged by `segkit.reading` and `segkit.formats` (damaged, other grid, not binary, HU range).
Here it is judged whether CT and labels can be true of a patient, and whether the subjects fit together.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
from scipy.ndimage import binary_dilation
from tqdm.auto import tqdm

from segkit.codes import CodeVolume
from segkit.errors import SEVERITIES, Finding, Findings, SegkitError
from segkit.formats.mask_files import MaskFiles
from segkit.formats.nifti import Grid
from segkit.labels import partner_of
from segkit.reading import read_ct, read_labels
from segkit.runs import write_csv
from segkit.subjects import Subject, find_subjects

AIR_HU = -920  # a block of air around the patient is below (the middle between its extremes), one of lungs above
MARGIN_MM = 10  # how far beyond the outline of the body is outside, and how far the wrong way round is clearly wrong
SIZEABLE_SHARE = 0.1  # of a structure's voxels: from here on it is reported what lies on padding or outside the body
BLOCK_MM = 5  # outline and padding are found on blocks of about this side
DIRECTIONS = 32  # in which the extent of the body is measured: its outline has so many sides
VERTEBRAE = [f"vertebrae_{part}{n + 1}" for part, most in zip("CTLS", (7, 12, 6, 1), strict=True) for n in range(most)]
"""From head to feet, all that the releases name."""


class Row(NamedTuple):
    """One row of the table. `value`: the number that the message is about, NaN where there is none."""

    subject: str
    severity: str
    kind: str
    structure: str
    message: str
    value: float


def audit(data_dir: str | Path, jobs: int | None = 1, progress: bool = True) -> pd.DataFrame:
    """Read every subject of a data set completely; one table of all that is found, the worst first, then by subject.

    Columns: subject, severity (one of SEVERITIES), kind, structure ("a + b" for two), message, value. Besides what
    `find_subjects` and `segkit.reading` report:

    | severity | kind | what | value |
    |---|---|---|---|
    | warning | on padding | SIZEABLE_SHARE of a structure or more lies where nothing was scanned: `_Places` | voxels |
    | warning | outside the body | that share lies more than MARGIN_MM outside the patient: `_Places` | voxels |
    | warning | swapped sides | a left structure, more than MARGIN_MM to the right of its partner | mm |
    | warning | vertebra order | a vertebra, more than MARGIN_MM above the next one upwards | mm |
    | warning | same mask | two mask files hold exactly the same voxels | voxels |
    | info | overlap | two structures share voxels | voxels |
    | warning | missing structures | not annotated here, but in at least half of the other subjects | how many |
    | warning | same scan | the CT has exactly the voxels of other subjects' CTs | how many others |

    A subject whose CT cannot be used is judged no further; of masks that cannot be used each is an error, and the
    others are judged. `jobs` subjects are read at a time, each with the memory of its CT, its codes and one mask;
    `jobs=None` leaves number and place of the workers to `joblib.parallel_config`. Raises SegkitError if the folder
    holds no subject or an unreadable table (see `find_subjects`), and for `jobs` below 1.
    """
    if jobs is not None and (not isinstance(jobs, int) or jobs < 1):
        raise SegkitError(f"JOBS = {jobs!r}: expected a whole number of 1 or more, or None")
    subjects, problems = find_subjects(data_dir)
    rows = [_row_of(problem) for problem in problems]
    scans: dict[str, list[Subject]] = {}
    results = joblib.Parallel(n_jobs=jobs, return_as="generator")(map(joblib.delayed(_audit_subject), subjects))
    bar = tqdm(zip(subjects, results, strict=True), "audit", len(subjects), unit="subject", disable=not progress)
    for subject, (found, digest) in bar:
        rows += found
        if digest is not None:
            scans.setdefault(digest, []).append(subject)
    rows += [*_missing_structures(subjects), *_same_scans(scans.values())]
    rows.sort(key=lambda row: (SEVERITIES.index(row.severity), row.subject))
    return pd.DataFrame(rows, columns=Row._fields).astype({"value": float})


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `audit` for people: severity, kind, number of findings and of subjects, example; the worst first."""
    groups = table.groupby(["severity", "kind"], sort=False)
    counts = groups.agg(findings=("kind", "size"), subjects=("subject", "nunique"), example=("message", "first"))
    counts = counts.reset_index()
    rank = [SEVERITIES.index(severity) for severity in counts["severity"]]  # among equals the most frequent first
    return counts.iloc[np.lexsort((-counts["findings"], rank))].reset_index(drop=True)


def as_text(table: pd.DataFrame) -> str:
    """`summary` in lines for a terminal."""
    if table.empty:
        return "nothing was found: no error, no warning, nothing to know"
    lines = [
        f"{row.severity:8}{row.kind}: {row.findings} in {row.subjects} subject{'s' * (row.subjects > 1)}\n"
        f"        {row.example}"
        for row in summary(table).itertuples()
    ]
    return "\n".join(lines)


def write_audit(table: pd.DataFrame, path: str | Path) -> Path:
    """Write the table of `audit` as CSV (`runs.write_csv`) and return its path."""
    return write_csv(path, table)


def _row_of(finding: Finding) -> Row:
    subject, severity, kind, structure, message = (
        text.encode("utf-8", "backslashreplace").decode()  # names on disk need not be UTF-8
        for text in (finding.subject, finding.severity, finding.kind, finding.structure, finding.message)
    )
    return Row(subject, severity, kind, structure, message, np.nan if finding.value is None else finding.value)


def _row(subject: Subject, kind: str, text: str, value: float, structure: str = "", severity: str = "warning") -> Row:
    return Row(subject.name, severity, kind, structure, f"subject {subject.name}: {text}", float(value))


def _audit_subject(subject: Subject) -> tuple[list[Row], str | None]:
    """What is found in one subject, and a hash of its HU on the canonical grid: None where the CT cannot be used."""
    findings = Findings(subject.name)
    read = read_ct(subject, findings)
    if read is None:
        return [_row_of(finding) for finding in findings], None
    hu, grid = read
    labels = read_labels(subject, grid, findings)
    hu, labels = grid.to_canonical(hu), labels.with_codes(grid.to_canonical(labels.codes))
    digest = hashlib.blake2b(str(hu.shape).encode())
    for plane in hu:
        digest.update(np.ascontiguousarray(plane).data)
    places = _Places.of(hu, labels, grid)
    judged = [check(subject, places) for check in (_misplaced, _wrong_way_round, _overlaps)]
    return [*map(_row_of, findings), *chain(*judged)], digest.hexdigest()


class _Blocks:
    """A volume (z, y, x) cut into blocks of about BLOCK_MM, two voxels or more a side where it has as many."""

    def __init__(self, shape: Sequence[int], spacing_mm: Sequence[float]):
        self.steps = [max(2, round(BLOCK_MM / side)) for side in spacing_mm]
        self.sides_mm = [step * side for step, side in zip(self.steps, spacing_mm, strict=True)]
        # a rest joins the last block
        self.starts = [np.arange(0, max(n - step, 0) + 1, step) for n, step in zip(shape, self.steps, strict=True)]
        edges = [np.append(starts, n) for n, starts in zip(shape, self.starts, strict=True)]
        self.centres_mm = [(e[1:] + e[:-1] - 1) / 2 * side for e, side in zip(edges, spacing_mm, strict=True)]

    def reduce(self, volume: np.ndarray, how: np.ufunc) -> np.ndarray:
        """One number a block."""
        for axis, starts in enumerate(self.starts):
            volume = how.reduceat(volume, starts, axis=axis)
        return volume

    def holding(self, *voxels: np.ndarray | int) -> tuple[np.ndarray, ...]:
        """The blocks that hold the voxels (z, y, x)."""
        ways = zip(voxels, self.steps, self.starts, strict=True)
        return tuple(np.minimum(along // step, len(starts) - 1) for along, step, starts in ways)


def _beyond_mm(body: np.ndarray, blocks: _Blocks) -> np.ndarray:
    """How many mm each block's centre lies beyond the convex outline of the body's blocks in its slice, inf without."""
    angles = np.arange(DIRECTIONS)[:, None, None] * (2 * np.pi / DIRECTIONS)
    (_, y, x), (_, height, width) = blocks.centres_mm, blocks.sides_mm
    along = np.cos(angles) * y[:, None] + np.sin(angles) * x  # (direction, y, x)
    to_corner = (abs(np.cos(angles)) * height + abs(np.sin(angles)) * width) / 2
    beyond = np.full(body.shape, np.inf)
    for plane, result in zip(body, beyond, strict=True):
        if plane.any():
            result[:] = (along - along[:, plane].max(1)[:, None, None] - to_corner).max(0)
    return beyond


@dataclass(frozen=True)
class _Places:
    """Where the structures lie, in voxels of each and in mm.

    The outline of the body is, slice by slice, the convex hull of all blocks that are neither air (below AIR_HU) nor
    padding. Inside it are the table, the space between the arms, an open mouth, and lungs and gas that the image cuts.
    Padding is what no scanner measured: blocks beyond that outline which hold one value only, of air or 0 (what tools
    fill with), and voxels of that value beside such blocks. Air that was cut to one value looks the same; in a CT whose
    air was cut to above AIR_HU everything counts as body.
    """

    labels: CodeVolume
    code_voxels: np.ndarray
    voxels: np.ndarray  # of each structure, as the next two
    on_padding: np.ndarray
    outside: np.ndarray  # more than MARGIN_MM beyond the outline
    centres_mm: dict[str, np.ndarray]  # of those that are there: to the right, to the front and up in the world

    @classmethod
    def of(cls, hu: np.ndarray, labels: CodeVolume, grid: Grid) -> _Places:
        blocks = _Blocks(hu.shape, grid.spacing_mm)
        low, high = blocks.reduce(hu, np.minimum), blocks.reduce(hu, np.maximum)
        filled = (low == high) & ((high < AIR_HU) | (high == 0))
        beyond_mm = _beyond_mm((low.astype(int) + high >= 2 * AIR_HU) & ~filled, blocks)
        filled &= beyond_mm > 0
        fills, near = np.unique(low[filled]), binary_dilation(filled, np.ones((3, 3, 3)))
        sums = np.zeros((6, len(labels.codebook)))
        for z, plane in enumerate(labels.codes):
            y, x = np.nonzero(plane)
            holding = blocks.holding(z, y, x)
            padded = near[holding] & np.isin(hu[z, y, x], fills)
            weights = (None, x, y, np.full(len(x), z), padded, beyond_mm[holding] > MARGIN_MM)
            sums += [np.bincount(plane[y, x], weight, sums.shape[1]) for weight in weights]
        voxels, *moments, on_padding, outside = sums @ labels.codebook
        there = np.flatnonzero(voxels)
        centres = grid.canonical_affine @ np.array([*moments, voxels])[:, there] / voxels[there]
        centres_mm = {labels.structures[s]: centre for s, centre in zip(there, centres[:3].T, strict=True)}
        return cls(labels, sums[0], voxels, on_padding, outside, centres_mm)


def _misplaced(subject: Subject, places: _Places) -> Iterator[Row]:
    columns = zip(places.labels.structures, places.voxels, places.on_padding, places.outside, strict=True)
    for name, voxels, on_padding, outside in columns:
        for kind, count, where in (
            ("on padding", on_padding, "on padding, where the CT was filled with one value"),
            ("outside the body", outside, f"more than {MARGIN_MM} mm outside the body"),
        ):
            if voxels and count >= SIZEABLE_SHARE * voxels:
                text = f"{name}: {count:.0f} of {voxels:.0f} voxels ({count / voxels:.0%}) lie {where}"
                yield _row(subject, kind, f"{text}; check that mask and CT belong together", count, name)
                break  # padding is outside, too: that says it all


def _wrong_way_round(subject: Subject, places: _Places) -> Iterator[Row]:
    """Pairs of which the first should lie to the left of the second, or below it, and does not."""
    centres = places.centres_mm
    sides = [(name, partner_of(name)) for name in centres if "left" in name.split("_")] + [("spleen", "liver")]
    upwards = list(pairwise(name for name in reversed(VERTEBRAE) if name in centres))
    for kind, axis, pairs, lies, whole in (
        ("swapped sides", 0, sides, "to the right of", "mirrored"),
        ("vertebra order", 2, upwards, "above", "upside down"),
    ):
        apart_mm = {(a, b): centres[a][axis] - centres[b][axis] for a, b in pairs if a in centres and b in centres}
        wrong = {pair: mm for pair, mm in apart_mm.items() if mm > MARGIN_MM}
        texts = [f"{a} lies {mm:.0f} mm {lies} {b}" for (a, b), mm in wrong.items()]
        if len(wrong) > max(1, len(apart_mm) / 2):
            text = f"the whole scan seems {whole}: check the affine; {len(wrong)} of {len(apart_mm)} pairs lie wrong"
            yield _row(subject, kind, f"{text}, such as: {texts[0]}", max(wrong.values()))
            continue
        for (pair, mm), text in zip(wrong.items(), texts, strict=True):
            yield _row(subject, kind, f"{text}: are the names exchanged, or is the affine wrong?", mm, " + ".join(pair))


def _overlaps(subject: Subject, places: _Places) -> Iterator[Row]:
    shared: Counter[tuple[int, int]] = Counter()
    for members, voxels in zip(places.labels.codebook, places.code_voxels.astype(int).tolist(), strict=True):
        shared.update(dict.fromkeys(combinations(np.flatnonzero(members).tolist(), 2), voxels))
    for (a, b), count in sorted(shared.items()):
        both = f"{places.labels.structures[a]} + {places.labels.structures[b]}"
        # in a label image a region may be all that there is of a larger one
        if count == places.voxels[a] == places.voxels[b] and isinstance(subject.labels, MaskFiles):
            yield _row(subject, "same mask", f"{both}: the same {count} voxels: is one a copy?", count, both)
        else:
            yield _row(subject, "overlap", f"{both}: share {count} voxels", count, both, severity="info")


def _missing_structures(subjects: Sequence[Subject]) -> Iterator[Row]:
    annotated = Counter(name for subject in subjects for name in subject.structures)
    for subject in subjects:
        # names that the subject lacks were all counted in others
        lacks = sorted(annotated.keys() - set(subject.structures))
        missing = [name for name in lacks if 2 * annotated[name] >= len(subjects) - 1]
        if not missing:
            continue
        own = [name for name in subject.structures if annotated[name] == 1]
        alike = [f"{like} for {name}" for name in missing for like in difflib.get_close_matches(name, own, 1)]
        hint = f"; misspelled? {_some(alike)}" if alike else ""
        text = (
            f"no mask of {len(missing)} structures that at least half of the other subjects annotate: {_some(missing)}"
        )
        text += f"; where one was looked for and is not there, add an empty mask{hint}"
        yield _row(subject, "missing structures", text, len(missing), missing[0] if len(missing) == 1 else "")


def _same_scans(groups: Iterable[Sequence[Subject]]) -> Iterator[Row]:
    for group in groups:
        splits = sorted({subject.split or "train" for subject in group})
        apart = f"they are in different splits ({', '.join(splits)}), so test scores would be too good"
        risk = apart if len(splits) > 1 else "split apart, they would make scores too good"
        for subject in group if len(group) > 1 else ():
            others = [other.name for other in group if other is not subject]
            yield _row(subject, "same scan", f"the same CT as {_some(others)}; {risk}: keep one", len(others))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
