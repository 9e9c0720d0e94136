"""What an interrupted or killed training goes on from, in one file that holds data and no code."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from segkit.calibration import Calibration
from segkit.checkpoints import FORMAT, is_score, read_content, refuse_not_finite
from segkit.errors import SegkitError
from segkit.runs import write_whole
from segkit.torch_file import save_torch_file, tensors_in

_TYPES = {
    "settings": dict, "label_map": dict, "split": dict, "history": list, "slices": int, "place": int, "seen": list,
    "seconds": int | float, "thresholds": list, "learner": dict,
}  # fmt: skip


@dataclass(frozen=True)
class TrainingState:
    """What resuming a training needs, see `segkit.training`. Weights and optimiser as their `state_dict`."""

    settings: dict
    label_map: dict[str, int]
    split: dict
    history: list[dict]
    slices: int  # of the training part
    place: int  # slices of the running epoch that were learned from
    seen: list[float]  # losses of its steps
    seconds: float  # that it took so far
    thresholds: list[float]  # of each channel, from the last validation
    learner: dict  # of `steps.Learner.state`: weights, optimiser, gradient scaler
    calibration: dict | None = None  # of `Calibration.to_json`, from the last validation
    contents: dict | None = None  # what each subject held, see `staging.content_of`; None in older files


def save_state(path: Path, state: TrainingState) -> Path:
    """Write a state, whole or not at all: the one before it stays until then. SegkitError as in `save_checkpoint`."""
    refuse_not_finite(path, state.learner["model"])
    content = {"format": FORMAT, **{f.name: getattr(state, f.name) for f in fields(state)}}
    return write_whole(path, lambda temporary: save_torch_file(temporary, content))


def load_state(path: Path) -> TrainingState:
    """Read a state without executing anything in it. Raises SegkitError that names the file if it cannot be used."""
    content = read_content(path, "state of a training")
    try:
        state = TrainingState(**{f.name: content[f.name] for f in fields(TrainingState) if f.name in _TYPES})
        state = replace(state, calibration=content.get("calibration"), contents=content.get("contents"))
    except KeyError as error:
        raise SegkitError(f"{path}: no state of a training: {error} is missing; set RESUME = False") from None
    wrong = _wrong_in_state(state)
    if wrong:
        raise SegkitError(f"{path}: damaged state of a training: {wrong}; set RESUME = False")
    return state


def _wrong_in_state(state: TrainingState) -> str | None:
    """What in a state from a file cannot be; None where all can. What fits only some network is left to `restore`."""
    for name, kind in _TYPES.items():
        if not isinstance(getattr(state, name), kind) or isinstance(getattr(state, name), bool):
            return f"{name} is {type(getattr(state, name)).__name__}"
    if state.slices < 0 or state.place < 0 or not 0 <= state.seconds < math.inf:
        return "a number below 0, or without end"
    if not all(isinstance(value, float) and math.isfinite(value) for value in state.seen):
        return "a loss that is no number"
    if not all(isinstance(value, float) and 0 < value < 1 for value in state.thresholds):
        return "a threshold that is not between 0 and 1"
    if len(state.thresholds) not in (0, len(state.label_map)):
        return f"{len(state.thresholds)} thresholds for {len(state.label_map)} structures"
    for number, row in enumerate(state.history, start=1):
        if not isinstance(row, dict) or row.get("epoch") != number or not is_score(row.get("val_dice", "")):
            return "a history that is none"
    return _wrong_elsewhere(state) or _wrong_in_learner(state.learner)


def _wrong_elsewhere(state: TrainingState) -> str | None:
    """What in the calibration and the contents of subjects cannot be; None where all can, and where there are none."""
    if state.calibration is not None:
        try:
            Calibration.from_json(state.calibration, len(state.label_map))
        except ValueError as error:
            return f"calibration: {error}"
    contents = {} if state.contents is None else state.contents
    usable = isinstance(contents, dict) and all(isinstance(each, dict) for each in contents.values())
    return None if usable else "contents of subjects that are none"


def _wrong_in_learner(learner: dict) -> str | None:
    """What in a learner's state from a file cannot be; None where all can."""
    if learner.keys() != {"model", "optimizer", "scaler", "parts"}:
        return "parts of the network or the optimiser are missing"
    if type(learner["parts"]) is not int or not isinstance(learner["model"], dict):
        return "weights that are none"
    if not all(isinstance(tensor, torch.Tensor) for tensor in learner["model"].values()):
        return "weights that are none"
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors_in(learner))
    return None if finite else "weights that are not finite"
