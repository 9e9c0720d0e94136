"""What a model was trained on, as its run's split.json says, and what of a test it can therefore not be judged by.

A scan is known again by its content, the checksums of its slices: whatever it is called, wherever it lies, and where
one scan is a piece of another.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from segkit.errors import Finding, SegkitError
from segkit.splits import Part, Split
from segkit.untrusted import read_json

COMMON_SLICES = 3
"""From so many slices in common on two scans are one, or pieces of one. Checksums of 32 bits agree by chance: among
those of 1,228 scans some pairs of single slices do, three of the same two scans do not."""

_HEX = re.compile(r"(?:[0-9a-f]{8})*")

Checksums = Mapping[str, Sequence[int]]
"""Of each subject the CRC-32 of each of its slices, as the store has them."""


@dataclass(frozen=True)
class Learned:
    """The split of one training, the bytes of each CT file, and the checksums of the slices of what it learned from.

    Files of older versions have no checksums: there a scan is known again by its name and the bytes of its file.
    """

    ct_bytes: dict[str, int]
    split: Split
    checksums: Checksums = field(default_factory=dict)

    def to_json(self, known: Checksums | None = None) -> dict:
        """Plain types for `split.json`; checksums as eight hexadecimal digits each, without those that are `known`."""
        content = {"ct_bytes": self.ct_bytes, **self.split.to_json()}
        if self.checksums:
            left = {name: own for name, own in self.checksums.items() if (known or {}).get(name) != own}
            content["checksums"] = {name: "".join(f"{each:08x}" for each in own) for name, own in left.items()}
        return content

    def is_same(self, subject: str, ct_bytes: Mapping[str, int]) -> bool:
        """Whether the subject of a data set with these CT files is the one of that name here."""
        return subject in ct_bytes and self.ct_bytes.get(subject) == ct_bytes[subject]

    def parts(self, chosen_by: bool) -> tuple[Part, ...]:
        """What was trained on, with `chosen_by` also what epoch and thresholds were chosen by."""
        return (*self.split.train, *self.split.val) if chosen_by else self.split.train


class Known:
    """Parts of scans by the checksums of their slices, to be asked which of them another one is a copy of.

    A slice that comes twice in its scan, as those without anything do, is none that a scan is known by.
    """

    def __init__(self, checksums: Checksums, parts: Iterable[Part] = ()):
        self.checksums = checksums
        self._parts: dict[Part, int] = {}  # with how many slices make a copy of it
        self._with: dict[int, list[Part]] = defaultdict(list)
        for part in parts:
            self.add(part)

    def add(self, part: Part) -> None:
        """Know one more part. Subjects without checksums are never found."""
        slices, enough = _telling(part, self.checksums)
        if part not in self._parts:
            self._parts[part] = enough
            for each in slices:
                self._with[each].append(part)

    def same_as(self, part: Part, checksums: Checksums) -> Part | None:
        """The first known part with COMMON_SLICES slices in common with `part`; of fewer slices, with all of them."""
        slices, enough = _telling(part, checksums)
        common = Counter(other for each in slices for other in self._with.get(each, ()))
        found = {other for other, number in common.items() if number >= min(enough, self._parts[other])}
        return next((other for other in self._parts if other in found), None) if found else None


def _telling(part: Part, checksums: Checksums) -> tuple[set[int], int]:
    """The checksums of the slices of a part that come once in their scan; how many of them make a copy."""
    own = checksums.get(part.subject, ())
    once = {each for each, number in Counter(own).items() if number == 1}
    slices = part.slices(len(own))
    return {own[z] for z in slices} & once, max(1, min(COMMON_SLICES, len(slices)))


def without_copies(split: Split, checksums: Checksums) -> tuple[Split, list[Finding]]:
    """`split` with each scan in one of its parts alone, and findings that name what was left out, or comes twice.

    What tests is left out of what validates and trains, what validates out of what trains: scores of a given test stay
    comparable. Where nothing would be left to train on or to validate with, the copies stay and a finding says so.
    """
    findings = []

    def note(part: Part, other: Part, what: str) -> None:
        text = f"subject {part.subject}: the same scan as {other.subject}, or a piece of it: {what}"
        findings.append(Finding(part.subject, "warning", "same scan twice", text))

    def apart(name: str, parts: tuple[Part, ...], judges: Iterable[Part]) -> tuple[Part, ...]:
        others = dict.fromkeys(judges)
        known = Known(checksums, others)
        same = {part: known.same_as(part, checksums) for part in parts if part not in others}
        left = tuple(part for part in parts if same.get(part) is None)
        for part, other in same.items():
            if other is None:
                continue
            kept = f"nothing else is there for {name}, so it stays, and scores are too good"
            note(part, other, f"left out of {name}" if left else kept)
        return left or parts

    val = apart("validation", split.val, split.test)
    train = apart("training", split.train, (*split.test, *val))
    for name, parts in (("training", train), ("validation", val), ("the test", split.test)):
        known = Known(checksums)
        for part in parts:
            other = known.same_as(part, checksums)
            if other is not None:
                note(part, other, f"it counts twice in {name}")
            known.add(part)
    return replace(split, train=train, val=val), findings


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
        # trainings one after the other on the same scans keep their checksums once
        earlier = [None if each is None else each.to_json(self.own.checksums) for each in self.earlier]
        return {"data_dir": str(self.data_dir), **self.own.to_json(), "earlier": earlier}


def read_split(path: Path, remedy: str = "train again") -> RunSplit:
    """The reverse of `RunSplit.to_json`. Raises SegkitError that names `path` and ends with `remedy` for all else."""
    content = read_json(path, remedy)
    try:
        own = _learned(content, path)
        earlier = [None if each is None else _learned(each, path, own.checksums) for each in content.get("earlier", [])]
        run = RunSplit(Path(content["data_dir"]), own, tuple(earlier))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SegkitError(f"{path}: damaged ({error}); {remedy}") from error
    if not run.own.split.test:
        raise SegkitError(f"{path}: names no test subject; {remedy}")
    return run


def _learned(content: Mapping, path: Path, known: Checksums | None = None) -> Learned:
    split = Split.from_json(content, str(path))
    checksums: dict[str, Sequence[int]] = {}
    for name, text in content.get("checksums", {}).items():
        if not isinstance(text, str) or not _HEX.fullmatch(text):
            raise ValueError(f"checksums of {str(name)[:60]}: expected eight hexadecimal digits for each slice")
        checksums[name] = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    if known and "checksums" in content:
        used = (part.subject for part in (*split.train, *split.val))
        checksums = {**{name: known[name] for name in used if name in known}, **checksums}
    return Learned({**content["ct_bytes"]}, split, checksums)


def learned_by(path: Path, remedy: str = "train again") -> tuple[Learned | None, ...]:
    """The trainings of the models beside the split.json at `path`, the last first; None where it is not there."""
    return read_split(path, remedy).learned if path.is_file() else (None,)


def without_seen(
    split: Split, checksums: Checksums, learned: Sequence[Learned | None], source: Path
) -> tuple[Split, list[Finding]]:
    """`split` without the test parts that a model has seen, by their content; findings that say so.

    checksums: of the slices of the test subjects. learned: the model's trainings, the last first; source: the
    split.json that says so, for messages. Where the test is of validation subjects anyhow, those of the model stay.
    Trainings of older versions, which have no checksums, are those of `without_seen_by_name`. Raises SegkitError where
    nothing is left.
    """
    seen: dict[Part, str] = {}
    names = set[str]()
    for each in learned:
        if each is None or not each.checksums:
            continue
        taken = each.parts(chosen_by=split.test_name != "val")
        known = Known(each.checksums, taken)
        for part in split.test:
            other = known.same_as(part, checksums)
            if other is not None:
                seen[part] = other.subject
            elif any(part.meets(own) for own in taken):
                names.add(part.subject)
    split, findings = _without(split, seen, source)
    return split, findings + _alike(names, "with another content")


def without_seen_by_name(
    split: Split, ct_bytes: Mapping[str, int], learned: Sequence[Learned | None], source: Path
) -> tuple[Split, list[Finding]]:
    """As `without_seen`, before anything is staged: by names and the bytes of CT files, where no more is known.

    ct_bytes: of the subjects of `split`. What nobody can know is among the findings.
    """
    findings = []
    if None in learned:
        lacks = "is missing" if learned[0] is None else "says that none lay beside its INIT_CHECKPOINT"
        text = f"{source} {lacks}: nobody knows here what the model was trained on; scores of that would be too good"
        findings.append(Finding("", "warning", "training not known", text))
    seen: dict[Part, str] = {}
    alike = set[str]()
    for each in learned:
        if each is None or each.checksums:
            continue
        taken = each.parts(chosen_by=split.test_name != "val")
        for part in split.test:
            namesakes = [other for other in taken if other.subject == part.subject]
            if not each.is_same(part.subject, ct_bytes):
                alike |= {other.subject for other in namesakes}
            elif any(part.meets(other) for other in namesakes):
                seen[part] = part.subject
    split, left_out = _without(split, seen, source)
    return split, findings + left_out + _alike(alike, "with CT files of another size")


def _alike(names: set[str], how: str) -> list[Finding]:
    """A finding about test subjects that have the names of training subjects, and are not the same scans."""
    if not names:
        return []
    text = (
        f"{len(names)} test subjects are called like training subjects, such as {min(names)}, {how}: taken for other "
        "scans. If they are the same ones, written anew or resampled, scores are too good"
    )
    return [Finding("", "warning", "names of training", text)]


def _without(split: Split, seen: Mapping[Part, str], source: Path) -> tuple[Split, list[Finding]]:
    """`split` without the test parts `seen`, each with the name under which a model knows it, and who they are."""
    if not seen:
        return split, []
    names = sorted({part.subject + ("" if part.subject == was else f", there {was}") for part, was in seen.items()})
    many = f"{len(seen)} of {len(split.test)} test subjects ({'; '.join(names[:5])}{'; ...' if names[5:] else ''})"
    if len(seen) == len(split.test):
        raise SegkitError(
            f"{source}: the model was trained on, or chosen by, {many}: nothing is left to judge it by; give the "
            "OUTPUT_DIR of its own run, or the DATA_DIR of other scans"
        )
    text = f"{source}: the model was trained on, or chosen by, {many}: they are left out"
    left = tuple(part for part in split.test if part not in seen)
    return replace(split, test=left), [Finding("", "warning", "seen in training", text)]
