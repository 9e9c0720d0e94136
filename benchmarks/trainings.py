"""The trainings that are compared: segkit's and the textbook's in this process, nnU-Net's by its commands."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from segkit.dataset import Data
    from segkit.settings import TrainSettings

BATCHES = {"torso": 4, "phantoms": 8}
ITERATIONS = 25
"""Of an epoch of nnU-Net's; its usual 250 would not end in time."""
CALIBRATION = 6
"""Epochs from which nnU-Net's number of epochs is chosen; the first half of them are slower."""
FEATURES = (16, 32, 64, 128)
SHAPES = {"torso": (112, 128), "phantoms": (64, 96)}
STRONG = {
    "rotation_degrees": 20, "scale": 0.2, "elastic_mm": 8, "gamma": 0.3, "blur_pixels": 0.7, "intensity_scale": 0.15,
    "intensity_shift_hu": 30, "noise_hu": 25,
}  # fmt: skip
"""Augmentation where one scan is all there is: docs/learning.md."""
ADAM = 2e-3
"""Of nnU-Net's network where it does not learn by its own SGD."""
LEARNING_RATES = {"torso": 2e-3, "phantoms": 4e-3}
"""Half of the default for half of its batch: docs/learning.md."""


def settings_of(name: str, which: str, device: str | None) -> TrainSettings:
    """The recipe of docs/learning.md for one scan, that of make demo for phantoms, or the textbook's."""
    from segkit.settings import NO_AUGMENTATION, TrainSettings, make_augmentation

    base = TrainSettings(
        epochs=1, batch_size=BATCHES[name], target_shape=SHAPES[name], features=FEATURES,
        device=device, augmentation=make_augmentation(True, STRONG if name == "torso" else None), keep_checkpoints=None,
        learning_rate=LEARNING_RATES[name],
    )  # fmt: skip
    if which != "textbook":
        return base
    return replace(base, loss="textbook", norm="batch", balance=0.0, augmentation=NO_AUGMENTATION,
                   schedule="constant", learning_rate=1e-3, validation_slices=32)  # fmt: skip


def segkit(
    data_dir: str, stage_dir: str, name: str, which: str, run: str, seconds: float, slices: int | None,
    device: str | None,
) -> Callable[[], dict]:  # fmt: skip
    """Train for `seconds` (textbook, time) or on `slices` (slices), then score the unseen part."""
    from benchmarks.learning import seconds_a_step
    from segkit import trainer, training
    from segkit.dataset import open_data

    data = open_data(data_dir, stage_dir, progress=False)
    settings = settings_of(name, which, device)
    validating, validate = [], trainer.validate

    def timed(*arguments, **named):
        started = time.perf_counter()
        result = validate(*arguments, **named)
        validating.append(time.perf_counter() - started)
        return result

    trainer.validate = timed

    def training_seconds(rows: list[dict]) -> float:
        return sum(row["seconds"] for row in rows) - sum(validating[: len(rows)])

    def work() -> dict:
        wanted = slices
        if which != "slices":
            wanted = BATCHES[name] * max(1, round(seconds / seconds_a_step(data, settings)))
        # of a constant learning rate the model on the way is the one of a shorter training
        part, epochs = epochs_of(wanted, slices if which == "textbook" else None)
        history = training.train(data, replace(settings, slices_per_epoch=part, epochs=epochs), run, progress=False)
        found = {**scored(data, Path(run) / f"checkpoint_epoch{epochs}.pth"), "slices": part * epochs}
        if epochs > 1:
            found["earlier"] = {**scored(data, Path(run) / "checkpoint_epoch4.pth"), "slices": 4 * part,
                                "seconds": training_seconds(history[:4])}  # fmt: skip
        return {**found, "seconds": training_seconds(history)}

    return work


def epochs_of(wanted: int, on_the_way: int | None) -> tuple[int, int]:
    """Slices an epoch and epochs of a training on `wanted` slices that has seen `on_the_way` after its fourth epoch."""
    if on_the_way is None or on_the_way >= wanted:
        return wanted, 1
    whole = max(BATCHES.values())  # all batches are full, of either size
    part = max(whole, on_the_way // 4 // whole * whole)
    return part, max(4, round(wanted / part))


def scored(data: Data, checkpoint: Path) -> dict:
    from segkit.checkpoints import load_checkpoints
    from segkit.inference import Predictor

    return score_of(data, Predictor.of(load_checkpoints(checkpoint)))


def score_of(data: Data, predictor) -> dict:
    """Macro Dice of the test part, how many structures reach 0.5, and the Dice of those that training could learn."""
    from segkit import evaluation, summaries
    from segkit.slices import SliceDataset

    seen = SliceDataset(data.staged, data.split.train, data.label_map).holds.any(0)
    learnable = [structure for structure, channel in data.label_map.items() if seen[channel]]
    evaluated = evaluation.evaluate(predictor, data.staged, data.split.test, data.split.test_name, progress=False)
    summary, table = summaries.summarize(evaluated.scores), summaries.per_structure(evaluated.scores)
    learned = table.set_index("structure")["dice"].reindex(learnable)
    return {
        "score": summary["macro_dice"],
        "structures": summary["structures"],
        "above": int((table["dice"] > 0.5).sum()),
        "learnable": int(learned.notna().sum()),
        "score_of_learnable": float(learned.mean()),
    }


def nnunet(
    data_dir: str,
    stage_dir: str,
    name: str,
    seconds: float,
    device: str,
    home: str,
    python: str,
    threads: int,
    adam: float | None = None,
) -> Callable[[], dict]:
    """nnU-Net's commands from raw data to a score. Its training lasts `seconds` by the time of its own epochs.

    With `adam` its network, loss and augmentation learn by Adam at that rate, on patches of half its size: what so
    short a training can do, where its own SGD cannot begin.
    """
    from benchmarks import inputs
    from benchmarks.nnunet import NnUNet
    from segkit.dataset import open_data

    data = open_data(data_dir, stage_dir, progress=False)
    prepared = NnUNet(Path(home), python, threads, device)
    structures = inputs.write_single_labels(data, prepared.raw, {"Tr": data.split.train, "Ts": data.split.test})

    def work() -> dict:
        prepare_s = prepared.prepare({"batch_size": BATCHES[name]})
        plan = prepared.plan()
        levels = plan["architecture"]["arch_kwargs"]["n_stages"]
        plan["architecture"]["arch_kwargs"]["features_per_stage"] = [
            min(FEATURES[0] * 2**level, 2 * FEATURES[-1]) for level in range(levels)
        ]
        patch = plan["patch_size"]
        if adam is not None:
            step = 2 ** (levels - 1)  # it halves a patch so often
            patch = [max(1, round(side / 2 / step)) * step for side in patch]
        changes = {"batch_size": BATCHES[name], "architecture": plan["architecture"], "patch_size": patch}
        prepared.configure(changes)
        warm = prepared.train(CALIBRATION, ITERATIONS, adam)[CALIBRATION // 2 :]
        epochs = max(2, round(seconds / statistics.median(warm)))
        started = time.perf_counter()
        training_s = sum(prepared.train(epochs, ITERATIONS, adam))
        train_s = time.perf_counter() - started
        predictions = Path(home) / "predictions"
        predict_s = prepared.predict(prepared.raw / "imagesTs", predictions)
        return {
            **score_of(data, Kept(data, predictions, structures)),
            "seconds": training_s, "slices": epochs * ITERATIONS * BATCHES[name], "prepare_s": prepare_s,
            "train_s": train_s, "predict_s": predict_s, "levels": levels,
            "patch": " x ".join(map(str, patch)),
        }  # fmt: skip

    return work


class Kept:
    """nnU-Net's label files as predictions; `predict` as `inference.Predictor` has it."""

    def __init__(self, data: Data, folder: Path, structures: list[str]):
        self.parts = {part.subject: part for part in data.split.test}
        self.data, self.folder, self.structures = data, folder, structures

    def predict(self, subject):
        import nibabel as nib

        from benchmarks.inputs import cases_of
        from benchmarks.voting import single_labels

        codes = np.zeros(subject.shape, np.uint8)
        for case, (start, stop) in cases_of(self.data, self.parts[subject.name]).items():
            image = nib.load(self.folder / f"{case}.nii.gz")
            codes[start:stop] = np.asanyarray(image.dataobj).T
        return single_labels(codes, self.structures)
