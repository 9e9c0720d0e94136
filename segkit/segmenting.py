"""From planes on the network's grid to label codes on a scan's own pixels, a slice at a time.

A plane says of each pixel by how much a structure is there: above 0 it is. What is held at a time are one slice's
planes of the structures that occur in it, and of each only the part around where it occurs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from segkit import augment
from segkit.codes import CodeVolume, CodeWriter, encode_places, smallest_dtype
from segkit.slices import SliceBatch


@dataclass(frozen=True)
class _Axis:
    """Where the pixels of a slice lie along one axis of the network's grid; arrays of length n."""

    place: np.ndarray  # rising, in pixels of the network; 0 is the middle of its first
    low: np.ndarray  # int64: the pixels between which it lies
    high: np.ndarray
    share: np.ndarray  # float32, 0 to 1: how far from low to high

    def weights(self, side: int) -> torch.Tensor:
        """The same as a matrix (n, side): what each of `side` pixels of the network gives to a pixel of the slice."""
        matrix, pixels = torch.zeros(len(self.low), side), torch.arange(len(self.low))
        matrix[pixels, torch.from_numpy(self.low)] = torch.from_numpy(1 - self.share)
        matrix[pixels, torch.from_numpy(self.high)] += torch.from_numpy(self.share)
        return matrix

    def reach(self, highest: np.ndarray) -> slice:
        """The pixels that interpolation can raise above 0, given the highest value at each place of the network."""
        above = np.flatnonzero(highest > 0)
        return slice(*np.searchsorted(self.place, [above[0] - 1, above[-1] + 1], side="right").tolist())


class WayBack:
    """From the network's grid back to the pixels of the slices of a batch, all of one size: bilinear.

    The reverse of fitting in `segkit.augment.to_network` without variation; beyond the middle of the network's
    outermost pixels their values go on.
    """

    def __init__(self, batch: SliceBatch, target_shape: Sequence[int]):
        rows, columns = target_shape
        pixel = float(augment.pixel_mm(batch, (rows, columns))[0])
        sizes, spacing = batch.sizes[0].tolist(), batch.spacing_mm[0].tolist()
        self.rows, self.columns = (
            _axis(int(n), step / pixel, side) for n, step, side in zip(sizes, spacing, target_shape, strict=True)
        )

    def whole(self, plane: np.ndarray) -> np.ndarray:
        """A plane (H, W) float32 on the slice's own pixels (Y, X)."""
        return self._part(plane, slice(None), slice(None))

    def planes(self, planes: torch.Tensor) -> torch.Tensor:
        """Planes (C, H, W) on the slice's own pixels: float32 (C, Y, X), on their device."""
        rows, columns = (
            axis.weights(side).to(planes.device)
            for axis, side in zip((self.rows, self.columns), planes.shape[1:], strict=True)
        )
        return rows @ planes.float() @ columns.T

    def above(self, plane: np.ndarray) -> tuple[slice, slice, np.ndarray]:
        """The rows and columns of the slice outside of which a plane (H, W) is nowhere above 0, and its part there."""
        rows, columns = self.rows.reach(plane.max(1)), self.columns.reach(plane.max(0))
        return rows, columns, self._part(plane, rows, columns)

    def _part(self, plane: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        low, high, share = self.rows.low[rows], self.rows.high[rows], self.rows.share[rows, None]
        left, right = self.columns.low[columns], self.columns.high[columns]
        if not (len(low) and len(left)):
            return np.zeros((len(low), len(left)), np.float32)
        plane = plane[:, left[0] : right[-1] + 1]
        lines = plane[low]
        lines += share * (plane[high] - lines)
        part = lines.take(left - left[0], 1)
        part += self.columns.share[columns] * (lines.take(right - left[0], 1) - part)
        return part


def _axis(n: int, step: float, side: int) -> _Axis:
    """`n` pixels, `step` of the network's pixels apart, centred on its `side` pixels."""
    place = np.clip((np.arange(n) + 0.5 - n / 2) * step + (side - 1) / 2, 0, side - 1)
    low = place.astype(np.int64)
    return _Axis(place, low, np.minimum(low + 1, side - 1), (place - low).astype(np.float32))


class Collector:
    """Collects the slices of a scan: the structures of each voxel, and the one that is most there."""

    def __init__(self, structures: Sequence[str], shape: tuple[int, int, int], best: bool = False):
        self.structures = tuple(structures)
        self._writer = CodeWriter(self.structures)
        self._codes = np.zeros(shape, np.uint8)
        self._voxels = np.zeros(1, np.int64)  # of each code
        self._best = np.zeros(shape, smallest_dtype(len(structures) + 1)) if best else None

    def add(self, z: int, planes: torch.Tensor, limits: torch.Tensor, way: WayBack) -> None:
        """Slice `z` from planes (C, H, W), a channel a structure: it is where its plane exceeds its limit (C,)."""
        limits = limits.to(planes.device)
        # interpolation never rises above the highest value: channels below their limit everywhere stay behind
        highest = planes.movedim(0, -1).amax(0).amax(0)  # in this order: channels lie last in memory
        occurring = (highest > limits).nonzero().flatten()
        above = (planes[occurring].float() - limits[occurring, None, None]).cpu().contiguous().numpy()
        best = None if self._best is None else self._best[z]
        found = encode_places(self._places(occurring.tolist(), above, way, best), self._codes.shape[1:])
        codes = self._writer.add(found)
        counts = np.bincount(codes.ravel(), minlength=len(self._writer.rows))
        counts[: len(self._voxels)] += self._voxels
        self._voxels = counts
        self._codes = self._codes.astype(smallest_dtype(len(counts)), copy=False)
        self._codes[z] = codes

    def _places(
        self, channels: list[int], above: np.ndarray, way: WayBack, best: np.ndarray | None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Each structure with where it is in the flat slice; in `best` (Y, X), 1 + the channel that is highest."""
        width = self._codes.shape[2]
        highest = None if best is None else np.zeros(best.shape, np.float32)
        for channel, plane in zip(channels, above, strict=True):
            rows, columns, part = way.above(plane)
            if best is not None and highest is not None:
                before = highest[rows, columns]
                best[rows, columns][part > before] = channel + 1
                np.maximum(before, part, out=before)
            row, column = np.divmod(np.flatnonzero(part > 0), max(part.shape[1], 1))
            yield self.structures[channel], (row + rows.start) * width + column + columns.start

    def finish(self) -> tuple[CodeVolume, np.ndarray | None]:
        """The codes of all slices, and the best structures where they are kept: 1 + their place among the structures,
        0 for background. The first structure is the best of several equal ones.
        """
        return self._writer.finish(self._codes, self._voxels), self._best


def mean_of(planes: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of planes of any floating type and one shape, float32; a single one as it is, in its own type."""
    if len(planes) == 1:
        return planes[0]
    total = planes[0].to(torch.float32, copy=True)
    for each in planes[1:]:
        total.add_(each)  # one of fewer bits needs no copy of more
    return total.div_(len(planes))


def entropy_bits(probabilities: torch.Tensor) -> torch.Tensor:
    """How unsure the least sure channel is: probabilities (C, ...) float32 -> 0 to 1 bit, (...). Changes what it gets.

    The entropy of a channel's yes or no, -p log2 p - (1 - p) log2 (1 - p). Of the mean probability of an ensemble
    (Lakshminarayanan et al. 2017, https://arxiv.org/abs/1612.01474) it is its total predictive uncertainty, the
    disagreement of the members included (Nair et al. 2020, https://doi.org/10.1016/j.media.2019.101557).
    """
    off = probabilities.sub_(0.5).abs_().amin(0)  # the entropy is highest where p is nearest to 0.5
    return torch.special.entr(torch.stack([0.5 + off, 0.5 - off])).sum(0) / math.log(2)
