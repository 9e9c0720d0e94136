"""Which recipe learns most in a given time: one row a variant, trained alike and scored on unseen subjects.

usage: python -m benchmarks.learning DATA_DIR STAGE_DIR [--seconds 150] [--seed 0] [--only NAME ...]

Each variant gets as many steps as fit into the seconds, by the mean time of its own steps on an idle machine. The
score is the headline: macro Dice of the test subjects on their own grids (the slabs left out, for a single subject).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from segkit import devices, evaluation, slices, steps, summaries, training
from segkit.checkpoints import load_checkpoints
from segkit.dataset import Data, open_data
from segkit.inference import Predictor
from segkit.ranks import Ranks
from segkit.settings import NO_AUGMENTATION, TrainSettings

CALIBRATION_SECONDS = 60

BASE = TrainSettings(epochs=1, batch_size=8, target_shape=(64, 96), features=(16, 32, 64, 128), balance=1.0)
VARIANTS = {
    "base": {},
    "textbook": {"loss": "textbook", "norm": "batch", "balance": 0.0, "augmentation": NO_AUGMENTATION},
    "batch normalisation": {"norm": "batch"},
    "plain BCE": {"loss": "bce", "positive_weight_cap": 1.0},
    "unbalanced": {"balance": 0.0},
    "half balanced": {"balance": 0.5},
    "full width": {"features": (32, 64, 128, 256)},
    "BCE alone": {"loss": "bce"},
    "BCE alone, learning rate 2e-3": {"loss": "bce", "learning_rate": 2e-3},
    "Dice alone": {"loss": "dice"},
    "focal": {"loss": "focal"},
    "two neighbours": {"context": 1},
    "no augmentation": {"augmentation": NO_AUGMENTATION},
    "learning rate 2e-3": {"learning_rate": 2e-3},
    "learning rate 8e-3": {"learning_rate": 8e-3},
    "cosine": {"schedule": "cosine"},
    "batch of 16": {"batch_size": 16},
    "attention gates": {"model": "attention_unet"},
    "3D, slabs of 16": {"model": "unet3d", "batch_size": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("stage_dir", type=Path)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    chosen = parser.parse_args()
    data = open_data(chosen.data_dir, chosen.stage_dir, progress=False)
    print("| variant | steps | validation Dice | headline | structures above 0.5 |\n|---|---|---|---|---|", flush=True)
    for name in chosen.only:
        settings = replace(BASE, seed=chosen.seed, **VARIANTS[name])
        steps = int(chosen.seconds / seconds_a_step(data, settings))
        settings = replace(settings, slices_per_epoch=steps * settings.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            [row] = training.train(data, settings, folder, progress=False)
            predictor = Predictor.of(load_checkpoints(folder))
        evaluated = evaluation.evaluate(predictor, data.staged, data.split.test, data.split.test_name, progress=False)
        table = summaries.per_structure(evaluated.scores)
        headline, above = summaries.summarize(evaluated.scores)["macro_dice"], table["dice"] > 0.5
        print(f"| {name} | {steps} | {row['val_dice']:.3f} | {headline:.3f} | {above.sum()} |", flush=True)


def seconds_a_step(data: Data, settings: TrainSettings) -> float:
    """The mean of the steps of CALIBRATION_SECONDS after two that warm up, loading and augmentation included."""
    learner = steps.Learner(data, settings.checked(), Ranks(devices.pick_device(settings.device)))
    learning = slices.SliceDataset(data.staged, data.split.train, data.label_map, settings.context)
    order = [7 * number % len(learning) for number in range(1000 * settings.batch_size)]
    begun = 0.0
    for number, batch in enumerate(slices.batches(learning, order, settings.batch_size)):
        learner.step(batch, 1, settings.learning_rate)
        if number < 2:
            begun = time.perf_counter()
        elif time.perf_counter() - begun > CALIBRATION_SECONDS:
            break
    return (time.perf_counter() - begun) / (number - 1)


if __name__ == "__main__":
    main()
