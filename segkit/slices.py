"""Staged subjects -> batches of axial slices with their label codes, as they lie in the store."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from segkit.splits import Part
from segkit.staging import StagedSubject

AIR_HU = -1024
MOST_TURNS = 4.0
"""Of a structure that few subjects annotate; more would show the same few again and again."""


@dataclass(frozen=True)
class Targets:
    """Which structures each pixel belongs to, without a plane a structure.

    codes: int64 (B, H, W), of slabs (B, D, H, W). codebook: bool (B, K, C), `codebook[b, k]` the channels of code k in
    sample b. annotated: bool (B, C), the channels that take part in loss and scores. counted: bool (B, D), which
    slices of slabs take part in them; slices by themselves always do.
    """

    codes: torch.Tensor
    codebook: torch.Tensor
    annotated: torch.Tensor
    counted: torch.Tensor | None = None

    def by_slice(self, *planes: torch.Tensor) -> tuple[Any, ...]:
        """The N slices of slabs that count, one after the other, as Targets of slices; then the same of each of
        `planes`, (B, F, D, H, W) -> (N, F, H, W). Slices by themselves come back as they are.
        """
        if self.counted is None or self.codes.ndim == 3:
            return self, *planes
        chosen = self.counted.flatten().nonzero()[:, 0]
        sample = chosen // self.counted.shape[1]
        targets = Targets(self.codes.flatten(0, 1)[chosen], self.codebook[sample], self.annotated[sample])
        return targets, *(each.movedim(2, 1).flatten(0, 1).index_select(0, chosen) for each in planes)

    def dense(self) -> torch.Tensor:
        """One plane a channel, bool (B, C, H, W), of slabs (B, C, D, H, W). For references; training does without."""
        return torch.stack([table[codes] for table, codes in zip(self.codebook, self.codes, strict=True)]).movedim(
            -1, 1
        )


@dataclass(frozen=True)
class SliceBatch:
    """B slices, or slabs of D of them, on their own pixel grids, padded with air and background to one size.

    hu: int16 (B, P, Y, X), the slice and its neighbours from low to high, P odd; of slabs P = D. codes: int32
    (B, Y, X), of slabs (B, D, Y, X). counted: bool (B, D) as in Targets, D = 1 for slices. sizes: float32 (B, 2),
    rows and columns before padding. spacing_mm: float32 (B, 2), (y, x). codebook and annotated as in Targets.
    numbers: int64 (B,), places in the epoch's order.
    """

    hu: torch.Tensor
    codes: torch.Tensor
    counted: torch.Tensor
    sizes: torch.Tensor
    spacing_mm: torch.Tensor
    codebook: torch.Tensor
    annotated: torch.Tensor
    numbers: torch.Tensor

    def to(self, device: torch.device) -> SliceBatch:
        """The batch on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def pin_memory(self) -> SliceBatch:
        """The batch in memory that a GPU reads by itself; what a DataLoader calls."""
        return replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def at(self, places: Sequence[int]) -> SliceBatch:
        """The samples at these places."""
        return replace(self, **{f.name: getattr(self, f.name)[places] for f in fields(self)})

    def parts(self, count: int) -> list[SliceBatch]:
        """The batch in `count` parts of nearly equal size."""
        pieces = {f.name: getattr(self, f.name).tensor_split(count) for f in fields(self)}
        return [SliceBatch(**{name: pieces[name][i] for name in pieces}) for i in range(count)]

    def __len__(self) -> int:
        return len(self.hu)


class SliceDataset(Dataset):
    """The slices of `parts`, in the order of subjects and slices; `where[i]` is (subject, z) of item i.

    With `context` n each slice comes with the n below and the n above it, from the same scan whatever the part; at the
    ends of the scan the last slice is repeated.
    """

    depth = 1  # slices that an item labels

    def __init__(
        self,
        staged: Mapping[str, StagedSubject],
        parts: Sequence[Part],
        label_map: Mapping[str, int],
        context: int = 0,
    ):
        self.subjects = {part.subject: staged[part.subject] for part in parts}
        self.where = [(p.subject, z) for p in parts for z in p.slices(staged[p.subject].shape[0])]
        self.label_map = dict(label_map)
        self.context = context
        self.tables = {
            name: tuple(map(torch.from_numpy, subject.codebook.on_channels(label_map)))
            for name, subject in self.subjects.items()
        }

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index: int) -> dict:
        name, z = self.where[index]
        subject = self.subjects[name]
        codebook, annotated = self.tables[name]
        return {
            "hu": torch.from_numpy(self._planes(subject, z)),
            "codes": torch.from_numpy(subject.labels(z).codes.astype(np.int32)),
            "spacing_mm": subject.spacing_mm[1:],
            "codebook": codebook,
            "annotated": annotated,
        }

    def _planes(self, subject: StagedSubject, z: int) -> np.ndarray:
        last = subject.shape[0] - 1
        planes = [subject.hu(min(max(z + step, 0), last)) for step in range(-self.context, self.context + 1)]
        return np.stack(planes)

    def named(self, items: Iterable[int]) -> str:
        """Subjects and slices of `items` for a message, such as "s0001: 3, 17; s0004: 2"."""
        slices: dict[str, set[int]] = {}
        for subject, z in (self.where[item] for item in items):
            slices.setdefault(subject, set()).add(z)
        return "; ".join(f"{subject}: {', '.join(map(str, sorted(slices[subject])))}" for subject in sorted(slices))

    @cached_property
    def holds(self) -> np.ndarray:
        """Which channels occur in which slice, bool (slices, C): from the index made by staging, no volume is read."""
        table = np.zeros((len(self.where), len(self.label_map)), bool)
        by_subject: dict[str, dict[int, int]] = {}
        for place, (name, z) in enumerate(self.where):
            by_subject.setdefault(name, {})[z] = place
        for name, places in by_subject.items():
            for structure, runs in self.subjects[name].info["slices"].items():
                if structure in self.label_map:
                    there = [places[z] for start, stop in runs for z in range(start, stop) if z in places]
                    table[there, self.label_map[structure]] = True
        return table

    @cached_property
    def turns(self) -> np.ndarray:
        """How often a slice is drawn for each channel where it is drawn once for one that all annotate, float64 (C,).

        1 / (share of the slices that have it annotated), at most MOST_TURNS: of what a slice holds besides the
        structure that it was drawn for, only these slices teach anything.
        """
        slices = Counter(name for name, _ in self.where)
        known = sum(number * self.tables[name][1].double() for name, number in slices.items())
        return 1 / np.maximum(np.asarray(known) / len(self.where), 1 / MOST_TURNS)

    def order(self, seed: int, epoch: int, slices_per_epoch: int | None = None, balance: float = 0.0) -> list[int]:
        """The `epoch_order` of these slices."""
        holds, turns = (self.holds, self.turns) if balance else (None, None)
        return epoch_order(len(self), seed, epoch, slices_per_epoch, holds, balance, turns)


def collate(items: Sequence[tuple[int, dict]]) -> SliceBatch:
    """One SliceBatch from (number in the epoch, item) pairs, padded to the largest slice and the largest codebook."""
    rows, columns = (max(item["codes"].shape[axis] for _, item in items) for axis in (-2, -1))
    codes = max(len(item["codebook"]) for _, item in items)
    first = items[0][1]
    counted = [item.get("counted", torch.ones(1, dtype=torch.bool)) for _, item in items]
    batch = SliceBatch(
        hu=torch.full((len(items), len(first["hu"]), rows, columns), AIR_HU, dtype=torch.int16),
        codes=torch.zeros((len(items), *first["codes"].shape[:-2], rows, columns), dtype=torch.int32),
        counted=torch.stack(counted),
        sizes=torch.tensor([item["codes"].shape[-2:] for _, item in items], dtype=torch.float32),
        spacing_mm=torch.tensor([item["spacing_mm"] for _, item in items], dtype=torch.float32),
        codebook=torch.zeros((len(items), codes, first["codebook"].shape[1]), dtype=torch.bool),
        annotated=torch.stack([item["annotated"] for _, item in items]),
        numbers=torch.tensor([number for number, _ in items]),
    )
    for place, (_, item) in enumerate(items):
        y, x = item["codes"].shape[-2:]
        batch.hu[place, :, :y, :x] = item["hu"]
        batch.codes[place, ..., :y, :x] = item["codes"]
        batch.codebook[place, : len(item["codebook"])] = item["codebook"]
    return batch


def epoch_order(
    slices: int, seed: int, epoch: int, slices_per_epoch: int | None = None, holds: np.ndarray | None = None,
    balance: float = 0.0, turns: np.ndarray | None = None,
) -> list[int]:  # fmt: skip
    """Which slices an epoch takes, in which order: `slices_per_epoch` of them, all by default.

    A share `balance` of them is drawn so that every structure of `holds` (bool (slices, C), `SliceDataset.holds`) is
    the reason for equally many, or in proportion to `turns` (float (C,), `SliceDataset.turns`); a slice of a rare
    structure may then come several times. That a slice holds none is one more reason: what no structure looks like is
    learned, too. The others come from shuffled passes over all slices. The order is a function of these arguments
    alone, so that an interrupted epoch can go on.
    """
    wanted = slices if slices_per_epoch is None else slices_per_epoch
    random = np.random.default_rng((seed, epoch))
    balanced = round(wanted * balance) if balance and holds is not None and holds.any() else 0
    order = _in_passes(np.arange(slices), wanted - balanced, random)
    if balanced and holds is not None:
        turns = np.ones(holds.shape[1]) if turns is None else turns
        order = random.permutation(np.concatenate([order, _balanced_slices(holds, turns, balanced, random)]))
    return order.tolist()


def _balanced_slices(holds: np.ndarray, turns: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` slices, reason by reason, each going through its own slices in shuffled passes.

    Every reason that there is has its share of them, rounded up or down by chance.
    """
    reasons = np.concatenate([holds, ~holds.any(1, keepdims=True)], 1)
    there = random.permutation(np.flatnonzero(reasons.any(0)))
    upto = np.append(turns, 1.0)[there].cumsum()
    ends = np.floor(upto / upto[-1] * count + random.random()).clip(max=count).astype(int)
    numbers = np.diff(ends, prepend=0)
    return np.concatenate(
        [_in_passes(np.flatnonzero(reasons[:, r]), n, random) for r, n in zip(there, numbers, strict=True)]
    )


def _in_passes(slices: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` of these slices: as many shuffled passes over all of them as it takes, the last one not to its end."""
    passes = [random.permutation(slices) for _ in range(-(-count // len(slices)))]
    return np.concatenate([*passes, np.zeros(0, int)])[:count]


class _Numbered(Dataset):
    """Gives each item its number in the order, from which its random stream is derived."""

    def __init__(self, dataset: SliceDataset, order: Sequence[int]):
        self.dataset, self.order = dataset, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> tuple[int, dict]:
        return number, self.dataset[self.order[number]]


def batches(
    dataset: SliceDataset,
    order: Sequence[int],
    batch_size: int,
    workers: int = 0,
    start: int = 0,
    share: Callable[[list[range]], Any] = list,
    device: torch.device | None = None,
) -> DataLoader:
    """Batches of `dataset` in the given order, from its place `start` on.

    `workers` processes read ahead, each with its own handle on the store; 0 reads in this process, which decompresses
    some thousand slices a second. `share` takes of the batches, each given by the places in the order that it holds,
    what this process computes (`segkit.ranks`); all by default. For a `device` that is a GPU they lie in memory that it
    reads by itself.
    """
    whole = [range(at, min(at + batch_size, len(order))) for at in range(start, len(order), batch_size)]
    return DataLoader(
        _Numbered(dataset, order),
        batch_sampler=share(whole),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_leave_interrupts_to_the_parent,
        pin_memory=device is not None and device.type == "cuda",
    )


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; a worker that dies of it loses a batch
