"""Staged subjects -> batches of axial slices with their label codes, as they lie in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from segkit.staging import StagedSubject
from segkit.subjects import Part

AIR_HU = -1024


@dataclass(frozen=True)
class Targets:
    """Which structures each pixel belongs to, without a plane a structure.

    codes: int64 (B, H, W). codebook: bool (B, K, C), `codebook[b, k]` the channels of code k in sample b. annotated:
    bool (B, C), the channels that take part in loss and scores.
    """

    codes: torch.Tensor
    codebook: torch.Tensor
    annotated: torch.Tensor

    def dense(self) -> torch.Tensor:
        """One plane a channel, bool (B, C, H, W). For references and scores; training does without it."""
        return torch.stack([table[codes] for table, codes in zip(self.codebook, self.codes, strict=True)]).movedim(
            -1, 1
        )


@dataclass(frozen=True)
class SliceBatch:
    """B slices on their own pixel grids, padded with air and background to one size.

    hu: int16 (B, Y, X). codes: int32 (B, Y, X). sizes: float32 (B, 2), rows and columns before padding. spacing_mm:
    float32 (B, 2), (y, x). codebook and annotated as in Targets. numbers: int64 (B,), places in the epoch's order.
    """

    hu: torch.Tensor
    codes: torch.Tensor
    sizes: torch.Tensor
    spacing_mm: torch.Tensor
    codebook: torch.Tensor
    annotated: torch.Tensor
    numbers: torch.Tensor

    def to(self, device: torch.device) -> SliceBatch:
        """The batch on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def __len__(self) -> int:
        return len(self.hu)


class SliceDataset(Dataset):
    """The slices of `parts`, in the order of subjects and slices; `where[i]` is (subject, z) of item i."""

    def __init__(self, staged: Mapping[str, StagedSubject], parts: Sequence[Part], label_map: Mapping[str, int]):
        self.subjects = {part.subject: staged[part.subject] for part in parts}
        self.where = [(p.subject, z) for p in parts for z in p.slices(staged[p.subject].shape[0])]
        self.tables = {
            name: tuple(map(torch.from_numpy, subject.labels(0).on_channels(label_map)))
            for name, subject in self.subjects.items()
        }

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index: int) -> dict:
        name, z = self.where[index]
        subject = self.subjects[name]
        codebook, annotated = self.tables[name]
        return {
            "hu": torch.from_numpy(subject.hu(z)),
            "codes": torch.from_numpy(subject.labels(z).codes.astype(np.int32)),
            "spacing_mm": subject.spacing_mm[1:],
            "codebook": codebook,
            "annotated": annotated,
        }


def collate(items: Sequence[tuple[int, dict]]) -> SliceBatch:
    """One SliceBatch from (number in the epoch, item) pairs, padded to the largest slice and the largest codebook."""
    rows, columns = (max(item["hu"].shape[axis] for _, item in items) for axis in (0, 1))
    codes = max(len(item["codebook"]) for _, item in items)
    batch = SliceBatch(
        hu=torch.full((len(items), rows, columns), AIR_HU, dtype=torch.int16),
        codes=torch.zeros((len(items), rows, columns), dtype=torch.int32),
        sizes=torch.tensor([item["hu"].shape for _, item in items], dtype=torch.float32),
        spacing_mm=torch.tensor([item["spacing_mm"] for _, item in items], dtype=torch.float32),
        codebook=torch.zeros((len(items), codes, items[0][1]["codebook"].shape[1]), dtype=torch.bool),
        annotated=torch.stack([item["annotated"] for _, item in items]),
        numbers=torch.tensor([number for number, _ in items]),
    )
    for place, (_, item) in enumerate(items):
        y, x = item["hu"].shape
        batch.hu[place, :y, :x] = item["hu"]
        batch.codes[place, :y, :x] = item["codes"]
        batch.codebook[place, : len(item["codebook"])] = item["codebook"]
    return batch


def epoch_order(slices: int, seed: int, epoch: int, slices_per_epoch: int | None = None) -> list[int]:
    """Which slices an epoch takes, in which order: shuffled passes over all of them, cut to `slices_per_epoch`.

    The order is a function of (seed, epoch), so that an interrupted epoch can be repeated.
    """
    wanted = slices if slices_per_epoch is None else slices_per_epoch
    random = np.random.default_rng((seed, epoch))
    passes = [random.permutation(slices) for _ in range(-(-wanted // slices))]
    return np.concatenate(passes)[:wanted].tolist()


class _Numbered(Dataset):
    """Gives each item its number in the order, from which its random stream is derived."""

    def __init__(self, dataset: SliceDataset, order: Sequence[int]):
        self.dataset, self.order = dataset, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> tuple[int, dict]:
        return number, self.dataset[self.order[number]]


def batches(dataset: SliceDataset, order: Sequence[int], batch_size: int, workers: int = 0) -> DataLoader:
    """Batches of `dataset` in the given order. `workers` processes read ahead; 0 reads in this process."""
    return DataLoader(
        _Numbered(dataset, order),
        batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )
