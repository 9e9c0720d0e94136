"""What a model was trained on, as its run's split.json says, and what of a test it can therefore not be judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from segkit.errors import Finding, SegkitError
from segkit.splits import Part, Split
from segkit.untrusted import read_json


@dataclass(frozen=True)
class Learned:
    """The split of one training, and the bytes of each CT file, by which a scan is known again wherever it lies."""

    ct_bytes: dict[str, int]
    split: Split

    def to_json(self) -> dict:
        """Plain types for `split.json`."""
        return {"ct_bytes": self.ct_bytes, **self.split.to_json()}

    def is_same(self, subject: str, ct_bytes: Mapping[str, int]) -> bool:
        """Whether the subject of a data set with these CT files is the one of that name here."""
        return subject in ct_bytes and self.ct_bytes.get(subject) == ct_bytes[subject]

    def parts(self, chosen_by: bool) -> tuple[Part, ...]:
        """What was trained on, with `chosen_by` also what epoch and thresholds were chosen by."""
        return (*self.split.train, *self.split.val) if chosen_by else self.split.train


@dataclass(frozen=True)
class RunSplit:
    """What `split.json` holds: where a run's data lay, its own training, and those of the weights it started from."""

    data_dir: Path
    own: Learned
    earlier: tuple[Learned | None, ...] = ()  # None of weights whose training nobody knows

    @property
    def learned(self) -> tuple[Learned | None, ...]:
        """All trainings of its model, the last first."""
        return (self.own, *self.earlier)

    def to_json(self) -> dict:
        """Plain types for `split.json`."""
        earlier = [None if each is None else each.to_json() for each in self.earlier]
        return {"data_dir": str(self.data_dir), **self.own.to_json(), "earlier": earlier}


def read_split(path: Path, remedy: str = "train again") -> RunSplit:
    """The reverse of `RunSplit.to_json`. Raises SegkitError that names `path` and ends with `remedy` for all else."""
    content = read_json(path, remedy)
    try:
        earlier = tuple(None if each is None else _learned(each, path) for each in content.get("earlier", []))
        run = RunSplit(Path(content["data_dir"]), _learned(content, path), earlier)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SegkitError(f"{path}: damaged ({error}); {remedy}") from error
    if not run.own.split.test:
        raise SegkitError(f"{path}: names no test subject; {remedy}")
    return run


def _learned(content: Mapping, path: Path) -> Learned:
    return Learned({**content["ct_bytes"]}, Split.from_json(content, str(path)))


def learned_by(path: Path, remedy: str = "train again") -> tuple[Learned | None, ...]:
    """The trainings of the models beside the split.json at `path`, the last first; None where it is not there."""
    return read_split(path, remedy).learned if path.is_file() else (None,)


def without_seen(
    split: Split, ct_bytes: Mapping[str, int], learned: Sequence[Learned | None], source: Path
) -> tuple[Split, list[Finding]]:
    """`split` without the test parts that a model has seen; findings that say so.

    ct_bytes: of the subjects of `split`. learned: the model's trainings, the last first; source: the split.json that
    says so, for messages. Where the test is of validation subjects anyhow, those of the model stay. Raises SegkitError
    where nothing is left.
    """
    findings = []
    if None in learned:
        lacks = "is missing" if learned[0] is None else "says that none lay beside its INIT_CHECKPOINT"
        text = f"{source} {lacks}: nobody knows here what the model was trained on; scores of that would be too good"
        findings.append(Finding("", "warning", "training not known", text))
    seen, alike = set[Part](), set[str]()
    for each in filter(None, learned):
        taken = each.parts(chosen_by=split.test_name != "val")
        for part in split.test:
            namesakes = [other for other in taken if other.subject == part.subject]
            if not each.is_same(part.subject, ct_bytes):
                alike |= {other.subject for other in namesakes}
            elif any(part.meets(other) for other in namesakes):
                seen.add(part)
    names = sorted({part.subject for part in seen})
    many = f"{len(seen)} of {len(split.test)} test subjects ({', '.join(names[:5])}{', ...' if names[5:] else ''})"
    if seen and len(seen) == len(split.test):
        raise SegkitError(
            f"{source}: the model was trained on, or chosen by, {many}: nothing is left to judge it by; give the "
            "OUTPUT_DIR of its own run, or the DATA_DIR of other scans"
        )
    if seen:
        text = f"{source}: the model was trained on, or chosen by, {many}: they are left out"
        findings.append(Finding("", "warning", "seen in training", text))
    if alike:
        text = (
            f"{len(alike)} test subjects are called like training subjects, such as {min(alike)}, with CT files of "
            "another size: taken for other scans. If they are the same ones, written anew, scores are too good"
        )
        findings.append(Finding("", "warning", "names of training", text))
    return replace(split, test=tuple(part for part in split.test if part not in seen)), findings
