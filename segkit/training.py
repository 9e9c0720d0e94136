"""A training run in its folder, with checkpoints and a history after each epoch; resumed where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from segkit.checkpoints import best_checkpoint, find_only_checkpoint, save_checkpoint
from segkit.dataset import Data
from segkit.errors import SegkitError
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
from segkit.schedule import should_stop
from segkit.seen import Learned, RunSplit, learned_by, without_seen, without_seen_by_name
from segkit.settings import TrainSettings
from segkit.trainer import Trainer
from segkit.training_state import load_state, save_state
from segkit.validation import THRESHOLDS

STATE_FILE = "last_state.pth"
UNSCORED: Mapping = {
    "val_loss": None,
    "val_dice": None,
    "val_structures": 0,
    "val_threshold": None,
    "val_dice_of": {},
}
"""The columns of `validation.as_row` of an epoch that was interrupted."""


class History(list[dict]):
    """One dict an epoch: epoch, steps, learning_rate, train_loss, the columns of `validation.as_row`, seconds.

    interrupted: whether somebody asked for a stop. An epoch that was not finished has a row, too.
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
    trainer = Trainer(data, settings, ranks, output_dir, fresh=not going_on)
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
                    edge = at_an_edge(trainer.history[-1]["val_threshold"])
                    if edge is not None:
                        print(edge, flush=True)
                if on_epoch is not None and ranks.first:
                    on_epoch(History(trainer.history))
            # a stop may have been asked for when no step came any more that would have looked
            stopped = bool(ranks.largest(int(interrupts.asked)))
        except KeyboardInterrupt:
            with Interrupts(always=True):  # what is kept is kept whole, however impatient somebody is
                return files.keep_interrupted()
    if progress and len(trainer.history) < settings.epochs:
        print(f"no better validation Dice for {settings.early_stopping} epochs: ended early")
    elif progress and len(trainer.history) == done_before:
        print(f"{output_dir}: {done_before} epochs are done, EPOCHS = {settings.epochs}: nothing to go on with")
    return History(trainer.history, interrupted=stopped)


def begin_folder(folder: Path, data: Data, settings: TrainSettings) -> None:
    """Make a folder ready for a new run: files of an older one move away, label_map.json and split.json are written.

    What INIT_CHECKPOINT has seen of the test is printed. Raises SegkitError where the older run is being evaluated.
    """
    own = data.learned()
    earlier = _seen_before(
        data, own.ct_bytes, settings
    )  # before they move away: INIT_CHECKPOINT may be of the older run
    taken = f"{folder}: another process is evaluating the run in it; wait until it ends, or choose another OUTPUT_DIR"
    with alone(folder / PREDICTIONS_LOCK, taken):
        start_run(folder)
    write_json(folder / "label_map.json", data.label_map)
    write_json(folder / "split.json", RunSplit(data.folder.resolve(), own, earlier).to_json())


def _seen_before(data: Data, ct_bytes: Mapping[str, int], settings: TrainSettings) -> tuple[Learned | None, ...]:
    """The trainings behind the weights of INIT_CHECKPOINT; what they have seen of the new one's test is printed."""
    if settings.init_checkpoint is None:
        return ()
    path = find_only_checkpoint(settings.init_checkpoint).parent / "split.json"
    earlier = learned_by(path, "move it away if it cannot be mended: it says what INIT_CHECKPOINT was trained on")
    try:
        split, by_name = without_seen_by_name(data.split, ct_bytes, earlier, path)
        checksums = {name: subject.checksums for name, subject in data.staged.items()}
        _, by_content = without_seen(split, checksums, earlier, path)
        said = [*map(str, by_name + by_content)]
    except SegkitError as error:
        said = [str(error)]
    for text in said:
        print(f"INIT_CHECKPOINT = {settings.init_checkpoint}: {text}")
    return earlier


def epoch_line(row: dict, epochs: int, seconds_left: float) -> str:
    """One epoch in one line, for a person who watches."""
    dice = (
        "no score" if row["val_dice"] is None else f"Dice {row['val_dice']:.3f} over {row['val_structures']} structures"
    )
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, validation loss {row['val_loss']:.4f}, {dice}, "
        f"{row['seconds']:.0f} s, {seconds_left / 60:.1f} min left"
    )


def at_an_edge(threshold: float) -> str | None:
    """What to say where the best of all thresholds that were tried is the first or the last; None elsewhere."""
    if THRESHOLDS[0] < threshold < THRESHOLDS[-1]:
        return None
    end = "lowest" if threshold <= THRESHOLDS[0] else "highest"
    return (
        f"the best threshold, {threshold:.3f}, is the {end} that is tried: one further out may score better. After the "
        "first epochs this is usual; where it stays so, look at LOSS and POSITIVE_WEIGHT_CAP"
    )


class _RunFiles:
    """The files of a training run in its folder. Of several ranks the first one alone writes."""

    def __init__(self, folder: Path, trainer: Trainer):
        self.folder, self.trainer, self.first = folder, trainer, trainer.ranks.first
        self.record = make_record(trainer.data, trainer.ranks)

    def begin(self, data: Data, going_on: bool) -> None:
        """Move an older run away, unless it goes on, and write what is known before the first step."""
        if not self.first:
            return
        if not going_on:
            # only now, when nothing in the settings or data stops the new run
            begin_folder(self.folder, data, self.trainer.settings)
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
            {
                **scores,
                "thresholds": list(trainer.thresholds),
                "calibration": None if trainer.calibration is None else trainer.calibration.to_json(),
            },
            self.record,
        )
        content = {"epochs": history, "validation": "the scans' own grids, val split", "record": self.record}
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
        # the last epoch may have been stopped before it was written; its weights go into no checkpoint once a step of
        # the next one has begun to move them
        if rows and (trainer.seen or trainer.whole):
            self.write_epoch(rows)
        if trainer.whole:  # else the older state stays: its weights are those of a whole step
            self.save_state()
        if self.first:
            where = f"in epoch {rows[-1]['epoch']} after {rows[-1]['steps']} steps" if rows else "before the first step"
            print(f"interrupted {where}; what was learned is kept, RESUME = True goes on")
        return History(rows, interrupted=True)
