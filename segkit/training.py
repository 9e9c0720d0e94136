"""Training: epochs of slices, validation after each, a checkpoint and a history after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from segkit import augment, losses
from segkit.augment import Augmentation
from segkit.checkpoints import save_checkpoint
from segkit.dataset import Data
from segkit.devices import autocast, fast_dtype, pick_device
from segkit.errors import SegkitError
from segkit.labels import mirrored_channels
from segkit.runs import start_run, write_json
from segkit.slices import SliceDataset, Targets, batches, epoch_order
from segkit.unet import UNet2D
from segkit.validation import as_row, validate


@dataclass(frozen=True)
class TrainSettings:
    """What a person changes. Stored with every checkpoint."""

    epochs: int = 5
    batch_size: int = 8  # slices
    learning_rate: float = 1e-3  # Adam's, at the start; it falls to 0 as (1 - step / steps) ** 0.9
    target_shape: tuple[int, int] = (256, 256)  # rows, columns: multiples of 16
    features: tuple[int, ...] = (32, 64, 128, 256)  # channels of the U-Net's levels
    positive_weight_cap: float = 100.0  # 1 is plain BCE, see losses.positive_weights
    augmentation: Augmentation = field(default_factory=Augmentation)
    context: int = 0  # neighbouring slices on each side that the network sees too: 1 gives 3 input channels
    slices_per_epoch: int | None = None  # None: all of them
    balance: float = (
        0.0  # share of an epoch's slices that is drawn so that rare structures come as often as common ones
    )
    validation_slices: int | None = None  # evenly spaced; None: all of them
    seed: int = 0
    device: str | None = None  # None: the best there is
    workers: int = 0  # processes that read slices ahead

    def checked(self) -> TrainSettings:
        """These settings with shapes as tuples, or SegkitError that names the first that makes no sense."""
        try:
            features = tuple(int(width) for width in self.features)
        except TypeError:
            raise SegkitError(f"FEATURES = {self.features!r}: expected whole numbers like (32, 64, 128, 256)") from None
        if not features or min(features) < 1 or features != tuple(self.features):
            raise SegkitError(f"FEATURES = {self.features!r}: expected whole numbers of 1 or more")
        target_shape = augment.check_target_shape(self.target_shape, len(features))
        if not isinstance(self.seed, int) or self.seed < 0:
            raise SegkitError(f"SEED = {self.seed!r}: expected a whole number of 0 or more")
        pick_device(self.device)
        for name in ("epochs", "batch_size", "slices_per_epoch", "validation_slices"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise SegkitError(f"{name.upper()} = {value!r}: expected a whole number of 1 or more")
        if not isinstance(self.context, int) or not 0 <= self.context <= 16:
            raise SegkitError(f"CONTEXT = {self.context!r}: expected a whole number of slices from 0 to 16")
        if not 0 <= self.balance <= 1:
            raise SegkitError(f"BALANCE = {self.balance!r}: expected a share from 0 to 1")
        if not self.learning_rate > 0:
            raise SegkitError(f"LEARNING_RATE = {self.learning_rate!r}: expected a number above 0")
        if not self.positive_weight_cap >= 1:
            raise SegkitError(f"POSITIVE_WEIGHT_CAP = {self.positive_weight_cap!r}: expected 1 (plain BCE) or more")
        return replace(self, target_shape=target_shape, features=features)


History = list[dict]
"""One dict an epoch: epoch, steps, learning_rate, train_loss, the columns of `validation.as_row`, seconds."""


def train(
    data: Data,
    settings: TrainSettings,
    output_dir: str | Path,
    on_epoch: Callable[[History], object] | None = None,
    progress: bool = True,
) -> History:
    """Train a U-Net on the training part of `data.split`, validate after each epoch, write what is named below.

    Files of an older run in `output_dir` move away first (`runs.start_run`). It gets label_map.json, split.json and
    settings.json at the start; checkpoint_epochX.pth and training_history.json after each epoch, when `on_epoch` is
    called too. Raises SegkitError for settings that make no sense and for a loss that is no longer a number.
    """
    settings = settings.checked()
    output_dir = Path(output_dir)
    network = {
        "in_channels": 2 * settings.context + 1,
        "out_channels": len(data.label_map),
        "features": list(settings.features),
    }
    trainer = _Trainer(data, settings, network)
    start_run(output_dir)  # only now, when nothing in the settings or data stops the new run
    write_json(output_dir / "label_map.json", data.label_map)
    write_json(output_dir / "split.json", data.split_to_json())
    write_json(output_dir / "settings.json", asdict(settings))
    history: History = []
    started = time.monotonic()
    for epoch in range(1, settings.epochs + 1):
        history.append(trainer.epoch(epoch, progress))
        scores = {name: value for name, value in history[-1].items() if name.startswith(("val_", "train_"))}
        path = output_dir / f"checkpoint_epoch{epoch}.pth"
        save_checkpoint(path, trainer.model.network, network, data.label_map, asdict(settings), epoch, scores)
        write_json(output_dir / "training_history.json", {"epochs": history, "validation": "target grid, val split"})
        if progress:
            left = (time.monotonic() - started) / epoch * (settings.epochs - epoch)
            print(epoch_line(history[-1], settings.epochs, left), flush=True)
        if on_epoch is not None:
            on_epoch(history)
    return history


def epoch_line(row: dict, epochs: int, seconds_left: float) -> str:
    """One epoch in one line, for a person who watches."""
    dice = (
        "no score" if row["val_dice"] is None else f"Dice {row['val_dice']:.3f} over {row['val_structures']} structures"
    )
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, validation loss {row['val_loss']:.4f}, {dice}, "
        f"{row['seconds']:.0f} s, {seconds_left / 60:.1f} min left"
    )


class _Trainer:
    """The model with its optimiser, data and step counter."""

    def __init__(self, data: Data, settings: TrainSettings, network: dict):
        self.settings = settings
        self.target_shape = settings.target_shape
        self.mirrored = mirrored_channels(data.label_map)
        self.device = pick_device(settings.device)
        self.dtype = fast_dtype(self.device)
        self.train_slices = SliceDataset(data.staged, data.split.train, data.label_map, settings.context)
        self.val_slices = SliceDataset(data.staged, data.split.val, data.label_map, settings.context)
        frequencies = losses.structure_frequencies(_train_voxels(data), data.label_map)
        weights = losses.positive_weights(frequencies, settings.positive_weight_cap)
        torch.manual_seed(settings.seed)
        unet = UNet2D(**network)
        losses.start_bias(unet.head, frequencies, weights)
        model = losses.ModelWithLoss(unet, weights.float())
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.model.parameters(), settings.learning_rate)
        in_epoch = settings.slices_per_epoch or len(self.train_slices)
        self.steps_total = settings.epochs * -(-in_epoch // settings.batch_size)
        decay = torch.optim.lr_scheduler.LambdaLR
        self.schedule = decay(self.optimizer, lambda step: max(1 - step / self.steps_total, 0) ** 0.9)

    def epoch(self, epoch: int, progress: bool) -> dict:
        """Train and validate one epoch; its row of the history."""
        started = time.monotonic()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        loss, steps = self._train(epoch, progress)
        s = self.settings
        validation = validate(
            self.model,
            self.val_slices,
            self.target_shape,
            self.dtype,
            s.batch_size,
            s.validation_slices,
            s.workers,
            progress,
        )
        if not np.isfinite(validation.loss):
            raise SegkitError(f"epoch {epoch}: the validation loss is {validation.loss}: lower LEARNING_RATE")
        return {
            "epoch": epoch,
            "steps": steps,
            "learning_rate": learning_rate,
            "train_loss": loss,
            **as_row(validation),
            "seconds": round(time.monotonic() - started, 2),
        }

    def _train(self, epoch: int, progress: bool) -> tuple[float, int]:
        s = self.settings
        order = epoch_order(
            len(self.train_slices),
            s.seed,
            epoch,
            s.slices_per_epoch,
            self.train_slices.holds if s.balance else None,
            s.balance,
        )
        loader = batches(self.train_slices, order, s.batch_size, s.workers)
        self.model.train()
        seen = []
        with tqdm(loader, desc=f"epoch {epoch}/{s.epochs}", unit="batch", disable=not progress) as bar:
            for batch in bar:
                variation = augment.draw(s.augmentation, s.seed, epoch, batch.numbers.tolist())
                inputs = augment.to_network(batch.to(self.device), self.target_shape, variation, self.mirrored)
                seen.append(self._step(*inputs))
                if not np.isfinite(seen[-1]):
                    where = sorted({self.train_slices.where[order[number]] for number in batch.numbers.tolist()})
                    raise SegkitError(
                        f"epoch {epoch}: the loss is {seen[-1]} at the slices {where[:4]}: lower LEARNING_RATE, or "
                        "look at these slices; checkpoints of earlier epochs are kept"
                    )
                bar.set_postfix(loss=f"{np.mean(seen[-50:]):.4f}")
        return float(np.mean(seen)), len(seen)

    def _step(self, images: torch.Tensor, targets: Targets) -> float:
        with autocast(self.device, self.dtype):
            loss = self.model(images.contiguous(memory_format=torch.channels_last), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def _train_voxels(data: Data) -> Iterator[tuple[Mapping[str, int], int]]:
    """Voxels of each structure and of the whole, of what the training part takes of each subject."""
    for part in data.split.train:
        subject = data.staged[part.subject]
        if part.slabs is None:
            yield subject.voxels, int(np.prod(subject.shape))
        else:
            zs = part.slices(subject.shape[0])
            volume = subject.labels()
            yield volume.with_codes(volume.codes[zs]).voxels(), len(zs) * int(np.prod(subject.shape[1:]))
