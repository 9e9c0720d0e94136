"""Where a run's files go: the project's root, an output folder that never mixes two runs, files that are whole."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from segkit.errors import SegkitError, UnwritableError, unwritable
from segkit.locks import alone

if TYPE_CHECKING:
    import pandas as pd

RUN_FILES = (
    "checkpoint_epoch*.pth",
    "last_state.pth",
    "label_map.json",
    "split.json",
    "settings.json",
    "training_history.*",
    "sample_predictions.png",
    "evaluation_*",
    "metrics_distribution_*.png",
    "distance_distribution_*.png",
    "structure_ranking_*.png",
    "success_rates_*.png",
    "segmentation_visualization_*.png",
    "dice_by_volume_*.png",
    "subject_overview_*.png",
    "confusion_*.png",
    "reliability_*.png",
    "best_median_worst_*.png",
    "comparison_*",
    "report_*.html",
    "3d_*.html",
    "predictions",
    "segmentations_*",
    "member_*",
)
"""What belongs to one run. Staged stores, phantoms and executed notebooks serve several and stay where they are."""

PLAN_FILES = {"label_map.json", "split.json", "settings.json"}
"""What a training writes before its first step."""

RUN_LOCK = ".lock"
"""Held in a run's folder by the process that trains into it."""
PREDICTIONS_LOCK = ".predictions.lock"
"""Held in a run's folder by the process that evaluates it, which may be while it is still trained."""

_stamps: set[str] = set()  # that this process has given

_TEMPORARY = re.compile(r"\.\d+\.segkit\.(.+)")  # of `_beside`


def project_root(start: str | Path | None = None) -> Path:
    """The nearest folder at or above `start` (the working directory) that holds `notebooks/` and `segkit/`.

    Notebooks resolve their paths from it, wherever the kernel starts. Without such a folder: `start` itself.
    """
    here = Path(start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "segkit").is_dir():
            return folder
    return here


def resolve(path: str | Path, root: Path | None = None) -> Path:
    """`path` made absolute: `~` expanded, relative ones taken from the project's root."""
    return (root or project_root()) / Path(path).expanduser()


def time_stamp() -> str:
    """Now, as it stands in file names: 20261123_184105. Within a process never the same twice: it waits a moment."""
    while (stamp := datetime.now().strftime("%Y%m%d_%H%M%S")) in _stamps:
        time.sleep(0.02)
    _stamps.add(stamp)
    return stamp


def start_run(output_dir: str | Path) -> Path:
    """Make `output_dir` ready for a new training and return it.

    Files of an older run move to `runs/<stamp of their end>/` inside it, all of them: where a process was killed in the
    middle, the next one goes on. Those of a training that was killed before its first step stay, to be overwritten.
    Raises SegkitError where nothing can be written.
    """
    folder = Path(output_dir)
    make_folder(folder)
    older = sorted(path for pattern in RUN_FILES for path in folder.glob(pattern))
    if not {path.name for path in older} <= PLAN_FILES or is_half_moved(folder):
        moving = _moving(folder)
        try:
            moving.mkdir(parents=True, exist_ok=True)
            for path in older:
                path.rename(moving / path.name)
            moving.rename(_archive(folder, moving))
        except OSError as error:
            raise unwritable(folder / "runs", error, "the older run's files move there") from error
    return folder


def is_half_moved(folder: Path) -> bool:
    """Whether a new run was killed while it moved an older one's files: what is left of those is no run any more."""
    return _moving(folder).is_dir()


def _moving(folder: Path) -> Path:
    return folder / "runs" / ".moving"


def _archive(folder: Path, moving: Path) -> Path:
    """A name that is not taken for the run whose files are in `moving`."""
    latest = max((path.stat().st_mtime for path in moving.iterdir()), default=moving.stat().st_mtime)
    ended = datetime.fromtimestamp(latest).strftime("%Y%m%d_%H%M%S")
    archive, number = folder / "runs" / ended, 1
    while archive.exists():
        number += 1
        archive = folder / "runs" / f"{ended}_{number}"
    return archive


def member_folder(output_dir: str | Path, number: int) -> Path:
    """Where member `number` (from 1) of an ensemble keeps its files: those of a training of one network."""
    return Path(output_dir) / f"member_{number}"


def member_folders(output_dir: str | Path) -> list[Path]:
    """The folders of the members in `output_dir`, in their order; none where one network was trained."""
    numbers = [re.fullmatch(r"member_(\d+)", path.name) for path in Path(output_dir).glob("member_*") if path.is_dir()]
    return [member_folder(output_dir, number) for number in sorted(int(found[1]) for found in numbers if found)]


def make_folder(folder: Path) -> Path:
    """Create `folder` with its parents. Raises SegkitError that names it where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SegkitError(f"{folder}: cannot be made a folder ({error.strerror}); choose another OUTPUT_DIR") from error
    return folder


def check_temporary_folder() -> None:
    """Raise SegkitError where the system has no folder for temporary files that can be written to, as torch wants."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise SegkitError(
            f"no room for temporary files ({error.strerror}): make room there, or name another folder in TMPDIR, and "
            "run it again"
        ) from error


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then rename it: `path` is complete or untouched.

    Raises SegkitError that names `path` where there is no room, or another reason why it cannot be written.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        with _named(path, temporary):
            write(temporary)
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def write_whole_folder(path: str | Path, write: Callable[[Path], object], replace: bool = False) -> Path:
    """Let `write` fill a temporary folder beside `path`, then rename it: `path` has all of its files or is not there.

    `path` may be there if it is empty, or with `replace` anyhow; its parent is made. Raises SegkitError as
    `write_whole` does.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        with _named(path, temporary):
            discard(temporary)
            temporary.mkdir(parents=True)
            write(temporary)
            if replace:
                discard(path)
            elif path.is_dir():
                path.rmdir()
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


@contextmanager
def _named(path: Path, temporary: Path) -> Iterator[None]:
    """What cannot be written inside is said of `path`, also by what itself writes whole into `temporary`."""
    try:
        yield
    except UnwritableError as error:
        raise UnwritableError(str(error).replace(str(temporary), str(path))) from error
    except OSError as error:
        raise unwritable(path, error) from error


def _beside(path: Path) -> Path:
    """Where what will be `path` is written: hidden, and another one for each process."""
    return path.with_name(f".{os.getpid()}.segkit.{path.name}")


def discard(path: Path) -> None:
    """Remove a file or folder, if it is there, first from its name: nobody finds, or goes on writing, half of it."""
    gone = _beside(path.with_name(str(time.monotonic_ns())))
    with suppress(FileNotFoundError):
        path.rename(gone)
        if gone.is_dir() and not gone.is_symlink():
            shutil.rmtree(gone, ignore_errors=True)
        else:
            gone.unlink()


def left_behind(folder: Path) -> Iterator[tuple[Path, str]]:
    """What `write_whole` and `write_whole_folder` of other processes, running or killed, have in `folder`.

    Each with the name that it was to have.
    """
    for path in folder.glob(".[0-9]*.segkit.*"):
        if (found := _TEMPORARY.fullmatch(path.name)) is not None:
            yield path, found[1]


def sweep(folder: Path, lock: Path | None = None) -> None:
    """Remove what killed processes left behind, in a folder that no other process writes into.

    lock: of those that may write into it all the same: while one of them holds it, all is left as it is. What will have
    a name with a lock of its own, as phantoms do, is left to who holds that.
    """
    with suppress(SegkitError), nullcontext() if lock is None else alone(lock, f"{folder}: in use"):
        for path, name in left_behind(folder):
            own = lock_of(folder / name)
            held = alone(own, f"{path}: in use") if own.is_file() else nullcontext()
            with suppress(SegkitError, OSError), held:  # what is in use, or cannot be removed, harms nobody
                discard(path)


def lock_of(path: Path) -> Path:
    """The lock of who makes `path` alone among others that write beside it."""
    return path.with_name(f".{path.name}.lock")


def write_csv(path: str | Path, table: pd.DataFrame, **options: object) -> Path:
    """Write a table as CSV, UTF-8 with texts in quotes, whole or not at all; `options` of pandas.

    Names of others end up in it: where a spreadsheet would take a text for a formula, an apostrophe leads.
    """
    columns = {name: table[name].map(_no_formula) for name in table if table[name].dtype.kind not in "biuf"}
    safe = table.assign(**columns)
    # in quotes also where pandas sees no need: a carriage return alone would begin another row
    options = {"index": False, "quoting": csv.QUOTE_NONNUMERIC, "errors": "backslashreplace", **options}
    return write_whole(path, lambda temporary: safe.to_csv(temporary, encoding="utf-8", **options))


def _no_formula(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell


def write_json(path: str | Path, content: object) -> Path:
    """Write `content` as readable JSON (innermost lists on one line), whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    # a line break in this text is layout, never part of a string
    text = re.sub(r"\[\n[^\[\]{}]*\n *\]", lambda found: re.sub(r"\n *", " ", found[0]), text)
    return write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
