"""Ensembles: several seeds trained one after the other on one split, by one call; `inference` averages them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from segkit.checkpoints import load_only_checkpoint
from segkit.dataset import Data
from segkit.errors import SegkitError
from segkit.ranks import Ranks, join_ranks
from segkit.runs import is_half_moved, member_folder, member_folders, write_json
from segkit.settings import TrainSettings
from segkit.training import STATE_FILE, History, begin_folder, no_other_training, train

Watch = Callable[[Path], Callable[[History], object]]
"""Given the folder of a training, what is called with its history after each epoch."""


def train_members(
    data: Data,
    settings: TrainSettings,
    output_dir: str | Path,
    members: int = 1,
    watch: Watch | None = None,
    progress: bool = True,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> list[History]:
    """Train `members` networks with the seeds SEED, SEED + 1, ...; their histories, of an interrupted one the last.

    One is `training.train` into `output_dir`. Of several each is a training of its own in `output_dir`/member_1 and so
    on, all on the split of `data`, which stands in `output_dir` beside label_map.json: what opens a run there
    (`dataset.open_run`, `checkpoints.load_checkpoints`) finds the ensemble. Files of an older run in `output_dir` move
    away first. With `resume` members go on where they stopped, and those that are missing are trained.

    Raises SegkitError as `training.train` does, for MEMBERS below 1, and to resume with fewer than there are.
    """
    if not isinstance(members, int) or isinstance(members, bool) or members < 1:
        raise SegkitError(f"MEMBERS = {members!r}: expected a whole number of 1 or more")
    settings, output_dir = settings.checked(), Path(output_dir)
    ranks = ranks or join_ranks(settings.device)
    there = len(member_folders(output_dir)) if resume and not is_half_moved(output_dir) else 0
    if there > members or (there and members == 1):
        raise SegkitError(
            f"{output_dir}: holds {there} members, MEMBERS = {members}: give as many or more, and 2 at least, or set "
            "RESUME = False"
        )
    if members == 1:
        return [train(data, settings, output_dir, _watching(watch, output_dir), progress, resume, ranks)]
    if resume and (output_dir / STATE_FILE).is_file():
        raise SegkitError(
            f"{output_dir}: holds the training of one network, MEMBERS = {members}: set MEMBERS = 1, or RESUME = False"
        )
    ranks.wait()  # all have looked for members before the first one may make new ones
    histories = []
    with no_other_training(output_dir, ranks):
        if not there and ranks.first:
            _start(data, settings, output_dir)
        ranks.wait()
        for number in range(1, members + 1):
            if progress and ranks.first:
                print(f"member {number} of {members}, seed {settings.seed + number - 1}", flush=True)
            folder = member_folder(output_dir, number)
            own = replace(settings, seed=settings.seed + number - 1)
            histories.append(train(data, own, folder, _watching(watch, folder), progress, resume, ranks))
            if histories[-1].interrupted:
                break
    return histories


def _watching(watch: Watch | None, folder: Path) -> Callable[[History], object] | None:
    return None if watch is None else watch(folder)


def _start(data: Data, settings: TrainSettings, output_dir: Path) -> None:
    """Make the folder of an ensemble. What stops every member stops it here, before an older run moves away."""
    if settings.init_checkpoint:
        first = load_only_checkpoint(settings.init_checkpoint).path.resolve()
        if first.parent in [folder.resolve() for folder in (output_dir, *member_folders(output_dir))]:
            raise SegkitError(
                f"INIT_CHECKPOINT {first}: the files of {output_dir} move to its runs/ when an ensemble starts there: "
                "choose another OUTPUT_DIR"
            )
    begin_folder(output_dir, data, settings)
    write_json(output_dir / "settings.json", asdict(settings))
