"""What missing masks cost: a data set in which half of the training subjects lack half of the structures.

usage: python -m benchmarks.partial_annotation DATA_DIR WORK_DIR [--steps 700] [--seeds 3] [--groups organs ...]

Trains with all masks and without those, alike, and scores the unseen subjects on the structures that were left out.
What a structure without a file means: it was not annotated, so nothing is learned from that subject about it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from segkit import evaluation, summaries, training
from segkit.checkpoints import load_checkpoints
from segkit.dataset import Data, open_data
from segkit.inference import Predictor
from segkit.labels import group_of, official_names
from segkit.settings import TrainSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="fully annotated subjects with a meta.csv")
    parser.add_argument("work_dir", type=Path, help="for the copy and both stores")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--groups", nargs="*", help="train on the structures of these groups only")
    chosen = parser.parse_args()
    names = [name for name in official_names("v2") if group_of(name) in chosen.groups] if chosen.groups else None
    whole = open_data(chosen.data_dir, chosen.work_dir / "staged", structures=names, progress=False)
    lacking = sorted(whole.label_map)[::2]
    train = [part.subject for part in whole.split.train]
    folder = without_masks(chosen.data_dir, chosen.work_dir / "half", train[::2], lacking)
    half = open_data(folder, chosen.work_dir / "staged_half", structures=names, progress=False)
    print(
        f"{len(train[::2])} of {len(train)} training subjects lack {len(lacking)} of {len(whole.label_map)} structures"
    )
    print("| seed | all masks | half without half | difference |\n|---|---|---|---|", flush=True)
    rows = []
    for seed in range(chosen.seeds):
        rows.append([dice_of(data, lacking, chosen.steps, seed) for data in (whole, half)])
        print(f"| {seed} | {rows[-1][0]:.3f} | {rows[-1][1]:.3f} | {rows[-1][1] - rows[-1][0]:+.3f} |", flush=True)
    both = [statistics.mean(column) for column in zip(*rows, strict=True)]
    print(f"| mean | {both[0]:.3f} | {both[1]:.3f} | {both[1] - both[0]:+.3f} |")


def without_masks(data_dir: Path, folder: Path, subjects: list[str], lacking: list[str]) -> Path:
    """A copy of a data set, of links, in which `subjects` have no file of the structures `lacking`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        data_dir, folder, copy_function=lambda source, target: Path(target).symlink_to(Path(source).resolve())
    )
    for subject in subjects:
        for structure in lacking:
            (folder / subject / "segmentations" / f"{structure}.nii.gz").unlink()
    return folder


def dice_of(data: Data, structures: list[str], steps: int, seed: int) -> float:
    """Mean Dice of `structures` on the unseen subjects after `steps` steps."""
    settings = TrainSettings(
        epochs=1, target_shape=(64, 96), features=(16, 32, 64, 128), seed=seed, slices_per_epoch=8 * steps
    )
    with tempfile.TemporaryDirectory() as folder:
        training.train(data, settings, folder, progress=False)
        predictor = Predictor.of(load_checkpoints(folder))
    evaluated = evaluation.evaluate(predictor, data.staged, data.split.test, data.split.test_name, progress=False)
    table = summaries.per_structure(evaluated.scores).set_index("structure")
    return float(table.loc[structures, "dice"].mean())


if __name__ == "__main__":
    main()
