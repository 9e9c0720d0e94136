"""Which subjects train, validate and test: decided by subject, or by slabs of a single one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from segkit.errors import SegkitError
from segkit.labels import check_name

SPLITS = ("train", "val", "test")
SLAB_SLICES = 8
"""Thickness of the slabs into which a single subject is split, in slices."""


@dataclass(frozen=True)
class Part:
    """What a split uses of a subject: the whole of it, or the slices `start <= z < stop` of some slabs."""

    subject: str
    slabs: tuple[tuple[int, int], ...] | None = None

    def slices(self, total: int) -> list[int]:
        """The slice numbers, of `total` in the subject."""
        if self.slabs is None:
            return list(range(total))
        return [z for start, stop in self.slabs for z in range(start, min(stop, total))]

    def meets(self, other: Part) -> bool:
        """Whether the two have a slice in common."""
        if self.subject != other.subject or self.slabs is None or other.slabs is None:
            return self.subject == other.subject
        return any(max(start, begin) < min(stop, end) for start, stop in self.slabs for begin, end in other.slabs)


@dataclass(frozen=True)
class Split:
    """Which parts are for training, validation and test, and where that was decided."""

    train: tuple[Part, ...]
    val: tuple[Part, ...]
    test: tuple[Part, ...]
    source: str  # a sentence for the reader of split.json

    @property
    def test_name(self) -> str:
        """What scores of the test part are of: "val" where validation subjects stand in for missing test ones.

        Also where `test` is only some of them: epoch and thresholds were chosen on each.
        """
        return "val" if self.test and set(self.test) <= set(self.val) else "test"

    def to_json(self) -> dict:
        """Plain types for `split.json`."""
        parts = {name: [{"subject": p.subject, "slabs": p.slabs} for p in getattr(self, name)] for name in SPLITS}
        return {"source": self.source, **parts}

    @classmethod
    def from_json(cls, content: Mapping, source: str) -> Split:
        """The reverse of `to_json`. Raises SegkitError that names `source` for anything else."""
        try:
            train, val, test = (tuple(_part(part) for part in content[name]) for name in SPLITS)
            return cls(train, val, test, source=str(content["source"]))
        except (KeyError, TypeError, ValueError) as error:
            raise SegkitError(
                f"{source}: damaged: no split of train, val and test ({error!r}); train again to have it written"
            ) from error


def _part(content: Mapping) -> Part:
    """One part of a split. Raises KeyError, TypeError or ValueError (SegkitError is one) for anything else."""
    slabs = content["slabs"]
    if slabs is not None:
        slabs = tuple((start, stop) for start, stop in slabs)
        if not slabs or any(type(place) is not int for slab in slabs for place in slab):
            raise TypeError(f"slabs {str(slabs)[:60]}: expected pairs of whole numbers")
        if any(not 0 <= start < stop for start, stop in slabs):
            raise ValueError(f"slabs {str(slabs)[:60]}: expected slices from 0 on")
    return Part(check_name(content["subject"]), slabs)


def make_split(slices: Mapping[str, int], given: Mapping[str, str], seed: int = 0) -> Split:
    """Split subjects (name -> number of slices) by subject.

    `given`, the split that the data set gives (name -> split), decides where it says; who is not in it trains. Without
    validation subjects a seeded tenth of train (at least one) validates; without test subjects the validation subjects
    are the test. A single subject is cut into slabs of SLAB_SLICES slices, in turn for training and for validation and
    test. Raises SegkitError where no subject is left to train.
    """
    names = sorted(slices)
    if not names:
        raise SegkitError("no subject to split: none could be staged")
    if len(names) == 1:
        return _split_into_slabs(names[0], slices[names[0]])
    by_split = {split: [name for name in names if given.get(name, "train") == split] for split in SPLITS}
    source = "given by the data set" if any(name in given for name in names) else f"drawn with seed {seed}"
    if not by_split["train"]:
        raise SegkitError(
            f"the data set gives none of the {len(names)} usable subjects to train, only to validate or test: have "
            "some of its training subjects there, or say another split in its meta.csv"
        )
    if not by_split["val"]:
        if len(by_split["train"]) == 1:
            by_split["val"] = by_split["test"]
            source += "; no subject left for validation: the test subjects validate"
        else:
            drawn = by_split["train"][:]
            random.Random(f"{seed} split").shuffle(drawn)
            by_split["val"] = sorted(drawn[: max(1, round(len(drawn) / 10))])
            by_split["train"] = sorted(set(by_split["train"]) - set(by_split["val"]))
            source += f"; validation drawn from train with seed {seed}"
    if not by_split["test"]:
        by_split["test"] = by_split["val"]
        source += "; no test subjects: the validation subjects are the test"
    train, val, test = (tuple(Part(name) for name in by_split[split]) for split in SPLITS)
    return Split(train, val, test, source=source)


def _split_into_slabs(name: str, slices: int) -> Split:
    slabs = [(start, min(start + SLAB_SLICES, slices)) for start in range(0, slices, SLAB_SLICES)]
    if len(slabs) < 2:
        raise SegkitError(
            f"subject {name} is the only one and has {slices} slices: too few to train on some and validate on others; "
            f"give at least two subjects, or one with more than {SLAB_SLICES} slices"
        )
    train, held_out = (Part(name, tuple(slabs[first::2])) for first in (0, 1))
    source = f"one subject: slabs of {SLAB_SLICES} slices, in turn for training and for validation and test"
    return Split((train,), (held_out,), (held_out,), source)
