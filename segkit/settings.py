"""What a person changes about a training: plain data without torch, checked before anything starts."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from segkit.choices import LOSSES, MODELS, NORMS
from segkit.errors import SegkitError
from segkit.runs import resolve

SCHEDULES = ("poly", "cosine", "plateau", "constant")

if TYPE_CHECKING:  # for a person who types a name: --help lists those that there are
    Schedule: TypeAlias = str
    Model: TypeAlias = str
    Norm: TypeAlias = str
    Loss: TypeAlias = str
else:
    Schedule, Model, Norm, Loss = (Literal[tuple(names)] for names in (SCHEDULES, MODELS, NORMS, LOSSES))


@dataclass(frozen=True)
class Augmentation:
    """How far training slices are varied. Each is the largest change; 0 or False switches it off."""

    rotation_degrees: float = 15.0  # to either side
    scale: float = 0.15  # fraction: 0.15 draws a factor between 0.85 and 1.15
    shift: float = 0.05  # fraction of the larger side
    elastic_mm: float = 0.0  # mm, standard deviation of the control points of an elastic deformation
    flip_left_right: bool = False  # anatomically false (liver, heart): partner channels are swapped where it is on
    flip_up_down: bool = False  # front and back exchanged; anatomically false
    intensity_scale: float = 0.1  # fraction
    intensity_shift_hu: float = 20.0  # HU
    noise_hu: float = 15.0  # HU, largest standard deviation
    gamma: float = 0.0  # 0.2 draws an exponent between 1 / 1.2 and 1.2 for the HU between their ends
    blur_pixels: float = 0.0  # pixels of the target, largest standard deviation

    def checked(self) -> Augmentation:
        """These settings as plain numbers, or SegkitError that names the first that makes no sense."""
        values: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, bool):
                if not isinstance(value, bool):
                    raise SegkitError(f"AUGMENTATION: {f.name} = {value!r}: expected True or False")
                values[f.name] = value
            else:
                values[f.name] = _real(f"AUGMENTATION: {f.name}", value, 0, _LARGEST.get(f.name, 1e4))
        return Augmentation(**values)


_LARGEST = {"rotation_degrees": 180, "scale": 0.9, "shift": 0.5, "intensity_scale": 0.9, "gamma": 5, "blur_pixels": 5}
"""Beyond these nothing of a slice is left."""

NO_AUGMENTATION = Augmentation(0, 0, 0, 0, False, False, 0, 0, 0, 0, 0)


def make_augmentation(on: bool = True, changes: Mapping[str, Any] | None = None) -> Augmentation:
    """AUGMENT and AUGMENTATION of the notebook: the default with `changes`, or none. SegkitError for other names."""
    names = [f.name for f in fields(Augmentation)]
    unknown = sorted(set(changes or {}) - set(names))
    if unknown:
        raise SegkitError(f"AUGMENTATION names {', '.join(unknown)}; there are {', '.join(names)}")
    return replace(Augmentation() if on else NO_AUGMENTATION, **(changes or {} if on else {}))


@dataclass(frozen=True)
class TrainSettings:
    """What a person changes. Stored with every checkpoint."""

    epochs: int = 5  # of SLICES_PER_EPOCH slices each
    batch_size: int = 8  # slices (unet3d: slabs) a step of the optimiser
    learning_rate: float = 4e-3  # Adam's, at its highest
    schedule: Schedule = "poly"  # poly: (1 - progress) ** 0.9; plateau: halved when validation Dice stands still
    warmup_steps: int = 0  # steps over which the learning rate rises to LEARNING_RATE
    target_shape: tuple[int, int] = (256, 256)  # rows and columns that the network sees: multiples of 16
    model: Model = "unet"  # the network, see choices.MODELS; all but unet need MONAI
    features: tuple[int, ...] = (32, 64, 128, 256)  # channels of the U-Net's levels
    norm: Norm = "instance"  # of unet: normalisation of each slice alone, or over the "batch"
    patch_slices: int = 16  # unet3d: neighbouring slices that it takes and labels together, a slab
    loss: Loss = "bce_dice"  # cross-entropy and Dice, one alone, focal; textbook: plain BCE (choices.LOSSES)
    positive_weight_cap: float = 100.0  # how much more an inside pixel may count; 1 is plain cross-entropy
    gradient_clip: float = 0.0  # largest norm of the gradient; 0: any
    accumulate: int = 1  # parts in which a batch is computed, one after the other, to save memory
    augmentation: Augmentation = field(default_factory=Augmentation)
    context: int = 0  # neighbouring slices on each side that the network sees too: 1 gives 3 input channels
    slices_per_epoch: int | None = None  # slices (unet3d: slabs) drawn for an epoch; None: as many as there are
    balance: float = 1.0  # share of an epoch's slices drawn so that rare structures come as often as common ones
    validation_slices: int | None = None  # slices (unet3d: slabs) scored after each epoch; None: all of them
    early_stopping: int | None = None  # epochs without a better validation Dice after which training ends; None: never
    keep_checkpoints: int | None = 20  # how many stay, the newest, beside the best one; None: of every epoch
    init_checkpoint: str | None = None  # start from these weights, channels matched by name
    seed: int = 0  # of all that is drawn: phantoms, subjects, split, order, augmentation, first weights
    device: str | None = None  # cpu, cuda, cuda:1 or mps; None: the best there is
    workers: int = 0  # processes that read slices ahead

    def checked(self) -> TrainSettings:
        """These settings with shapes as tuples, or SegkitError that names the first that makes no sense."""
        features = _whole_numbers("FEATURES", self.features, "(32, 64, 128, 256)")
        target_shape = check_target_shape(self.target_shape, len(features))
        for name in ("epochs", "batch_size", "accumulate", "patch_slices"):
            _check_whole(name, getattr(self, name), 1)
        for name in ("slices_per_epoch", "validation_slices", "early_stopping", "keep_checkpoints"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1)
        for name in ("seed", "workers", "warmup_steps", "context"):
            _check_whole(name, getattr(self, name), 0)
        if self.accumulate > self.batch_size:
            raise SegkitError(f"ACCUMULATE = {self.accumulate}: more parts than BATCH_SIZE = {self.batch_size} slices")
        for name, known in (
            ("schedule", SCHEDULES), ("loss", LOSSES), ("model", MODELS), ("norm", NORMS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise SegkitError(f"{name.upper()} = {getattr(self, name)!r}: expected one of {', '.join(known)}")
        _check_model(self.model, features, self.patch_slices, self.context)
        if not isinstance(self.augmentation, Augmentation):
            raise SegkitError(f"AUGMENTATION = {self.augmentation!r}: expected a segkit.settings.Augmentation")
        # plain types: those of numpy cannot be stored in a checkpoint that holds data alone
        return replace(
            self,
            target_shape=target_shape,
            features=features,
            learning_rate=_real("learning_rate", self.learning_rate, 1e-30, 1e30),
            gradient_clip=_real("gradient_clip", self.gradient_clip, 0, 1e30),
            balance=_real("balance", self.balance, 0, 1),
            positive_weight_cap=_real("positive_weight_cap", self.positive_weight_cap, 1, 1e30),
            augmentation=self.augmentation.checked(),
            init_checkpoint=None if self.init_checkpoint is None else str(self.init_checkpoint),
        )

    @property
    def depth(self) -> int:
        """How many slices the network labels at a time."""
        return self.patch_slices if MODELS[self.model].slabs else 1


def from_notebook(names: Mapping[str, Any]) -> TrainSettings:
    """The settings in a notebook's configuration cells, checked: `epochs` is EPOCHS there, and so on.

    names: its `globals()`. Read at each call: what was changed in a configuration cell counts from then on. Raises
    SegkitError for a setting that is not there, and as `TrainSettings.checked`.
    """
    own = [f.name.upper() for f in fields(TrainSettings)]
    lacking = [name for name in (*own, "AUGMENT") if name not in names]
    if lacking:
        raise SegkitError(f"{', '.join(lacking)}: not set; run the configuration cells first")
    values = {name.lower(): names[name] for name in own}
    values["augmentation"] = make_augmentation(names["AUGMENT"], names["AUGMENTATION"])
    if values["init_checkpoint"]:
        values["init_checkpoint"] = str(resolve(values["init_checkpoint"]))
    return TrainSettings(**values).checked()


@dataclass(frozen=True)
class Scoring:
    """What a person chooses about scores; the table names it in its columns."""

    detected_dice: float = 0.1  # from this Dice on a structure counts as found
    tolerance_mm: float = 3.0  # surface Dice: how far apart surfaces may lie
    jobs: int = 1  # subjects staged, and structures measured, at the same time

    def checked(self) -> Scoring:
        """Itself; SegkitError that names the setting, what was expected and what was found."""
        _real("detected_dice", self.detected_dice, 1e-6, 1)  # at 0 everything would be found
        _real("tolerance_mm", self.tolerance_mm, 1e-6, 1e6)
        _check_whole("jobs", self.jobs, 1)
        return self


SCORING = Scoring()
"""The usual one."""


@dataclass(frozen=True)
class Segmenting:
    """What a person chooses about the segmentation of a scan of their own."""

    mirror: bool = False  # also predict each mirrored slice and average: twice the time
    largest: bool = False  # of each structure its largest piece alone, where it comes in one
    uncertainty: bool = False  # keep how unsure the model is at each voxel, 0 to 1 bit


def _check_model(model: str, features: tuple[int, ...], patch_slices: int, context: int) -> None:
    kind, step = MODELS[model], 2 ** len(features)
    if min(features) < kind.least_channels:
        raise SegkitError(f"FEATURES = {features}: for {model} give {kind.least_channels} or more for each level")
    if len(features) < kind.least_levels:
        raise SegkitError(f"FEATURES = {features}: {model} has {kind.least_levels} levels or more")
    if kind.slabs and context:
        raise SegkitError(f"CONTEXT = {context}: {model} sees neighbours in its PATCH_SLICES already: set CONTEXT = 0")
    if kind.slabs and patch_slices % step:
        raise SegkitError(
            f"PATCH_SLICES = {patch_slices}: FEATURES halve a slab {len(features)} times: give a multiple of {step}"
        )


LARGEST_SIDE = 8192  # pixels; scanners make slices of 512, up to 2048


def check_target_shape(shape: Sequence[int], levels: int = 4) -> tuple[int, int]:
    """TARGET_SHAPE, a tuple or list, as (rows, columns).

    SegkitError unless `levels` halvings leave whole pixels, two or more, and for sides above LARGEST_SIDE.
    """
    step = 2**levels
    sides = _whole_numbers("TARGET_SHAPE", shape, "(256, 256)")
    if len(sides) != 2 or min(sides) < step or any(side % step for side in sides):
        raise SegkitError(f"TARGET_SHAPE = {sides}: FEATURES halve it {levels} times: give two multiples of {step}")
    if max(sides) > LARGEST_SIDE:
        raise SegkitError(f"TARGET_SHAPE = {sides}: at most {LARGEST_SIDE} pixels a side")
    if max(sides) == step:
        raise SegkitError(f"TARGET_SHAPE = {sides}: FEATURES halve it {levels} times, to one pixel: give a larger one")
    return sides


def changed(settings: TrainSettings, stored: dict) -> list[str]:
    """The names of the settings in which these differ from stored ones (`dataclasses.asdict`, through JSON or not)."""
    differing, defaults = [], TrainSettings()
    for name in (f.name for f in fields(settings)):
        # a setting, or an entry of AUGMENTATION, that was not there yet did what its default does
        default = _plain(getattr(defaults, name))
        before = _plain(stored.get(name, default))
        if isinstance(default, dict) and isinstance(before, dict):
            before = {**default, **before}
        if _plain(getattr(settings, name)) != before:
            differing.append(name)
    return differing


def _plain(value: object) -> object:
    if isinstance(value, Augmentation):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _whole_numbers(name: str, value: Sequence[int], example: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in value)
    except (TypeError, ValueError, OverflowError):
        raise SegkitError(f"{name} = {value!r}: expected whole numbers like {example}") from None
    if not numbers or min(numbers) < 1 or numbers != tuple(value):
        raise SegkitError(f"{name} = {value!r}: expected whole numbers of 1 or more, like {example}")
    return numbers


def _real(name: str, value: Any, least: float, most: float) -> float:
    usable = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not usable or not least <= value <= most:
        shown = name if ":" in name else name.upper()
        raise SegkitError(f"{shown} = {value!r}: expected a number from {least:g} to {most:g}")
    return float(value)


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SegkitError(f"{name.upper()} = {value!r}: expected a whole number of {least} or more")
