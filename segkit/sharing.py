"""A trained model as a folder for others: weights and settings in safetensors, and a model card.

`segkit.checkpoints.load_checkpoints` reads the folder as it reads a run's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from segkit.checkpoints import Checkpoint, load_checkpoints, save_checkpoint
from segkit.errors import SegkitError
from segkit.model_card import Provenance, check_licence, model_card, score_section
from segkit.runs import make_folder, write_whole_folder
from segkit.settings import TrainSettings
from segkit.splits import Split
from segkit.untrusted import read_json
from segkit.weights_file import shared_name

OF_THE_MACHINE = ("init_checkpoint", "device", "workers")
"""Settings that are of the machine, not of the model, and may name its paths: they are not shared."""

_REMEDY = "move it away, or make it again"

SHARED_RECORD = ("versions", "platform", "git", "data", "device", "processes", "threads")
"""What of `record.make_record` is shared."""


def export_model(source: str | Path, folder: str | Path, data_licence: str, description: str = "") -> list[Path]:
    """Write the model of a run, or of a checkpoint file, into a new or empty `folder`; the paths of its files.

    model.safetensors (of an ensemble member_1_of_3.safetensors and so on) with weights, label map, thresholds,
    settings, scores and record, and README.md, the model card. The card holds the newest evaluation of exactly these
    checkpoints that is in the run's folder. No path of this machine and no name of a subject is shared. The folder is
    written whole or not at all.

    data_licence: of the training data, like "CC BY 4.0". description: Markdown for the head of the card.
    Raises SegkitError for a `source` that `load_checkpoints` refuses, a folder that holds something, and a licence that
    is none.
    """
    source, folder = Path(source), Path(folder).resolve()
    licence = check_licence(data_licence)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SegkitError(f"{folder}: holds something already: give a new or an empty folder")
    checkpoints = load_checkpoints(source)
    run = source if source.is_dir() else source.parent
    provenance = Provenance(licence, description, _split_of(run), _scores_of(run, checkpoints))
    make_folder(folder.parent)
    names = [shared_name(number, len(checkpoints)) for number in range(1, len(checkpoints) + 1)]

    def write(draft: Path) -> None:
        for name, one in zip(names, checkpoints, strict=True):
            _write(one, draft / name, licence)
        card = model_card(load_checkpoints(draft), provenance)  # of what is shared, so it says no more than that
        (draft / "README.md").write_text(card, encoding="utf-8")

    write_whole_folder(folder, write)
    return [folder / name for name in (*names, "README.md")]


def _write(one: Checkpoint, path: Path, licence: str) -> Path:
    """A checkpoint without what is of the machine that trained it."""
    names = [f.name for f in fields(TrainSettings) if f.name not in OF_THE_MACHINE]
    settings = {name: one.settings[name] for name in names if name in one.settings}
    record = {name: one.record[name] for name in SHARED_RECORD if name in one.record}
    started = bool(one.settings.get("init_checkpoint") or one.record.get("other_weights"))
    record |= {"data_licence": licence, "other_weights": started}
    return save_checkpoint(path, one.model, one.network, one.label_map, settings, one.epoch, one.scores, record)


def _split_of(run: Path) -> Split | None:
    path = run / "split.json"
    return Split.from_json(read_json(path, _REMEDY), str(path)) if path.is_file() else None


def _scores_of(run: Path, checkpoints: Sequence[Checkpoint]) -> str:
    """The scores of the newest summary in the folder of a run that is of these checkpoints; empty without one."""
    trained = max(one.path.stat().st_mtime for one in checkpoints)
    for path in sorted(run.glob("evaluation_summary_*.json"), reverse=True):  # stamps sort by time
        summary = read_json(path, _REMEDY)
        stated: Any = summary.get("checkpoints") if isinstance(summary, dict) else None
        fits = isinstance(stated, list) and len(stated) == len(checkpoints) and path.stat().st_mtime >= trained
        if fits and all(_is_of(text, one.path, run) for text, one in zip(stated, checkpoints, strict=True)):
            return score_section(path, summary)
    print(f"{run}: no evaluation of this model: its card will have no scores; python -m segkit evaluate makes one")
    return ""


def _is_of(stated: object, checkpoint: Path, run: Path) -> bool:
    """Whether a summary's path means a checkpoint of the run, which may have moved since."""
    if Path(str(stated)).is_file():
        return Path(str(stated)).samefile(checkpoint)
    inside = (run.resolve().name, *checkpoint.relative_to(run).parts)
    return tuple(re.split(r"[\\/]", str(stated))[-len(inside) :]) == inside
