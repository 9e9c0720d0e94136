"""Checkpoints: weights, readable settings and the label map in one file that holds data and no code.

A run's own are `.pth` files of torch, read as data alone; a shared model's are `.safetensors` (`segkit.weights_file`).
Both hold the same and are read alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segkit.calibration import Calibration
from segkit.errors import SegkitError
from segkit.labels import check_label_map
from segkit.networks import build_network
from segkit.runs import member_folders, write_whole
from segkit.settings import check_target_shape
from segkit.torch_file import not_finite, read_torch_file, save_torch_file, tensors_in
from segkit.untrusted import read_json
from segkit.weights_file import SUFFIX, read_weights_file, shared_files, write_weights_file

FORMAT = 2
UNSCORED = -1.0  # in the place of a Dice, below every Dice
_FIELDS = {
    "epoch": int, "network": dict, "label_map": dict, "settings": dict, "scores": dict, "record": dict, "weights": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. `network`: the arguments of `build_network`, `settings` of the training."""

    path: Path
    epoch: int
    network: dict
    label_map: dict[str, int]
    settings: dict
    scores: dict
    record: dict  # what it came from, see `segkit.record`; empty in files that have none
    model: nn.Module  # in evaluation mode, on the CPU

    @property
    def target_shape(self) -> tuple[int, int]:
        """What the network sees, rows and columns."""
        return tuple(self.settings["target_shape"])

    def start_network(self, network: nn.Module, label_map: Mapping[str, int]) -> list[str]:
        """Give another network these weights, the head's channels matched by name; the names that found none.

        Raises SegkitError where the two are different models, or their levels differ.
        """
        own, wanted = self.model.state_dict(), network.state_dict()
        body = [name for name in wanted if not name.startswith("head.")]
        same_kind = type(self.model) is type(network) and own.keys() == wanted.keys()
        unlike = not same_kind or [name for name in body if own[name].shape != wanted[name].shape]
        if unlike or own["head.weight"].shape[1:] != wanted["head.weight"].shape[1:]:
            raise SegkitError(
                f"INIT_CHECKPOINT {self.path}: another network: expected MODEL, FEATURES, NORM and CONTEXT of "
                f"{self.network}"
            )
        shared = [name for name in label_map if name in self.label_map]
        for name in body:
            wanted[name] = own[name]
        for part in ("head.weight", "head.bias"):
            for name in shared:
                wanted[part][label_map[name]] = own[part][self.label_map[name]]
        network.load_state_dict(wanted)
        return sorted(set(label_map) - set(shared))

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The output of each channel, 0 to 1, above which its structure is: from validation; 0.5 where none was scored.

        Outputs are no probabilities: `calibration` makes them.
        """
        chosen = self.scores.get("thresholds")
        return tuple(chosen) if chosen else (0.5,) * len(self.label_map)

    @property
    def calibration(self) -> Calibration | None:
        """How probabilities follow from outputs, from validation; None where nothing was scored, and in older files."""
        content = self.scores.get("calibration")
        return None if content is None else Calibration.from_json(content, len(self.label_map))

    @property
    def flipped(self) -> bool:
        """Whether it was trained on slices that were mirrored left to right, too."""
        augmentation = self.settings.get("augmentation")
        return isinstance(augmentation, dict) and augmentation.get("flip_left_right") is True


def save_checkpoint(
    path: Path, model: nn.Module, network: dict, label_map: Mapping[str, int], settings: dict, epoch: int, scores: dict,
    record: dict,
) -> Path:  # fmt: skip
    """Write a checkpoint, whole or not at all. Everything but the weights is plain JSON types.

    Where `path` ends in .safetensors: for others (`segkit.weights_file`). Raises SegkitError for weights that are not
    finite: what `path` held before stays.
    """
    refuse_not_finite(path, model.state_dict())
    # contiguous: channels_last is how this machine computes, not what the weights are
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = {
        "format": FORMAT,
        "epoch": epoch,
        "network": network,
        "label_map": dict(label_map),
        "settings": settings,
        "scores": scores,
        "record": record,
        "weights": weights,
    }
    if path.suffix == SUFFIX:
        return write_weights_file(path, content)
    return write_whole(path, lambda temporary: save_torch_file(temporary, content))


def read_content(path: Path, what: str) -> dict:
    """The content of a file that segkit wrote, data alone. SegkitError that names it for anything else."""
    content = read_weights_file(path) if path.suffix == SUFFIX else read_torch_file(path, what)
    stated = content.get("format") if isinstance(content, dict) else None
    if type(stated) is not int or stated != FORMAT:
        raise SegkitError(
            f"{path}: no {what} of this segkit: expected format {FORMAT}, found {str(stated)[:40]}; train again"
        )
    rest = {name: value for name, value in content.items() if name not in ("weights", "learner")}
    if next(tensors_in(rest), None) is not None:
        raise SegkitError(f"{path}: damaged {what}: tensors in the place of its settings")
    return content


def load_checkpoint(path: str | Path, label_map: Mapping[str, int] | None = None) -> Checkpoint:
    """Read a checkpoint without executing anything in it, and rebuild its network.

    Raises SegkitError that names the file if it is missing, damaged, no checkpoint of segkit, or was trained with
    another label map than `label_map` (where one is given).
    """
    path = Path(path)
    content = read_content(path, "checkpoint")
    content["record"] = content.get("record") or {}
    for name, kind in _FIELDS.items():
        if not isinstance(content.get(name), kind):
            raise SegkitError(
                f"{path}: damaged checkpoint: {name} is {type(content.get(name)).__name__}, not {kind.__name__}"
            )
    own_map = check_label_map(content["label_map"], f"{path} (label map)")
    chosen = content["scores"].get("thresholds") or [0.5] * len(own_map)
    usable = isinstance(chosen, list) and all(isinstance(value, float) and 0 < value < 1 for value in chosen)
    if not usable or len(chosen) != len(own_map):
        raise SegkitError(f"{path}: damaged checkpoint: expected a threshold for each of {len(own_map)} structures")
    try:
        if content["scores"].get("calibration") is not None:
            Calibration.from_json(content["scores"]["calibration"], len(own_map))
    except ValueError as error:
        raise SegkitError(f"{path}: damaged checkpoint: calibration: {error}") from error
    try:
        check_target_shape(content["settings"].get("target_shape"), 1)
    except SegkitError as error:
        raise SegkitError(f"{path}: damaged checkpoint: {error}") from error
    if label_map is not None and dict(label_map) != own_map:
        raise SegkitError(f"{path}: trained with another label map: {_difference(own_map, dict(label_map))}")
    network = content["network"]
    model = _rebuild(path, network, content["weights"], len(own_map))
    return Checkpoint(
        path, content["epoch"], network, own_map, content["settings"], content["scores"], content["record"], model
    )


def is_score(value: Any) -> bool:
    """Whether it is a Dice as a history holds it, None where nothing was scored."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and UNSCORED <= value <= 1)


def refuse_not_finite(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises SegkitError that names the file `path`, which is not written, where weights hold NaN or infinity."""
    wrong = not_finite(weights)
    if wrong:
        raise SegkitError(
            f"{path}: not written: {len(wrong)} of {len(weights)} weights are not finite, such as {wrong[0]}; what was "
            "saved before is kept. Start again from an earlier checkpoint (INIT_CHECKPOINT) and a lower LEARNING_RATE"
        )


def _rebuild(path: Path, network: dict, weights: dict, channels: int) -> nn.Module:
    try:
        if len(network["features"]) > len(weights):  # each level has several
            raise ValueError(f"{len(network['features'])} levels, {len(weights)} tensors")
        with torch.device("meta"):  # shapes first: a wrong or hostile file allocates nothing
            model = build_network(**network)
        if network["out_channels"] != channels:
            raise ValueError(f"{network['out_channels']} output channels for {channels} structures")
        kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        model.load_state_dict(weights, strict=True, assign=True)
        if {name: tensor.dtype for name, tensor in model.state_dict().items()} != kinds:
            raise ValueError("weights of another type than float32")
        if not_finite(model.state_dict()):
            raise ValueError("weights that are not finite")
    except SegkitError as error:
        raise SegkitError(f"{path}: {error}") from error
    except (
        KeyError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError, IndexError, ArithmeticError,
    ) as error:  # fmt: skip
        reason, stated = " ".join(str(error).split())[:200], str(network)[:200]
        raise SegkitError(f"{path}: damaged checkpoint: weights do not fit the network {stated}: {reason}") from error
    return model.eval()


def _difference(own: dict[str, int], wanted: dict[str, int]) -> str:
    only_own, only_wanted = sorted(set(own) - set(wanted)), sorted(set(wanted) - set(own))
    if not only_own and not only_wanted:
        return "the same structures on other channels"
    return (
        f"it has {len(own)} structures, expected {len(wanted)}; only in the checkpoint: {only_own[:4]}, "
        f"only expected: {only_wanted[:4]}; use the checkpoint of this data, or train again"
    )


def best_checkpoint(output_dir: str | Path) -> Path:
    """The checkpoint with the highest validation Dice in `training_history.json`; of an ensemble, of any member.

    Raises SegkitError if the folder holds no epoch.
    """
    return max(_best(folder) for folder in _trainings(Path(output_dir)))[1]


def load_checkpoints(source: str | Path, label_map: Mapping[str, int] | None = None) -> list[Checkpoint]:
    """What predicts together: the best checkpoint of each member of the run in the folder `source`, of its only
    network where it is no ensemble; all networks of the model that was shared in it (`segkit.sharing`); or the one in
    the file `source`. Raises SegkitError as `load_checkpoint` does, and for a shared model that is not whole.
    """
    return [load_checkpoint(path, label_map) for path in _find_checkpoints(Path(source))]


def load_only_checkpoint(source: str | Path) -> Checkpoint:
    """What INIT_CHECKPOINT names: as of `load_checkpoints`, but of one network. SegkitError where there are more."""
    return load_checkpoint(find_only_checkpoint(source))


def find_only_checkpoint(source: str | Path) -> Path:
    """The file of `load_only_checkpoint`, not opened. Raises SegkitError where there is none, or more than one."""
    first, *others = _find_checkpoints(Path(source))
    if others:
        files = ", ".join(map(str, (first, *others)))
        raise SegkitError(f"INIT_CHECKPOINT {source}: holds {len(others) + 1} networks; name one of them: {files}")
    return first


def _find_checkpoints(source: Path) -> list[Path]:
    """The files of `load_checkpoints`."""
    if not source.exists():
        raise SegkitError(
            f"{source}: no such checkpoint, no training run there; train first (train_unet.ipynb, or segkit train), "
            "or give the path of one"
        )
    if not source.is_dir():
        return [source]
    return shared_files(source) or [_best(folder)[1] for folder in _trainings(source)]


def _trainings(run: Path) -> list[Path]:
    """The folders of a run's trainings: `run` itself, or of an ensemble the members that have scored an epoch."""
    members = member_folders(run)
    scored = [folder for folder in members if _is_scored(folder)]
    if scored and len(scored) < len(members):
        print(f"{run}: {len(members) - len(scored)} of {len(members)} members have no finished epoch: left out")
    return scored or members or [run]


def _is_scored(folder: Path) -> bool:
    try:
        return _best(folder)[0] != UNSCORED
    except SegkitError:
        return False


def _best(folder: Path) -> tuple[float, Path]:
    """The highest validation Dice of a training, and its checkpoint."""
    path = folder / "training_history.json"
    if not path.exists():
        raise SegkitError(
            f"{folder}: no training_history.json, no training run there; train first (train_unet.ipynb, or segkit "
            "train), or set CHECKPOINT to a file"
        )
    history = read_json(path, "not a training history: set CHECKPOINT to a file, or train again")
    try:
        epochs = [(UNSCORED if row["val_dice"] is None else row["val_dice"], row["epoch"]) for row in history["epochs"]]
        if not all(type(epoch) is int and is_score(score) for score, epoch in epochs):
            raise TypeError("an epoch or a Dice that is no number")
    except (KeyError, TypeError) as error:
        raise SegkitError(f"{path}: not a training history ({error!r})") from error
    there = [(score, epoch) for score, epoch in epochs if (folder / f"checkpoint_epoch{epoch}.pth").is_file()]
    if not there:
        raise SegkitError(f"{folder}: no checkpoint of an epoch in training_history.json; train first")
    score, epoch = max(there)
    return score, folder / f"checkpoint_epoch{epoch}.pth"
