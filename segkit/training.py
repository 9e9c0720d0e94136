"""Training: epochs of slices, each with validation, a checkpoint and a history; resumed where it stopped."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from segkit import augment, losses, slabs
from segkit.checkpoints import TrainingState, load_checkpoint, load_state, save_checkpoint, save_state
from segkit.dataset import Data
from segkit.devices import autocast, pick_device
from segkit.errors import SegkitError
from segkit.labels import mirrored_channels
from segkit.networks import build_network, network_arguments, on_device, precision
from segkit.runs import start_run, sweep, write_json
from segkit.schedule import learning_rate, should_stop
from segkit.settings import TrainSettings, changed
from segkit.slices import SliceBatch, batches, epoch_order
from segkit.subjects import Split
from segkit.validation import as_row, validate

STATE_SECONDS = 300
"""How often the state is saved within an epoch, so that a killed training loses no more."""
STATE_FILE = "last_state.pth"
RESUMABLE = ("epochs", "early_stopping", "accumulate", "init_checkpoint", "device", "workers")
"""Settings that may differ when a training is resumed. Other EPOCHS bend the schedule from there on."""

History = list[dict]
"""One dict an epoch: epoch, steps, learning_rate, train_loss, the columns of `validation.as_row`, seconds."""


def train(
    data: Data,
    settings: TrainSettings,
    output_dir: str | Path,
    on_epoch: Callable[[History], object] | None = None,
    progress: bool = True,
    resume: bool = False,
) -> History:
    """Train a U-Net on the training part of `data.split`, validate after each epoch, write what is named below.

    Files of an older run in `output_dir` move away first (`runs.start_run`). It gets label_map.json, split.json and
    settings.json at the start; checkpoint_epochX.pth, training_history.json and last_state.pth after each epoch, when
    `on_epoch` is called too. With `resume` a training that was interrupted or killed goes on from its last_state.pth,
    to the same weights as if it had never stopped; where there is none, a new one starts. An interrupt (Ctrl-C, the
    stop button of a notebook) ends the training in order: what was learned is kept in a checkpoint.

    Raises SegkitError for settings that make no sense or differ from those of the training to resume, and for a loss
    that is no longer a number.
    """
    settings = settings.checked()
    output_dir = Path(output_dir)
    going_on = resume and (output_dir / STATE_FILE).is_file()
    trainer = _Trainer(data, settings, fresh=not going_on)
    if going_on:
        trainer.restore(load_state(output_dir / STATE_FILE), output_dir / STATE_FILE)
    else:
        start_run(output_dir)  # only now, when nothing in the settings or data stops the new run
        write_json(output_dir / "label_map.json", data.label_map)
        write_json(output_dir / "split.json", data.split_to_json())
    sweep(output_dir)
    write_json(output_dir / "settings.json", asdict(settings))
    started, done_before = time.monotonic(), len(trainer.history)
    try:
        while len(trainer.history) < settings.epochs and not should_stop(settings, trainer.history):
            trainer.epoch(output_dir / STATE_FILE, progress)
            _write_epoch(trainer, trainer.history, output_dir)
            save_state(output_dir / STATE_FILE, trainer.state())
            if progress:
                done = len(trainer.history)
                left = (time.monotonic() - started) / (done - done_before) * (settings.epochs - done)
                print(epoch_line(trainer.history[-1], settings.epochs, left), flush=True)
            if on_epoch is not None:
                on_epoch(trainer.history)
    except KeyboardInterrupt:
        return _keep_interrupted(trainer, output_dir)
    if progress and len(trainer.history) < settings.epochs:
        print(f"no better validation Dice for {settings.early_stopping} epochs: ended early")
    return trainer.history


def _write_epoch(trainer: _Trainer, history: History, output_dir: Path) -> None:
    row = history[-1]
    scores = {name: value for name, value in row.items() if name.startswith(("val_", "train_"))}
    scores["thresholds"] = list(trainer.thresholds)
    path = output_dir / f"checkpoint_epoch{row['epoch']}.pth"
    save_checkpoint(
        path,
        trainer.network,
        trainer.shape_of_network,
        trainer.label_map,
        asdict(trainer.settings),
        row["epoch"],
        scores,
    )
    write_json(output_dir / "training_history.json", {"epochs": history, "validation": "target grid, val split"})


def _keep_interrupted(trainer: _Trainer, output_dir: Path) -> History:
    """Keep what an unfinished epoch has learned, in the state to resume and as a checkpoint without a score."""
    if not trainer.seen:
        print("interrupted before the first step of an epoch: nothing new to keep")
        return trainer.history
    save_state(output_dir / STATE_FILE, trainer.state())
    row = {**trainer.training_row(), "val_loss": None, "val_dice": None, "val_structures": 0, "val_threshold": None}
    history = [*trainer.history, {**row, "interrupted": True}]
    _write_epoch(trainer, history, output_dir)
    print(
        f"interrupted in epoch {row['epoch']} after {row['steps']} steps; its weights are kept, RESUME = True goes on"
    )
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
    """The model with its optimiser and data, and how far it has come."""

    def __init__(self, data: Data, settings: TrainSettings, fresh: bool = True):
        self.settings, self.label_map, self.split = settings, data.label_map, data.split
        self.mirrored = mirrored_channels(data.label_map)
        self.device = pick_device(settings.device)
        self.train_slices = slabs.open_items(data.staged, data.split.train, data.label_map, settings)
        self.val_slices = slabs.open_items(data.staged, data.split.val, data.label_map, settings, slabs.tiles)
        frequencies = losses.structure_frequencies(_train_voxels(data), data.label_map)
        terms = losses.LOSSES[settings.loss]
        weights = losses.positive_weights(frequencies, settings.positive_weight_cap if terms.helped else 1.0)
        self.shape_of_network = network_arguments(settings, len(data.label_map))
        torch.manual_seed(settings.seed)
        self.network = build_network(**self.shape_of_network)
        self.dtype = precision(self.network, self.device)
        if terms.helped:
            losses.start_bias(self.network.head, frequencies, weights)
        if fresh and settings.init_checkpoint is not None:
            new = load_checkpoint(settings.init_checkpoint).start_network(self.network, self.label_map)
            if new:
                print(f"{settings.init_checkpoint} lacks {len(new)} structures, which start anew: {', '.join(new[:8])}")
        model = losses.ModelWithLoss(self.network, weights.float(), terms)
        self.model = on_device(model, self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), settings.learning_rate, fused=True)
        self.in_epoch = settings.slices_per_epoch or -(-len(self.train_slices) // settings.depth)
        self.history: History = []
        self.place = 0  # slices of the running epoch that were learned from
        self.seen: list[float] = []  # losses of its steps
        self.seconds = 0.0  # that it took before this process
        self.started = time.monotonic()
        self.thresholds: tuple[float, ...] = ()  # of each channel, from the last validation

    def state(self) -> TrainingState:
        """All that is needed to go on."""
        return TrainingState(
            settings=asdict(self.settings),
            label_map=dict(self.label_map),
            split=self.split.to_json(),
            history=self.history,
            slices=len(self.train_slices),
            place=self.place,
            seen=self.seen,
            seconds=time.monotonic() - self.started,
            thresholds=list(self.thresholds),
            model=self.network.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )

    def restore(self, state: TrainingState, path: Path) -> None:
        """Go on from a state. SegkitError that says in what it differs where it is not of this training."""
        differing = [name for name in changed(self.settings, state.settings) if name not in RESUMABLE]
        split = Split.from_json(state.split, str(path))
        same_split = replace(split, source=self.split.source) == self.split
        same_data = state.label_map == self.label_map and same_split
        if differing or not same_data or state.slices != len(self.train_slices):
            what = ", ".join(name.upper() for name in differing) or "the subjects, their structures or their split"
            raise SegkitError(
                f"{path}: cannot be resumed, these differ: {what}; set them as they were, or RESUME = False"
            )
        self.network.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        self.history, self.place, self.seen, self.seconds = state.history, state.place, state.seen, state.seconds
        self.thresholds = tuple(state.thresholds)

    def epoch(self, state_path: Path, progress: bool) -> None:
        """Train what is left of the running epoch, validate, and add its row to the history."""
        self.started = time.monotonic() - self.seconds
        self._train(state_path, progress)
        s = self.settings
        validation = validate(
            self.model,
            self.val_slices,
            s.target_shape,
            self.dtype,
            s.batch_size,
            s.validation_slices,
            s.workers,
            progress,
        )
        row = self.training_row()
        if not np.isfinite(validation.loss):
            raise SegkitError(f"epoch {row['epoch']}: the validation loss is {validation.loss}: lower LEARNING_RATE")
        row |= {**as_row(validation), "seconds": round(time.monotonic() - self.started, 2)}
        self.thresholds = validation.thresholds
        self.history, self.place, self.seen, self.seconds = [*self.history, row], 0, [], 0.0

    def training_row(self) -> dict:
        """The row of the running epoch as far as training goes."""
        return {
            "epoch": len(self.history) + 1,
            "steps": len(self.seen),
            "learning_rate": self._rate(0),
            "train_loss": float(np.mean(self.seen)),
        }

    def _rate(self, step: int) -> float:
        """The learning rate of a step of the running epoch."""
        in_epoch = -(-self.in_epoch // self.settings.batch_size)
        return learning_rate(
            self.settings, len(self.history) * in_epoch + step, self.settings.epochs * in_epoch, self.history
        )

    def _train(self, state_path: Path, progress: bool) -> None:
        s, epoch = self.settings, len(self.history) + 1
        holds = self.train_slices.holds if s.balance else None
        order = epoch_order(len(self.train_slices), s.seed, epoch, self.in_epoch, holds, s.balance)
        loader = batches(self.train_slices, order, s.batch_size, s.workers, self.place)
        self.model.train()
        saved = time.monotonic()
        bar = tqdm(
            loader, desc=f"epoch {epoch}/{s.epochs}", unit="batch", disable=not progress,
            initial=len(self.seen), total=len(self.seen) + len(loader),
        )  # fmt: skip
        with bar, _Interrupts() as interrupts:
            for batch in bar:
                numbers = batch.numbers.tolist()
                loss = self._step(batch, epoch)
                if not np.isfinite(loss):
                    where = sorted({self.train_slices.where[order[number]] for number in numbers})
                    raise SegkitError(
                        f"epoch {epoch}: the loss is {loss} at the slices {where[:4]}: lower LEARNING_RATE, or "
                        "look at these slices; checkpoints of earlier epochs are kept"
                    )
                self.seen.append(loss)
                self.place = numbers[-1] + 1
                bar.set_postfix(loss=f"{np.mean(self.seen[-50:]):.4f}")
                interrupts.check()
                if time.monotonic() - saved > STATE_SECONDS:
                    save_state(state_path, self.state())
                    saved = time.monotonic()

    def _annotated(self, batch: SliceBatch, epoch: int) -> torch.Tensor:
        """How many (slice that counts, channel) of a batch are annotated, after mirroring."""
        annotated = batch.annotated
        if self.settings.augmentation.flip_left_right:
            drawn = augment.draw(self.settings.augmentation, self.settings.seed, epoch, batch.numbers.tolist())
            _, annotated = augment.mirror_targets(batch.codebook, annotated, drawn.mirrored, self.mirrored)
        return (annotated * batch.counted.sum(1, keepdim=True)).sum().to(self.device)

    def _step(self, batch: SliceBatch, epoch: int) -> float:
        """One step of the optimiser on a batch, computed in `accumulate` parts; its loss."""
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(len(self.seen))
        number = self._annotated(batch, epoch) * s.target_shape[0] * s.target_shape[1]
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in batch.parts(min(s.accumulate, len(batch))):
            variation = augment.draw(s.augmentation, s.seed, epoch, part.numbers.tolist())
            images, targets = augment.to_network(part.to(self.device), s.target_shape, variation, self.mirrored)
            with autocast(self.device, self.dtype):
                loss = self.model(images.contiguous(memory_format=torch.channels_last), targets, number)
            loss.backward()
            total += loss.item()
        if s.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.gradient_clip)
        if np.isfinite(total):
            self.optimizer.step()
        return total


class _Interrupts:
    """Ctrl-C and the stop button of a notebook, held back until a step is whole; a second one acts at once."""

    def __enter__(self) -> _Interrupts:
        self.asked = False
        # only the main thread may; elsewhere nobody can interrupt either
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _note(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


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
