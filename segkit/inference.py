"""Volume in, label codes out, on the scan's own grid: what networks say, a batch of slices or a window at a time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit, logit
from torch import nn
from tqdm.auto import tqdm

from segkit import augment
from segkit.checkpoints import Checkpoint
from segkit.cleaning import keep_largest
from segkit.codes import CodeVolume
from segkit.devices import autocast, pick_device
from segkit.errors import SegkitError
from segkit.labels import mirrored_channels
from segkit.memory import in_parts
from segkit.networks import on_device, precision
from segkit.segmenting import Collector, WayBack, entropy_bits, mean_of
from segkit.slabs import SlabDataset, window_starts, window_weights, windows
from segkit.slices import SliceBatch, SliceDataset, batches
from segkit.splits import Part
from segkit.staging import StagedSubject


@dataclass(frozen=True)
class Segmentation:
    """What a scan was found to hold, arrays (z, y, x) on its canonical grid.

    codes: the structures of each voxel. best: uint8 or uint16, 0 for background, else 1 + the place in
    `codes.structures` of the structure whose logit is highest above its threshold, for formats of one label a voxel.
    uncertainty: float16, 0 to 1 bit, of the least sure structure at each voxel: the entropy of its calibrated
    probability (`segmenting.entropy_bits`), computed on the network's grid; None where it was not asked for.
    """

    codes: CodeVolume
    best: np.ndarray
    uncertainty: np.ndarray | None = None


@dataclass(frozen=True)
class Calibrated:
    """How probabilities follow from a network's logits, see `segkit.calibration`; arrays (C,)."""

    threshold: np.ndarray  # of its output
    slope: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Calibrated:
        """That of a checkpoint; of one from before there was a calibration, its outputs as they are."""
        channels, found = len(checkpoint.label_map), checkpoint.calibration
        if found is None:
            return cls.none(channels)
        return cls(np.array(checkpoint.thresholds), np.array(found.slope), np.array(found.offset))

    @classmethod
    def none(cls, channels: int) -> Calibrated:
        """Take a network's outputs for probabilities, as they are."""
        return cls(np.full(channels, 0.5), np.ones(channels), np.zeros(channels))

    def probability(self, logits: torch.Tensor, channels: np.ndarray | slice = slice(None)) -> torch.Tensor:
        """Probabilities of logits (C, ...) of these channels: float32 of their shape, a new tensor."""
        shape = (-1, *(1,) * (logits.ndim - 1))
        slope, zero = (
            torch.as_tensor(values[channels], dtype=torch.float32, device=logits.device).view(shape)
            for values in (self.slope, self.offset - self.slope * logit(self.threshold))
        )
        return torch.addcmul(zero, logits.float(), slope).sigmoid_()

    def logit_of(self, logit_of_probability: np.ndarray) -> np.ndarray:
        """The logits that have a probability, given as its logit: (C,)."""
        return logit(self.threshold) + (logit_of_probability - self.offset) / self.slope


class Predictor:
    """Trained networks on their device, ready for volumes; the logits of several are averaged.

    A structure is where a network's output (the sigmoid of its logit) exceeds `threshold`: one for all, or one a
    channel (`Checkpoint.thresholds`). calibrations: of each network how probabilities follow from its outputs; without,
    the outputs themselves stand for them.
    """

    unflipped: tuple[Path, ...] = ()  # files of its networks that were trained without mirrored slices
    uncalibrated: tuple[Path, ...] = ()  # and of those from before probabilities were calibrated

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        label_map: Mapping[str, int],
        target_shape: tuple[int, int],
        threshold: float | Sequence[float] = 0.5,
        batch_size: int = 8,
        device: str | None = None,
        calibrations: Sequence[Calibrated] = (),
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise SegkitError(f"BATCH_SIZE = {batch_size!r}: expected a whole number of 1 or more")
        thresholds = _checked(threshold, len(label_map))
        self.asked_device = device
        self.device = pick_device(device)
        models = [model] if isinstance(model, nn.Module) else list(model)
        self.models = [on_device(each, self.device).eval() for each in models]
        self.label_map = dict(label_map)
        self.structures = tuple(sorted(label_map, key=label_map.__getitem__))
        rows, columns = target_shape
        self.target_shape = (rows, columns)  # the network itself refuses a shape that it cannot halve
        self.logit_thresholds = torch.tensor(logit(thresholds), dtype=torch.float32)
        self.calibrations = tuple(calibrations) or (Calibrated.none(len(label_map)),) * len(models)
        # the networks take turns with a batch: all of their logits together need the memory of one network's
        self.batch_size = max(1, batch_size // len(self.models))

    @classmethod
    def of(
        cls,
        checkpoints: Sequence[Checkpoint],
        threshold: float | Sequence[float] | None = None,
        batch_size: int = 8,
        device: str | None = None,
    ) -> Predictor:
        """Of `segkit.checkpoints.load_checkpoints`: one network or an ensemble.

        threshold: None for what validated best, of several the mean of their logits; else a structure is where its
        calibrated probability exceeds this, one for all or one a channel. Raises SegkitError that names the files where
        their structures or TARGET_SHAPE differ.
        """
        first = checkpoints[0]
        for other in checkpoints[1:]:
            if other.label_map != first.label_map or other.target_shape != first.target_shape:
                what = "TARGET_SHAPE" if other.label_map == first.label_map else "structures"
                raise SegkitError(
                    f"{first.path} and {other.path}: trained with different {what}; only networks that give the same "
                    "channels on the same grid can be averaged"
                )
        chosen = first.thresholds if len(checkpoints) == 1 else _mean_thresholds(checkpoints)
        predictor = cls(
            [checkpoint.model for checkpoint in checkpoints], first.label_map, first.target_shape, chosen, batch_size,
            device, [Calibrated.of(checkpoint) for checkpoint in checkpoints],
        )  # fmt: skip
        predictor.unflipped = tuple(checkpoint.path for checkpoint in checkpoints if not checkpoint.flipped)
        predictor.uncalibrated = tuple(checkpoint.path for checkpoint in checkpoints if checkpoint.calibration is None)
        if threshold is not None:
            predictor.cut_at(threshold)
        return predictor

    def cut_at(self, probability: float | Sequence[float]) -> None:
        """From now on a structure is where its calibrated probability exceeds this: one for all, or one a channel.

        Of an ensemble, where its mean logit exceeds the mean of what that probability is in its members' logits.
        """
        asked = logit(_checked(probability, len(self.label_map)))
        limits = [calibrated.logit_of(asked) for calibrated in self.calibrations]
        self.logit_thresholds = torch.tensor(np.mean(limits, 0), dtype=torch.float32)

    def __getstate__(self) -> dict:
        # through the CPU: another machine may not have this device
        return {**vars(self), "models": [copy.deepcopy(model).cpu() for model in self.models]}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.device = pick_device(self.asked_device)
        self.models = [on_device(model, self.device) for model in self.models]

    def predict(self, subject: StagedSubject, part: Part | None = None, progress: bool = False) -> CodeVolume:
        """Label codes of the slices of `part` (all of them by default): (slices, y, x) on the canonical grid.

        A slice gets the same codes whatever else is predicted with it.
        """
        wanted = (part or Part(subject.name)).slices(subject.shape[0])
        there = sorted(set(wanted))
        collector = Collector(self.structures, (len(there), *subject.shape[1:]))
        for place, members, way in self.slices(subject, there, progress=progress):
            collector.add(place, mean_of(members), self.logit_thresholds, way)
        volume, _ = collector.finish()
        return volume if wanted == there else volume.at(np.searchsorted(there, wanted))

    def segment(
        self,
        scan: Any,
        mirror: bool = False,
        largest: bool = False,
        uncertainty: bool = False,
        progress: bool = False,
    ) -> Segmentation:
        """All that the networks say of a scan: anything with the properties and methods of StagedSubject.

        mirror: the mean of what they say of each slice and of its mirror image, see `_compute`; twice the time.
        largest: of each structure its largest piece alone, see `segkit.cleaning`. uncertainty: keep how unsure they
        are. A slice is done before the next: memory grows with the voxels of the scan, not with them times the
        structures. Raises SegkitError for `mirror` with a network that was trained without mirrored slices.
        """
        if mirror:
            self.check_mirror()
        if uncertainty and self.uncalibrated:
            warnings.warn(
                f"{self.uncalibrated[0]}: has no calibrated probabilities (it was written by an earlier version, or "
                "before the first validation): how unsure it is comes from its outputs, which are mostly too high",
                stacklevel=2,
            )
        collector = Collector(self.structures, scan.shape, best=True)
        unsure = np.zeros(scan.shape, np.float16) if uncertainty else None
        for z, members, way in self.slices(scan, range(scan.shape[0]), mirror, progress):
            if unsure is not None:
                unsure[z] = way.whole(entropy_bits(self.probabilities(members)).cpu().numpy())
            collector.add(z, mean_of(members), self.logit_thresholds, way)
        codes, best = collector.finish()
        assert best is not None  # it was asked to keep it
        if largest:
            codes, best = keep_largest(codes, best)
        return Segmentation(codes, best, unsure)

    def predict_slices(self, subject: StagedSubject, slices: Sequence[int]) -> dict[int, CodeVolume]:
        """Label codes (y, x) of single slices, by slice number."""
        volume = self.predict(subject, Part(subject.name, tuple((z, z + 1) for z in slices)))
        return {z: volume.with_codes(codes) for z, codes in zip(slices, volume.codes, strict=True)}

    def check_mirror(self) -> None:
        """Raise SegkitError where a network was trained without mirrored slices: it takes them for what they are not.

        Anatomy is not symmetric. Averaged with the mirror image a model of the default settings lost the spleen and the
        gallbladder altogether (macro Dice 0.43 -> 0.39).
        """
        if self.unflipped:
            raise SegkitError(
                f"{self.unflipped[0]}: trained without mirrored slices, so that averaging with the mirror image harms "
                "it; leave mirror out (from a shell: --mirror), or train with AUGMENTATION = {'flip_left_right': True}"
            )

    def probabilities(
        self, members: Sequence[torch.Tensor], channels: np.ndarray | slice = slice(None)
    ) -> torch.Tensor:
        """Calibrated probabilities from each network's logits (C, ...): their mean, float32 of that shape.

        channels: which ones these are; all by default.
        """
        total = None
        for logits, calibrated in zip(members, self.calibrations, strict=True):
            probability = calibrated.probability(logits, channels)
            total = probability if total is None else total.add_(probability)
        assert total is not None  # there is a network
        return total.div_(len(members))

    def slices(
        self, subject: Any, slices: Sequence[int], mirror: bool = False, progress: bool = False
    ) -> Iterator[tuple[int, list[torch.Tensor], WayBack]]:
        """Each of `slices` of a subject or scan: its place among them, the logits (C, H, W) of each network on its own
        grid, and the way back to the slice's pixels.

        The networks take turns with each batch; memory for its logits in their own precision, a network each.
        """
        steps = tqdm(
            zip(*(self._logits(model, subject, slices, mirror) for model in self.models), strict=True),
            desc=f"predicting {subject.name}", unit="batch", leave=False, disable=not progress,
            total=-(-len(slices) // self.batch_size),
        )  # fmt: skip
        place = 0
        for step in steps:
            way = WayBack(step[0][1], step[0][0][0].shape[1:])
            for members in zip(*(logits for logits, _ in step), strict=True):
                yield place, list(members), way
                place += 1

    def _logits(
        self, model: nn.Module, subject: StagedSubject, slices: Sequence[int], mirror: bool = False
    ) -> Iterator[tuple[list[torch.Tensor], SliceBatch]]:
        """Logits (C, H, W) of each of `slices`, `batch_size` at a time in their order, and the batch that has their
        size.
        """
        parts = [Part(subject.name, tuple((z, z + 1) for z in slices))]
        depth = getattr(model, "depth", 1)
        if depth > 1:
            slabs = SlabDataset({subject.name: subject}, parts, self.label_map, depth, windows)
            yield from self._blend(model, slabs, slices, mirror)
            return
        data = SliceDataset({subject.name: subject}, parts, self.label_map, getattr(model, "in_channels", 1) // 2)
        count = 1  # of parts of a batch, more once memory ran out
        for batch in batches(data, range(len(data)), self.batch_size, device=self.device):
            logits, count = self._run(model, batch, mirror, data, count)
            yield logits, batch

    def _blend(
        self, model: nn.Module, data: SlabDataset, slices: Sequence[int], mirror: bool
    ) -> Iterator[tuple[list[torch.Tensor], SliceBatch]]:
        """As `_logits`, from overlapping windows; what is held at a time are the slices of about two windows."""
        total, depth = len(next(iter(data.in_part.values()))), data.depth
        weights = dict(zip(window_starts(total, depth), window_weights(total, depth).tolist(), strict=True))
        starts = [start for start, _ in data.reach]
        left = [slices[i : i + self.batch_size] for i in range(0, len(slices), self.batch_size)][::-1]
        sums: dict[int, torch.Tensor] = {}
        count = 1
        for batch in batches(data, range(len(data)), max(1, self.batch_size // depth), device=self.device):
            of_batch, count = self._run(model, batch, mirror, data, count)
            for number, logits in zip(batch.numbers.tolist(), of_batch, strict=True):
                start = starts[number]
                for z in range(start, min(start + depth, total)):
                    if data.in_part[data.where[number][0]][z]:
                        share = weights[start][z] * logits[:, z - start].float()
                        sums[z] = sums[z] + share if z in sums else share
            following = batch.numbers[-1].item() + 1
            done = starts[following] if following < len(starts) else total
            while left and left[-1][-1] < done:
                yield [sums.pop(z) for z in left.pop()], batch

    def _run(
        self, model: nn.Module, batch: SliceBatch, mirror: bool, data: SliceDataset, parts: int
    ) -> tuple[list[torch.Tensor], int]:
        """The items that `_compute` gives in the precision of the network, or in float32 where that overflows; and in
        how many parts: more than `parts` where memory asks for it.

        SegkitError that names the slices of `data` where the logits are NaN or infinite all the same: no structure
        exceeds its threshold by NaN, and the scan would seem empty.
        """
        for dtype in dict.fromkeys((precision(model, self.device), torch.float32)):
            computed, parts = in_parts(partial(self._compute, model, mirror, dtype), batch, parts)
            # in one pass: neither where any is not
            if all(logits.sum(dtype=torch.float32).isfinite() for logits in computed):
                return [logits for part in computed for logits in part], parts
        raise SegkitError(
            f"the network's output is not finite at the slices {data.named(batch.numbers.tolist())}; take another "
            "checkpoint, of an earlier epoch or of a training with a lower LEARNING_RATE"
        )

    @torch.no_grad()
    def _compute(self, model: nn.Module, mirror: bool, dtype: torch.dtype, batch: SliceBatch) -> torch.Tensor:
        """Logits on the network's grid, (B, C, H, W), of slabs (B, C, D, H, W), convolutions in `dtype`.

        With `mirror` the mean of these and of those of the mirrored image, turned back, with the channels of left and
        right swapped (`labels.mirrored_channels`). A structure of one side that has no partner among the channels
        keeps what was said of the image as it is.
        """
        images, _ = augment.to_network(batch.to(self.device), self.target_shape)
        with autocast(self.device, dtype):
            logits = model(images.contiguous(memory_format=torch.channels_last))
            if not mirror:
                return logits
            turned = model(images.flip(-1).contiguous(memory_format=torch.channels_last)).flip(-1)
        logits, partners = logits.float(), mirrored_channels(self.label_map)
        paired = [channel for channel, partner in enumerate(partners) if partner is not None]
        both = (logits[:, paired] + turned[:, [partners[channel] for channel in paired]]) / 2
        return logits.index_copy(1, torch.tensor(paired, device=self.device), both)


def _checked(threshold: float | Sequence[float], channels: int) -> np.ndarray:
    """THRESHOLD for each of `channels`. Raises SegkitError unless it is one or as many, each between 0 and 1."""
    thresholds = np.asarray(threshold, float)
    if thresholds.ndim > 1 or thresholds.size not in (1, channels):
        raise SegkitError(
            f"THRESHOLD: expected one, or one for each of {channels} structures; found an array of the shape "
            f"{thresholds.shape}"
        )
    if not ((thresholds > 0) & (thresholds < 1)).all():
        raise SegkitError(f"THRESHOLD = {threshold!r}: expected a probability between 0 and 1")
    return np.broadcast_to(thresholds, channels)


def _mean_thresholds(checkpoints: Sequence[Checkpoint]) -> tuple[float, ...]:
    """Of each channel: the probability at the mean of the members' thresholds in logits, as logits are averaged."""
    return tuple(expit(logit([checkpoint.thresholds for checkpoint in checkpoints]).mean(0)).tolist())


def round_trip(subject: StagedSubject, structures: tuple[str, ...], target_shape: tuple[int, int]) -> CodeVolume:
    """The reference itself after going through `target_shape` and back: what is lost by resampling alone.

    Of each pixel of the network's grid the share that a structure covers is brought back in the way of a prediction's
    logits; the structure is where more than half is covered. This is no bound of what a network can reach: its logits
    may tell more of where an edge lies in a pixel than the share does.
    """
    label_map = {name: channel for channel, name in enumerate(structures)}
    data = SliceDataset({subject.name: subject}, [Part(subject.name)], label_map)
    collector, limits = Collector(structures, subject.shape), torch.full((len(structures),), 0.5)
    for batch in batches(data, range(len(data)), 8):
        way = WayBack(batch, target_shape)
        for sample, z in enumerate(batch.numbers.tolist()):
            collector.add(z, augment.area_fractions(batch, target_shape, sample), limits, way)
    return collector.finish()[0]
