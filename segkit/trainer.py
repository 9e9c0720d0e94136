"""Epochs of slices, each with validation: the learner on its way, and how far it has come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from segkit.calibration import Calibration
from segkit.dataset import Data
from segkit.errors import DivergedError, SegkitError
from segkit.interrupts import Interrupts
from segkit.ranks import Ranks
from segkit.schedule import learning_rate
from segkit.settings import TrainSettings, changed
from segkit.slabs import open_items, tiles
from segkit.slices import batches
from segkit.splits import Split
from segkit.steps import Learner
from segkit.training_state import TrainingState
from segkit.validation import as_row, validate

STATE_SECONDS = 300
"""How often the state is saved within an epoch, so that a killed training loses no more."""

RESUMABLE = ("epochs", "early_stopping", "accumulate", "keep_checkpoints", "init_checkpoint", "device", "workers")
"""Settings that may differ when a training is resumed. Other EPOCHS bend the schedule from there on."""

VALIDATION_BATCH = 8
"""Slices scored at a time, at most: their dense logits take more room than what is learned from."""


class Trainer:
    """The learner with its slices, and how far it has come. `folder`: where its checkpoints are, for messages."""

    def __init__(self, data: Data, settings: TrainSettings, ranks: Ranks, folder: Path, fresh: bool = True):
        self.data, self.settings, self.ranks, self.folder = data, settings, ranks, folder
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
        self.calibration: Calibration | None = None  # from the same

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
            calibration=None if self.calibration is None else self.calibration.to_json(),
            learner=self.learner.state(),
            contents=self._contents(),
        )

    def _contents(self) -> dict[str, dict[str, str]]:
        """What each subject that is trained on or validates holds."""
        split = self.data.split
        return {part.subject: self.data.staged[part.subject].contents() for part in (*split.train, *split.val)}

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
        if state.contents is None:
            if self.ranks.first:
                print(f"{path}: from an earlier version: whether the data are those that it began with is not known")
        else:
            self._refuse_changed_data(state.contents, path)
        try:
            self.learner.restore(**state.learner)
        except Exception as error:  # torch raises many kinds for what does not fit
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise SegkitError(f"{path}: damaged state of a training ({reason}); set RESUME = False") from error
        self.history, self.place, self.seen, self.seconds = state.history, state.place, state.seen, state.seconds
        self.thresholds = tuple(state.thresholds)
        if state.calibration is not None:
            self.calibration = Calibration.from_json(state.calibration, len(state.label_map))
        started = state.settings.get("init_checkpoint")
        asked = self.settings.init_checkpoint
        if asked is not None and str(asked) != str(started) and self.ranks.first:
            print(f"INIT_CHECKPOINT = {asked}: left out, this training goes on as it started (RESUME)")
        # checkpoints and what is shared say what it started from
        self.settings = replace(self.settings, init_checkpoint=None if started is None else str(started))

    def _refuse_changed_data(self, before: dict[str, dict[str, str]], path: Path) -> None:
        """SegkitError that names which CT and labels differ from what a training began with."""
        changes = [
            f"{'the CT' if kind == 'ct' else 'the labels'} of {subject}"
            for subject, own in self._contents().items()
            for kind, content in own.items()
            if before.get(subject, {}).get(kind) != content
        ]
        if changes:
            more = f" and {len(changes) - 6} more" if changes[6:] else ""
            raise SegkitError(
                f"{path}: cannot be resumed, the data have changed since: {', '.join(changes[:6])}{more}; put the "
                "files back as they were, or set RESUME = False (INIT_CHECKPOINT then starts from what was learned)"
            )

    def epoch(self, save: Callable[[], object], interrupts: Interrupts, progress: bool) -> None:
        """Train what is left of the running epoch, validate, and add its row to the history.

        `save` is called now and then, when a step is whole. KeyboardInterrupt where `interrupts` asks for it.
        """
        self.started = time.monotonic() - self.seconds
        with interrupts.held():
            self._learn(save, interrupts, progress)
        s = self.settings
        self.ranks.align(self.learner.model)
        if self.ranks.world > 1:
            save()  # a launcher that was interrupted gives its processes half a minute, which validation may take
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
        self.thresholds, self.calibration = validation.thresholds, validation.calibration
        self.history, self.place, self.seen, self.seconds = [*self.history, row], 0, [], 0.0
        self.started = time.monotonic()

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

    def _learn(self, save: Callable[[], object], interrupts: Interrupts, progress: bool) -> None:
        s, epoch = self.settings, len(self.history) + 1
        order = self.train_slices.order(s.seed, epoch, self.in_epoch, s.balance)
        loader = batches(
            self.train_slices, order, s.batch_size, s.workers, self.place, self.ranks.share_each, self.ranks.device
        )
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
        before = self.folder.resolve() / f"checkpoint_epoch{len(self.history)}.pth"
        anew = f" in another OUTPUT_DIR with INIT_CHECKPOINT = {before}," if self.history else " with"
        return SegkitError(
            f"epoch {len(self.history) + 1}: {why}; what was saved before is kept. Look at these slices, or start "
            f"again{anew} a lower LEARNING_RATE or GRADIENT_CLIP = 1"
        )
