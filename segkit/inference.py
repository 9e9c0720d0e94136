"""Volume in, label codes out: on the scan's own grid, a batch of slices at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from segkit import augment
from segkit.codes import CodeVolume, CodeWriter, encode
from segkit.devices import autocast, fast_dtype, pick_device
from segkit.errors import SegkitError
from segkit.slices import SliceBatch, SliceDataset, batches
from segkit.staging import StagedSubject
from segkit.subjects import Part
from segkit.unet import UNet2D


class Predictor:
    """A trained network on its device, ready for volumes.

    A structure is where its probability exceeds `threshold`: one for all, or one a channel (`Checkpoint.thresholds`).
    """

    def __init__(
        self,
        model: UNet2D,
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
        self.dtype = fast_dtype(self.device)
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()
        self.label_map = dict(label_map)
        self.structures = tuple(sorted(label_map, key=label_map.get))
        self.target_shape = tuple(target_shape)  # the network itself refuses a shape that it cannot halve
        self.logit_thresholds = torch.tensor(np.log(thresholds / (1 - thresholds)), dtype=torch.float32)
        self.batch_size = batch_size

    def __getstate__(self) -> dict:
        # through the CPU: another machine may not have this device
        return {**vars(self), "model": copy.deepcopy(self.model).cpu()}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.device = pick_device(self.asked_device)
        self.dtype = fast_dtype(self.device)
        self.model = self.model.to(self.device, memory_format=torch.channels_last)

    def predict(self, subject: StagedSubject, part: Part | None = None, progress: bool = False) -> CodeVolume:
        """Label codes of the slices of `part` (all of them by default): (slices, y, x) on the canonical grid."""
        context = self.model.in_channels // 2
        data = SliceDataset({subject.name: subject}, [part or Part(subject.name)], self.label_map, context)
        loader = batches(data, range(len(data)), self.batch_size)
        loader = tqdm(loader, desc=f"predicting {subject.name}", unit="batch", leave=False, disable=not progress)
        pieces = ((self.structures, self._above(batch), batch) for batch in loader)
        return _gather(pieces, self.structures)

    def predict_slices(self, subject: StagedSubject, slices: Sequence[int]) -> dict[int, CodeVolume]:
        """Label codes (y, x) of single slices, by slice number."""
        volume = self.predict(subject, Part(subject.name, tuple((z, z + 1) for z in slices)))
        return {z: volume.with_codes(codes) for z, codes in zip(slices, volume.codes, strict=True)}

    @torch.no_grad()
    def _above(self, batch: SliceBatch) -> torch.Tensor:
        """By how much the logits exceed the thresholds, (B, C, H, W) float32 on the network's grid."""
        images, _ = augment.to_network(batch.to(self.device), self.target_shape)
        with autocast(self.device, self.dtype):
            logits = self.model(images.contiguous(memory_format=torch.channels_last)).float()
        return logits - self.logit_thresholds.to(self.device)[:, None, None]


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
