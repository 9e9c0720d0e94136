"""Are the phantoms a fair exercise? Two voters that never look at shape, and what they reach on unseen subjects.

`python benchmarks/phantom_baselines.py --subjects 16 --seed 0 --detail 1` makes phantoms in a temporary folder, lets
the train subjects vote and prints the macro Dice on the test subjects: per structure the mean over test subjects
whose reference holds it, then the mean over structures. The HU voter knows the brightness of a voxel alone, the
position voter its place in the bounding box of the body alone. Both must stay below 0.5; exits with 1 if not.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import find_objects, label

from segkit import phantom
from segkit.labels import official_names

NAMES = official_names("v2")
LIMIT = 0.5
BIN_HU = 5
FRAME = (48, 32, 72)  # cells of the body's bounding box along x, y, z


def read_subject(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """HU (int16) and labels (uint8, 0 background, else 1 + index in NAMES; the later of two overlapping masks)."""

    def canonical(path: Path) -> np.ndarray:
        return np.asanyarray(nib.as_closest_canonical(nib.load(path)).dataobj)

    hu = canonical(folder / "ct.nii.gz")
    labels = np.zeros(hu.shape, np.uint8)
    for code, name in enumerate(NAMES, 1):
        labels[canonical(folder / "segmentations" / f"{name}.nii.gz") > 0] = code
    return hu, labels


def hu_keys(hu: np.ndarray) -> np.ndarray:
    """The HU bin of each voxel."""
    return np.clip((hu.astype(np.int32) + 1024) // BIN_HU, 0, 799)


def position_keys(hu: np.ndarray) -> np.ndarray:
    """The cell of each voxel in the bounding box of the body, the largest component above -300 HU."""
    parts, _ = label(hu > -300)
    body = int(np.argmax(np.bincount(parts.ravel())[1:])) + 1
    box = find_objects(parts, max_label=body)[body - 1]
    cells = [
        np.clip((np.arange(size) - side.start) * cells // (side.stop - side.start), -1, cells)
        for size, side, cells in zip(hu.shape, box, FRAME, strict=True)
    ]
    x, y, z = np.ix_(*cells)
    inside = (x >= 0) & (y >= 0) & (z >= 0) & (x < FRAME[0]) & (y < FRAME[1]) & (z < FRAME[2])
    key = (x * FRAME[1] + y) * FRAME[2] + z
    return np.where(inside, key, np.prod(FRAME))


def vote(train: list[Path], keys_of: Callable[[np.ndarray], np.ndarray], keys: int) -> np.ndarray:
    """How often each key (rows) shows each label (columns) in the train subjects."""
    codes = len(NAMES) + 1
    counts = np.zeros(keys * codes, np.int64)
    for folder in train:
        hu, labels = read_subject(folder)
        counts += np.bincount((keys_of(hu) * codes + labels).ravel(), minlength=keys * codes)
    return counts.reshape(keys, codes)


def macro_dice(test: list[Path], keys_of: Callable[[np.ndarray], np.ndarray], choice: np.ndarray) -> float:
    """Macro Dice of the labels that `choice` gives to the keys of each voxel."""
    scores = np.full((len(test), len(NAMES)), np.nan)
    codes = len(NAMES) + 1
    for row, folder in enumerate(test):
        hu, truth = read_subject(folder)
        guess = choice[keys_of(hu)]
        table = np.bincount((truth.astype(np.int64) * codes + guess).ravel(), minlength=codes**2).reshape(codes, codes)
        held, said, both = table.sum(1)[1:], table.sum(0)[1:], np.diag(table)[1:]
        scores[row] = np.where(held > 0, 2 * both / np.maximum(held + said, 1), np.nan)
    seen = ~np.isnan(scores).all(0)
    return float(np.nanmean(scores[:, seen], axis=0).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--detail", type=float, default=1.0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = phantom.write_phantoms(folder, chosen.subjects, chosen.seed, detail=chosen.detail)
        with open(Path(folder) / "meta.csv", encoding="utf-8-sig", newline="") as file:
            split = {row["image_id"]: row["split"] for row in csv.DictReader(file, delimiter=";")}
        train, test = ([path for path in paths if split[path.name] == name] for name in ("train", "test"))
        print(f"{len(train)} train and {len(test)} test subjects of seed {chosen.seed} at detail {chosen.detail:g}")
        best = 0.0
        for voter, keys_of, keys in (("HU", hu_keys, 800), ("position", position_keys, int(np.prod(FRAME)) + 1)):
            counts = vote(train, keys_of, keys)
            shares = counts / np.maximum(counts.sum(0), 1)
            for rule, table in (("majority", counts), ("balanced over structures", shares)):
                score = macro_dice(test, keys_of, table.argmax(1))
                best = max(best, score)
                print(f"voting by {voter}, {rule}: macro Dice {score:.3f}")
    print(f"limit {LIMIT}: {'kept' if best < LIMIT else 'BROKEN'}")
    return 0 if best < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
