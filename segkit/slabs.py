"""Slabs: slices in a row that a 3D network takes and labels together, from the same store as single slices.

A slab may reach over slices outside of its part, and over the ends of a scan that is shorter, where the last slice is
repeated. The image is there, as it is for neighbours by CONTEXT; the labels are not: such slices have no codes and do
not count, neither in the loss nor in the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from segkit.settings import TrainSettings
from segkit.slices import SliceDataset
from segkit.splits import Part
from segkit.staging import StagedSubject

Layout = Callable[[Sequence[int], int, int], list[tuple[int, int, int]]]
"""(ascending slices of a part, slices of the scan, depth) -> (slice, start, first) of each slab: the slab that is laid
for `slice` takes `depth` slices from `start` on, of which those of the part from `first` on count."""


def around(slices: Sequence[int], total: int, depth: int) -> list[tuple[int, int, int]]:
    """A slab about each slice, moved inside at the ends of the scan: for training, where a slice is drawn."""
    return [(z, _inside(z - depth // 2, total, depth), 0) for z in slices]


def tiles(slices: Sequence[int], total: int, depth: int) -> list[tuple[int, int, int]]:
    """Slabs one after the other in which every slice counts once: for validation."""
    laid, stop = [], 0
    for z in slices:
        if z >= stop:
            start = _inside(z, total, depth)
            laid.append((z, start, z))
            stop = start + depth
    return laid


def windows(slices: Sequence[int], total: int, depth: int) -> list[tuple[int, int, int]]:
    """The `window_starts` of the scan that hold one of the slices: for inference."""
    held = [(start, [z for z in slices if start <= z < start + depth]) for start in window_starts(total, depth)]
    return [(inside[0], start, start) for start, inside in held if inside]


def window_starts(total: int, depth: int) -> list[int]:
    """Where the windows of a scan of `total` slices start: one every half window, the last one ends with the scan."""
    return [*range(0, total - depth, depth // 2), max(total - depth, 0)]


def window_weights(total: int, depth: int) -> np.ndarray:
    """How much each window says about each slice, float32 (windows, total): columns sum to 1.

    A Gaussian about the window's middle with an eighth of its depth as standard deviation, as nnU-Net (Isensee et al.
    2021, https://doi.org/10.1038/s41592-020-01008-z) and MONAI weigh overlapping windows: what a network says of a
    slice is better the more of its neighbours it sees.
    """
    from_middle = np.arange(total) - np.array(window_starts(total, depth))[:, None] - (depth - 1) / 2
    bell = np.exp(-0.5 * (from_middle / (depth / 8)) ** 2) * (np.abs(from_middle) < depth / 2)
    return (bell / bell.sum(0)).astype(np.float32)


def _inside(start: int, total: int, depth: int) -> int:
    return max(min(start, total - depth), 0)


class SlabDataset(SliceDataset):
    """Slabs of `depth` slices of `parts`; `where[i]` is (subject, z) of the slice for which slab i was laid.

    An item has codes (depth, Y, X) and `counted` (depth,); hu is the slab itself, without further neighbours.
    """

    def __init__(
        self,
        staged: Mapping[str, StagedSubject],
        parts: Sequence[Part],
        label_map: Mapping[str, int],
        depth: int,
        layout: Layout = around,
    ):
        super().__init__(staged, parts, label_map)
        self.depth = depth
        self.in_part = {name: np.zeros(subject.shape[0], bool) for name, subject in self.subjects.items()}
        for name, z in self.where:
            self.in_part[name][z] = True
        laid = [
            (name, *slab)
            for name, inside in self.in_part.items()
            for slab in layout(np.flatnonzero(inside).tolist(), len(inside), depth)
        ]
        self.where = [(name, z) for name, z, _, _ in laid]
        self.reach = [(start, first) for _, _, start, first in laid]

    def __getitem__(self, index: int) -> dict:
        name, _ = self.where[index]
        start, first = self.reach[index]
        subject, inside = self.subjects[name], self.in_part[name][start : start + self.depth]
        counted = inside & (np.arange(start, start + len(inside)) >= first)
        missing = self.depth - len(inside)  # a scan shorter than a slab
        slab = slice(start, start + self.depth)
        codes = subject.labels(slab).codes.astype(np.int32) * counted[:, None, None]
        codebook, annotated = self.tables[name]
        return {
            "hu": torch.from_numpy(np.pad(subject.hu(slab), ((0, missing), (0, 0), (0, 0)), mode="edge")),
            "codes": torch.from_numpy(np.pad(codes, ((0, missing), (0, 0), (0, 0)))),
            "counted": torch.from_numpy(np.pad(counted, (0, missing))),
            "spacing_mm": subject.spacing_mm[1:],
            "codebook": codebook,
            "annotated": annotated,
        }


def open_items(
    staged: Mapping[str, StagedSubject],
    parts: Sequence[Part],
    label_map: Mapping[str, int],
    settings: TrainSettings,
    layout: Layout = around,
) -> SliceDataset:
    """What the network of `settings` is trained on, an item a slice or a slab."""
    if settings.depth == 1:
        return SliceDataset(staged, parts, label_map, settings.context)
    return SlabDataset(staged, parts, label_map, settings.depth, layout)
