"""Training: epochs of slices, each with validation, a checkpoint and a history; resumed where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from segkit.checkpoints import TrainingState, best_checkpoint, load_state, save_checkpoint, save_state
from segkit.dataset import Data
from segkit.errors import DivergedError, SegkitError
from segkit.interrupts import Interrupts
from segkit.locks import alone
from segkit.ranks import Ranks, join_ranks
from segkit.record import make_record
from segkit.runs import (
    PREDICTIONS_LOCK,
    RUN_LOCK,
    check_temporary_folder,
    is_half_moved,
    make_folder,
    start_run,
    sweep,
    write_json,
)
from segkit.schedule import learning_rate, should_stop
from segkit.settings import TrainSettings, changed
from segkit.slabs import open_items, tiles
from segkit.slices import batches, epoch_order
from segkit.steps import Learner
from segkit.subjects import Split
from segkit.validation import as_row, validate

STATE_SECONDS = 300
"""How often the state is saved within an epoch, so that a killed training loses no more."""
STATE_FILE = "last_state.pth"
RESUMABLE = ("epochs", "early_stopping", "accumulate", "keep_checkpoints", "init_checkpoint", "device", "workers")
"""Settings that may differ when a training is resumed. Other EPOCHS bend the schedule from there on."""

UNSCORED: Mapping = {
    "val_loss": None,
    "val_dice": None,
    "val_structures": 0,
    "val_threshold": None,
    "val_dice_of": {},
}
"""The columns of `validation.as_row` of an epoch that was interrupted."""

VALIDATION_BATCH = 8
"""Slices scored at a time, at most: their dense logits take more room than what is learned from."""


class History(list[dict]):
    """One dict an epoch: epoch, steps, learning_rate, train_loss, the columns of `validation.as_row`, seconds.

    interrupted: whether the training was stopped before its end. An epoch that was not finished has a row, too.
    """

    def __init__(self, rows: Sequence[dict] = (), interrupted: bool = False):
        super().__init__(rows)
        self.interrupted = interrupted


def train(
    data: Data,
    settings: TrainSettings,
    output_dir: str | Path,
    on_epoch: Callable[[History], object] | None = None,
    progress: bool = True,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> History:
    """Train a U-Net on the training part of `data.split`, validate after each epoch, write what is named below.

    Files of an older run in `output_dir` move away first (`runs.start_run`). It gets label_map.json, split.json and
    settings.json at the start; checkpoint_epochX.pth, training_history.json and last_state.pth after each epoch, when
    `on_epoch` is called too. Of the checkpoints those of the last KEEP_CHECKPOINTS epochs and of the best one stay.

    With `resume` a training that was interrupted or killed goes on from its last_state.pth, to the same weights as if
    it had never stopped; where there is none, a new one starts. An interrupt (Ctrl-C, the stop button of a notebook)
    ends the training in order: what was learned is kept in a checkpoint.

    Of several `ranks` (`segkit.ranks`; by default as this process was launched) each calls this alike, with
    `output_dir` on a disk that all of them see; only the first one writes, prints and calls `on_epoch`.

    Raises SegkitError for settings that make no sense or differ from those of the training to resume, for a loss that
    is no longer a number, where a file cannot be written, and where another process trains into `output_dir`.
    """
    settings, output_dir = settings.checked(), Path(output_dir)
    check_temporary_folder()
    ranks = ranks or join_ranks(settings.device)
    with no_other_training(output_dir, ranks):
        return _train(data, settings, output_dir, on_epoch, progress, resume, ranks)


@contextmanager
def no_other_training(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other trainings out of a folder in the block; the first rank does so for all."""
    if not ranks.first:
        yield
        return
    taken = f"{folder}: another process is training into it; wait until it ends, or choose another OUTPUT_DIR"
    with alone(make_folder(folder) / RUN_LOCK, taken):
        sweep(folder, folder / PREDICTIONS_LOCK)
        yield


def _train(
    data: Data,
    settings: TrainSettings,
    output_dir: Path,
    on_epoch: Callable[[History], object] | None,
    progress: bool,
    resume: bool,
    ranks: Ranks,
) -> History:
    going_on = resume and (output_dir / STATE_FILE).is_file() and not is_half_moved(output_dir)
    trainer = _Trainer(data, settings, ranks, fresh=not going_on)
    if going_on:
        trainer.restore(load_state(output_dir / STATE_FILE), output_dir / STATE_FILE)
    ranks.wait()  # all have looked for the state before the first one may write a new one
    files = _RunFiles(output_dir, trainer)
    files.begin(data, going_on)
    started, done_before = time.monotonic(), len(trainer.history)
    progress = progress and ranks.first
    # among several ranks a stop waits for the end of a step, wherever it comes: they must stay together
    with Interrupts(always=ranks.world > 1) as interrupts:
        try:
            while len(trainer.history) < settings.epochs and not should_stop(settings, trainer.history):
                trainer.epoch(files.save_state, interrupts, progress)
                files.write_epoch(trainer.history)
                files.save_state()
                if progress:
                    done = len(trainer.history)
                    left = (time.monotonic() - started) / (done - done_before) * (settings.epochs - done)
                    print(epoch_line(trainer.history[-1], settings.epochs, left), flush=True)
                if on_epoch is not None and ranks.first:
                    on_epoch(History(trainer.history))
        except KeyboardInterrupt:
            with Interrupts(always=True):  # what is kept is kept whole, however impatient somebody is
                return files.keep_interrupted()
    if progress and len(trainer.history) < settings.epochs:
        print(f"no better validation Dice for {settings.early_stopping} epochs: ended early")
    elif progress and len(trainer.history) == done_before:
        print(f"{output_dir}: {done_before} epochs are done, EPOCHS = {settings.epochs}: nothing to go on with")
    return History(trainer.history)


def begin_folder(folder: Path, data: Data) -> None:
    """Make a folder ready for a new run: files of an older one move away, label_map.json and split.json are written.

    Raises SegkitError where the older one is being evaluated.
    """
    taken = f"{folder}: another process is evaluating the run in it; wait until it ends, or choose another OUTPUT_DIR"
    with alone(folder / PREDICTIONS_LOCK, taken):
        start_run(folder)
    write_json(folder / "label_map.json", data.label_map)
    write_json(folder / "split.json", data.split_to_json())


def epoch_line(row: dict, epochs: int, seconds_left: float) -> str:
    """One epoch in one line, for a person who watches."""
    dice = (
        "no score" if row["val_dice"] is None else f"Dice {row['val_dice']:.3f} over {row['val_structures']} structures"
    )
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, validation loss {row['val_loss']:.4f}, {dice}, "
        f"{row['seconds']:.0f} s, {seconds_left / 60:.1f} min left"
    )


class _RunFiles:
    """The files of a training run in its folder. Of several ranks the first one alone writes."""

    def __init__(self, folder: Path, trainer: _Trainer):
        self.folder, self.trainer, self.first = folder, trainer, trainer.ranks.first
        self.record = make_record(trainer.data, trainer.ranks)

    def begin(self, data: Data, going_on: bool) -> None:
        """Move an older run away, unless it goes on, and write what is known before the first step."""
        if not self.first:
            return
        if not going_on:
            begin_folder(self.folder, data)  # only now, when nothing in the settings or data stops the new run
        write_json(self.folder / "settings.json", asdict(self.trainer.settings))

    def save_state(self) -> None:
        """What resuming needs."""
        if self.first:
            save_state(self.folder / STATE_FILE, self.trainer.state())

    def write_epoch(self, history: list[dict]) -> None:
        """The checkpoint of the last epoch in `history`, and the history itself."""
        if not self.first:
            return
        row, trainer = history[-1], self.trainer
        scores = {name: value for name, value in row.items() if name.startswith(("val_", "train_"))}
        save_checkpoint(
            self.folder / f"checkpoint_epoch{row['epoch']}.pth",
            trainer.learner.network,
            trainer.learner.shape_of_network,
            trainer.data.label_map,
            asdict(trainer.settings),
            row["epoch"],
            {**scores, "thresholds": list(trainer.thresholds)},
            self.record,
        )
        content = {"epochs": history, "validation": "target grid, val split", "record": self.record}
        write_json(self.folder / "training_history.json", content)
        self._prune(history)

    def _prune(self, history: list[dict]) -> None:
        """Remove the checkpoints that KEEP_CHECKPOINTS does not ask for."""
        keep = self.trainer.settings.keep_checkpoints
        older = [self.folder / f"checkpoint_epoch{row['epoch']}.pth" for row in history[: -(keep or len(history))]]
        for path in {*older} - {best_checkpoint(self.folder)}:
            path.unlink(missing_ok=True)

    def keep_interrupted(self) -> History:
        """Keep what was learned: in the state to resume, and an unfinished epoch as a checkpoint without a score."""
        trainer, rows = self.trainer, self.trainer.history
        if trainer.seen:
            rows = [*rows, {**trainer.training_row(), **UNSCORED, "interrupted": True}]
        if rows:  # the last epoch may have been stopped before it was written
            self.write_epoch(rows)
        if trainer.whole:  # else the older state stays: its weights are those of a whole step
            self.save_state()
        if self.first:
            where = f"in epoch {rows[-1]['epoch']} after {rows[-1]['steps']} steps" if rows else "before the first step"
            print(f"interrupted {where}; what was learned is kept, RESUME = True goes on")
        return History(rows, interrupted=True)


class _Trainer:
    """The learner with its slices, and how far it has come."""

    def __init__(self, data: Data, settings: TrainSettings, ranks: Ranks, fresh: bool = True):
        self.data, self.settings, self.ranks = data, settings, ranks
        self.learner = Learner(data, settings, ranks, fresh)
        self.train_slices = open_items(data.staged, data.split.train, data.label_map, settings)
        self.val_slices = open_items(data.staged, data.split.val, data.label_map, settings, tiles)
        self.in_epoch = settings.slices_per_epoch or -(-len(self.train_slices) // settings.depth)
        self.history: list[dict] = []
        self.place = 0  # slices of the running epoch that were learned from
        self.seen: list[float] = []  # losses of its steps
        self.whole = True  # whether weights and counters are those of the same step
        self.seconds = 0.0  # that it took before this process
        self.started = time.monotonic()
        self.thresholds: tuple[float, ...] = ()  # of each channel, from the last validation

    def state(self) -> TrainingState:
        """All that is needed to go on."""
        return TrainingState(
            settings=asdict(self.settings),
            label_map=dict(self.data.label_map),
            split=self.data.split.to_json(),
            history=self.history,
            slices=len(self.train_slices),
            place=self.place,
            seen=self.seen,
            seconds=time.monotonic() - self.started,
            thresholds=list(self.thresholds),
            learner=self.learner.state(),
        )

    def restore(self, state: TrainingState, path: Path) -> None:
        """Go on from a state. SegkitError that says in what it differs where it is not of this training."""
        differing = [name for name in changed(self.settings, state.settings) if name not in RESUMABLE]
        split = Split.from_json(state.split, str(path))
        same_split = replace(split, source=self.data.split.source) == self.data.split
        same_data = state.label_map == self.data.label_map and same_split
        if differing or not same_data or state.slices != len(self.train_slices):
            what = ", ".join(name.upper() for name in differing) or "the subjects, their structures or their split"
            raise SegkitError(
                f"{path}: cannot be resumed, these differ: {what}; set them as they were, or RESUME = False"
            )
        try:
            self.learner.restore(**state.learner)
        except Exception as error:  # torch raises many kinds for what does not fit
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise SegkitError(f"{path}: damaged state of a training ({reason}); set RESUME = False") from error
        self.history, self.place, self.seen, self.seconds = state.history, state.place, state.seen, state.seconds
        self.thresholds = tuple(state.thresholds)

    def epoch(self, save: Callable[[], object], interrupts: Interrupts, progress: bool) -> None:
        """Train what is left of the running epoch, validate, and add its row to the history.

        `save` is called now and then, when a step is whole. KeyboardInterrupt where `interrupts` asks for it.
        """
        self.started = time.monotonic() - self.seconds
        with interrupts.held():
            self._train(save, interrupts, progress)
        s = self.settings
        self.ranks.align(self.learner.model)
        try:
            validation = validate(
                self.learner.model, self.val_slices, s.target_shape, self.learner.dtype,
                max(1, min(s.batch_size, VALIDATION_BATCH) // self.learner.parts),
                s.validation_slices, s.workers, progress, self.ranks,
            )  # fmt: skip
        except DivergedError as error:
            raise self._stopped(error) from None
        row = {
            **self.training_row(),
            **as_row(validation, self.data.label_map),
            "seconds": round(time.monotonic() - self.started, 2),
        }
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

    def _train(self, save: Callable[[], object], interrupts: Interrupts, progress: bool) -> None:
        s, epoch = self.settings, len(self.history) + 1
        holds = self.train_slices.holds if s.balance else None
        order = epoch_order(len(self.train_slices), s.seed, epoch, self.in_epoch, holds, s.balance)
        loader = batches(self.train_slices, order, s.batch_size, s.workers, self.place, self.ranks.share_each)
        self.learner.model.train()
        saved = time.monotonic()
        bar = tqdm(
            loader, desc=f"epoch {epoch}/{s.epochs}", unit="batch", leave=False, disable=not progress,
            initial=len(self.seen), total=len(self.seen) + len(loader),
        )  # fmt: skip
        with bar:
            for batch in bar:
                if not self.learner.prepared:
                    self.learner.prepare(batch)
                self.whole = False
                try:
                    self.seen.append(self.learner.step(batch, epoch, self._rate(len(self.seen))))
                except DivergedError as error:
                    items = order[self.place : self.place + s.batch_size]
                    raise self._stopped(f"{error} at the slices {self.train_slices.named(items)}") from None
                self.place = min(self.place + s.batch_size, len(order))
                self.whole = True
                bar.set_postfix(loss=f"{np.mean(self.seen[-50:]):.4f}")
                if self.ranks.sum(torch.tensor(int(interrupts.asked))):
                    raise KeyboardInterrupt
                if time.monotonic() - saved > STATE_SECONDS:
                    save()
                    saved = time.monotonic()

    def _stopped(self, why: object) -> SegkitError:
        """What to raise where the running epoch came to an end for good."""
        before = f"checkpoint_epoch{len(self.history)}.pth" if self.history else None
        anew = f" with INIT_CHECKPOINT = {before}" if before else ""
        return SegkitError(
            f"epoch {len(self.history) + 1}: {why}; what was saved before is kept. Look at these slices, or start "
            f"again{anew} and a lower LEARNING_RATE or GRADIENT_CLIP = 1"
        )
