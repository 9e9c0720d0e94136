"""Volume in, label codes out: on the scan's own grid, a batch of slices or a window of them at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, logit
from torch import nn
from tqdm.auto import tqdm

from segkit import augment
from segkit.checkpoints import Checkpoint
from segkit.codes import CodeVolume, CodeWriter, encode
from segkit.devices import autocast, pick_device
from segkit.errors import SegkitError
from segkit.networks import on_device, precision
from segkit.slabs import SlabDataset, window_starts, window_weights, windows
from segkit.slices import SliceBatch, SliceDataset, batches
from segkit.staging import StagedSubject
from segkit.subjects import Part


class Predictor:
    """Trained networks on their device, ready for volumes; the logits of several are averaged.

    A structure is where its probability exceeds `threshold`: one for all, or one a channel (`Checkpoint.thresholds`).
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        label_map: Mapping[str, int],
        target_shape: tuple[int, int],
        threshold: float | Sequence[float] = 0.5,
        batch_size: int = 8,
        device: str | None = None,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise SegkitError(f"BATCH_SIZE = {batch_size!r}: expected a whole number of 1 or more")
        if np.size(threshold) not in (1, len(label_map)):
            raise SegkitError(
                f"THRESHOLD: expected one, or one for each of {len(label_map)}; found {np.size(threshold)}"
            )
        thresholds = np.broadcast_to(np.asarray(threshold, float), len(label_map))
        if not ((thresholds > 0) & (thresholds < 1)).all():
            raise SegkitError(f"THRESHOLD = {threshold!r}: expected a probability between 0 and 1")
        self.asked_device = device
        self.device = pick_device(device)
        models = [model] if isinstance(model, nn.Module) else list(model)
        self.models = [on_device(each, self.device).eval() for each in models]
        self.label_map = dict(label_map)
        self.structures = tuple(sorted(label_map, key=label_map.get))
        self.target_shape = tuple(target_shape)  # the network itself refuses a shape that it cannot halve
        self.logit_thresholds = torch.tensor(logit(thresholds), dtype=torch.float32)
        self.batch_size = batch_size

    @classmethod
    def of(
        cls,
        checkpoints: Sequence[Checkpoint],
        threshold: float | Sequence[float] | None = None,
        batch_size: int = 8,
        device: str | None = None,
    ) -> Predictor:
        """Of `segkit.checkpoints.load_checkpoints`: one network or an ensemble.

        threshold: None for what validated best, of several the mean of their logits. Raises SegkitError that names the
        files where their structures or TARGET_SHAPE differ.
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
        models = [checkpoint.model for checkpoint in checkpoints]
        threshold = chosen if threshold is None else threshold
        return cls(models, first.label_map, first.target_shape, threshold, batch_size, device)

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
        steps = zip(*(self._logits(model, subject, there) for model in self.models), strict=True)
        steps = tqdm(
            steps, desc=f"predicting {subject.name}", unit="batch", leave=False, disable=not progress,
            total=-(-len(there) // self.batch_size),
        )  # fmt: skip
        pieces = ((self.structures, self._above([logits for logits, _ in step]), step[0][1]) for step in steps)
        volume = _gather(pieces, self.structures)
        return volume if wanted == there else volume.with_codes(volume.codes[np.searchsorted(there, wanted)])

    def predict_slices(self, subject: StagedSubject, slices: Sequence[int]) -> dict[int, CodeVolume]:
        """Label codes (y, x) of single slices, by slice number."""
        volume = self.predict(subject, Part(subject.name, tuple((z, z + 1) for z in slices)))
        return {z: volume.with_codes(codes) for z, codes in zip(slices, volume.codes, strict=True)}

    def _above(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """By how much the mean of the networks' logits (B, C, H, W) exceeds the thresholds, on the network's grid."""
        mean = logits[0] if len(logits) == 1 else sum(logits) / len(logits)
        return mean - self.logit_thresholds.to(self.device)[:, None, None]

    def _logits(
        self, model: nn.Module, subject: StagedSubject, slices: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, SliceBatch]]:
        """Logits (B, C, H, W) of `slices`, `batch_size` at a time in their order, and the batch that has their size."""
        parts = [Part(subject.name, tuple((z, z + 1) for z in slices))]
        depth = getattr(model, "depth", 1)
        if depth > 1:
            data = SlabDataset({subject.name: subject}, parts, self.label_map, depth, windows)
            yield from self._blend(model, data, slices)
            return
        data = SliceDataset({subject.name: subject}, parts, self.label_map, model.in_channels // 2)
        for batch in batches(data, range(len(data)), self.batch_size):
            yield self._run(model, batch), batch

    def _blend(
        self, model: nn.Module, data: SlabDataset, slices: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, SliceBatch]]:
        """As `_logits`, from overlapping windows; what is held at a time are the slices of about two windows."""
        total, depth = len(next(iter(data.in_part.values()))), data.depth
        weights = dict(zip(window_starts(total, depth), window_weights(total, depth).tolist(), strict=True))
        starts = [start for start, _ in data.reach]
        left = [slices[i : i + self.batch_size] for i in range(0, len(slices), self.batch_size)][::-1]
        sums: dict[int, torch.Tensor] = {}
        for batch in batches(data, range(len(data)), max(1, self.batch_size // depth)):
            for number, logits in zip(batch.numbers.tolist(), self._run(model, batch), strict=True):
                start = starts[number]
                for z in range(start, min(start + depth, total)):
                    if data.in_part[data.where[number][0]][z]:
                        share = weights[start][z] * logits[:, z - start]
                        sums[z] = sums[z] + share if z in sums else share
            following = batch.numbers[-1].item() + 1
            done = starts[following] if following < len(starts) else total
            while left and left[-1][-1] < done:
                yield torch.stack([sums.pop(z) for z in left.pop()]), batch

    @torch.no_grad()
    def _run(self, model: nn.Module, batch: SliceBatch) -> torch.Tensor:
        """Logits on the network's grid, float32 (B, C, H, W), of slabs (B, C, D, H, W)."""
        images, _ = augment.to_network(batch.to(self.device), self.target_shape)
        with autocast(self.device, precision(model, self.device)):
            return model(images.contiguous(memory_format=torch.channels_last)).float()


def _mean_thresholds(checkpoints: Sequence[Checkpoint]) -> tuple[float, ...]:
    """Of each channel: the probability at the mean of the members' thresholds in logits, as logits are averaged."""
    return tuple(expit(logit([checkpoint.thresholds for checkpoint in checkpoints]).mean(0)).tolist())


def round_trip(subject: StagedSubject, structures: tuple[str, ...], target_shape: tuple[int, int]) -> CodeVolume:
    """The reference itself after going through `target_shape` and back: what the network's grid makes of it.

    Its masks on the network's grid are brought back in the way of a prediction's logits, as +1 inside and -1 outside.
    """
    held = [name for name in structures if subject.voxels.get(name)]
    label_map = {name: channel for channel, name in enumerate(held)}
    data = SliceDataset({subject.name: subject}, [Part(subject.name)], label_map)
    loader = batches(data, range(len(data)), 8)
    targets = ((augment.to_network(batch, target_shape)[1], batch) for batch in loader)
    return _gather(((held, target.dense().float() * 2 - 1, batch) for target, batch in targets), structures)


def _gather(
    pieces: Iterator[tuple[Sequence[str], torch.Tensor, SliceBatch]], structures: tuple[str, ...]
) -> CodeVolume:
    """Codes of all slices from (names of C channels, planes (B, C, H, W) that are above 0 inside, batch)."""
    writer = CodeWriter(structures)
    codes = []
    for channel_names, planes, batch in pieces:
        # interpolation never rises above the highest value: channels below 0 everywhere can stay behind
        occurring = (planes.amax((0, 2, 3)) > 0).nonzero().flatten()
        own = to_own_grid(planes[:, occurring], batch) > 0
        names = [channel_names[channel] for channel in occurring.tolist()]
        masks = zip(names, own.movedim(1, 0).cpu().numpy(), strict=True)
        codes.append(writer.add(encode(masks, (len(own), *own.shape[2:]))))
    return writer.finish(np.concatenate(codes))


def to_own_grid(planes: torch.Tensor, batch: SliceBatch) -> torch.Tensor:
    """Bring planes (B, C, H, W) on the network's grid back to the slices' own pixels: (B, C, Y, X), bilinear.

    The reverse of fitting in `segkit.augment.to_network` without variation. The slices are of one size.
    """
    device, target_shape = planes.device, planes.shape[2:]
    sizes, spacing = batch.sizes[0].tolist(), batch.spacing_mm[0].tolist()
    pixel = float(augment.pixel_mm(batch, target_shape)[0])
    axes = [
        ((torch.arange(int(n), device=device) + 0.5 - n / 2) * step / pixel + side / 2) * 2 / side - 1
        for n, step, side in zip(sizes, spacing, target_shape, strict=True)
    ]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([columns, rows], -1).expand(len(planes), -1, -1, -1)
    return F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)
