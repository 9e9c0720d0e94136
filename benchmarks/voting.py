"""Are data a fair exercise? Two voters that never look at shape, and what they reach on unseen scans.

usage: python -m benchmarks.voting [--subjects 16] [--seed 0] [--detail 1]

The HU voter knows the brightness of a voxel alone, the position voter its place in the bounding box of the body alone.
Training scans vote, unseen ones are scored: macro Dice, as everywhere. On phantoms both must stay below LIMIT; exits
with 1 if not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import find_objects, label

from segkit import evaluation, phantom, summaries
from segkit.codes import CodeVolume, smallest_dtype
from segkit.dataset import Data, open_data
from segkit.staging import StagedSubject

LIMIT = 0.5
BIN_HU = 5
BINS = 800
FRAME = (72, 32, 48)  # cells of the body's bounding box along z, y, x

Keys = Callable[[np.ndarray], np.ndarray]


def hu_keys(hu: np.ndarray) -> np.ndarray:
    """The HU bin of each voxel."""
    return np.clip((hu.astype(np.int32) + 1024) // BIN_HU, 0, BINS - 1)


def position_keys(hu: np.ndarray, frame: tuple[int, int, int] = FRAME) -> np.ndarray:
    """The cell of each voxel in the bounding box of the body, the largest component above -300 HU."""
    parts, _ = label(hu > -300)
    body = int(np.argmax(np.bincount(parts.ravel())[1:])) + 1
    box = find_objects(parts, max_label=body)[body - 1]
    cells = [
        np.clip((np.arange(size) - side.start) * cells // (side.stop - side.start), -1, cells)
        for size, side, cells in zip(hu.shape, box, frame, strict=True)
    ]
    z, y, x = np.ix_(*cells)
    inside = (z >= 0) & (y >= 0) & (x >= 0) & (z < frame[0]) & (y < frame[1]) & (x < frame[2])
    return np.where(inside, (z * frame[1] + y) * frame[2] + x, np.prod(frame))


@dataclass
class Voter:
    """What each key most often was. `predict` as `inference.Predictor` has it, so that it is scored in the same way."""

    keys_of: Keys
    choice: np.ndarray  # label of each key: 0 background, else 1 + the place in structures
    structures: tuple[str, ...]

    def predict(self, subject: StagedSubject) -> CodeVolume:
        codes = self.choice[self.keys_of(subject.hu())].astype(smallest_dtype(len(self.structures) + 1))
        return single_labels(codes, self.structures)


def single_labels(codes: np.ndarray, structures: Sequence[str]) -> CodeVolume:
    """Labels 0 (background), 1, 2, ... of `structures` as a code volume."""
    members = np.vstack([np.zeros((1, len(structures)), bool), np.eye(len(structures), dtype=bool)])
    return CodeVolume(codes, members, tuple(structures))


def vote(data: Data, keys_of: Keys, keys: int) -> np.ndarray:
    """How often each key (rows) shows each label (columns) in the training scans; of overlaps the later structure."""
    structures = sorted(data.label_map, key=data.label_map.get)
    numbers = {name: number for number, name in enumerate(structures, 1)}
    width = len(structures) + 1
    counts = np.zeros(keys * width, np.int64)
    for part in data.split.train:
        subject = data.staged[part.subject]
        volume, zs = subject.labels(), part.slices(subject.shape[0])
        labels = volume.lookup({name: numbers[name] for name in volume.structures if name in numbers})[volume.codes]
        pairs = keys_of(subject.hu())[zs] * width + labels[zs]
        counts += np.bincount(pairs.ravel(), minlength=keys * width)
    return counts.reshape(keys, width)


def voters(data: Data, frame: tuple[int, int, int] = FRAME) -> dict[str, Voter]:
    """Both voters, each by majority and with structures weighted so that all are as frequent."""
    structures = tuple(sorted(data.label_map, key=data.label_map.get))
    made = {}
    for name, keys_of, keys in (
        ("HU", hu_keys, BINS),
        ("position", lambda hu: position_keys(hu, frame), int(np.prod(frame)) + 1),
    ):
        counts = vote(data, keys_of, keys)
        shares = counts / np.maximum(counts.sum(0), 1)
        for rule, table in (("majority", counts), ("balanced over structures", shares)):
            made[f"voting by {name}, {rule}"] = Voter(keys_of, table.argmax(1), structures)
    return made


def headline(data: Data, predictor) -> dict:
    """`summaries.summarize` of the test part, predicted by anything that has `predict`."""
    evaluated = evaluation.evaluate(predictor, data.staged, data.split.test, data.split.test_name, progress=False)
    return summaries.summarize(evaluated.scores)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--detail", type=float, default=1.0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "phantoms"
        phantom.write_phantoms(folder, chosen.subjects, chosen.seed, detail=chosen.detail)
        data = open_data(folder, Path(scratch) / "staged", progress=False)
        best = 0.0
        for name, voter in voters(data).items():
            score = headline(data, voter)["macro_dice"]
            best = max(best, score)
            print(f"{name}: macro Dice {score:.3f}")
    print(f"limit {LIMIT}: {'kept' if best < LIMIT else 'BROKEN'}")
    return 0 if best < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
