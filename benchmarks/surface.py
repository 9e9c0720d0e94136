"""How fast scores in mm are, beside MONAI and surface-distance a structure at a time.

usage: python benchmarks/surface.py SUBJECT_DIR

The subject's labels against a copy shifted by SHIFT voxels, from code volumes on: the peers get the masks of one
structure after the other (MONAI on the whole volume, as its metrics are called; surface-distance crops by itself),
segkit gets all at once. All sides run in turns in one process and thread, medians of ROUNDS rounds after one that warms
up. Structures without a voxel are left out, since the peers warn of them or stop. Takes some minutes, nearly all
of them MONAI's.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread on all sides

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import surface_distance
import torch
from monai import metrics as monai_metrics

from segkit import metrics
from segkit.codes import CodeVolume
from segkit.errors import Findings
from segkit.reading import read_ct, read_labels, refuse
from segkit.subjects import find_subjects
from segkit.surface import surface_scores

SHIFT = (2, 1, 1)
TOLERANCE_MM = 3.0
ROUNDS = 3


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers' own, about deprecated functions
    reference, spacing_mm = read(Path(sys.argv[1]))
    shape = reference.codes.shape
    whole = np.pad(reference.codes, [(step, 0) for step in SHIFT])
    prediction = reference.with_codes(whole[tuple(slice(size) for size in shape)])
    pair, held = (reference, prediction), list(reference.boxes())
    everything, two = ("dice", "iou", "hd95_mm", "assd_mm", "nsd"), ("hd95_mm", "nsd")
    seconds, values = in_turns(
        {
            "segkit, Dice, IoU, HD95, ASSD, NSD (and HD, centroids)": lambda: by_segkit(*pair, spacing_mm).loc[held],
            "MONAI, the same five": lambda: one_by_one(*pair, held, monai_scores, spacing_mm, everything),
            "MONAI, HD95 and NSD": lambda: one_by_one(*pair, held, monai_scores, spacing_mm, two),
            "surface-distance, HD95 and NSD": lambda: one_by_one(*pair, held, deepmind_scores, spacing_mm, two),
        }
    )
    ours, *_ = seconds
    print(f"{len(held)} structures, {shape} voxels of {spacing_mm} mm, against a copy shifted by {SHIFT} voxels\n")
    print("| | seconds | times as long as segkit | largest difference from segkit |\n|---|---|---|---|")
    for name, taken in seconds.items():
        apart = ", ".join(
            f"{score} {abs(values[name][score] - values[ours][score]).max():.1g}" for score in values[name]
        )
        print(f"| {name} | {taken:.2f} | {taken / seconds[ours]:.1f} | {'' if name == ours else apart} |")


def read(folder: Path) -> tuple[CodeVolume, tuple[float, ...]]:
    """The labels (z, y, x) of a subject and the sides of a voxel in mm along these axes."""
    [subject] = [subject for subject in find_subjects(folder.resolve().parent)[0] if subject.name == folder.name]
    findings = Findings(subject.name)
    _, grid = read_ct(subject, findings)
    labels = read_labels(subject, grid, findings)
    refuse(findings)
    return labels.with_codes(np.ascontiguousarray(labels.codes.T)), tuple(grid.spacing_mm[::-1])


def by_segkit(reference: CodeVolume, prediction: CodeVolume, spacing_mm: Sequence[float]) -> pd.DataFrame:
    counts = metrics.code_pairs(reference, prediction).counts()
    ratios = {score: getattr(metrics, score)(counts["tp"], counts["fp"], counts["fn"]) for score in ("dice", "iou")}
    return surface_scores(reference, prediction, spacing_mm, TOLERANCE_MM).assign(**ratios)


def one_by_one(
    reference: CodeVolume,
    prediction: CodeVolume,
    names: Sequence[str],
    score: Callable,
    spacing_mm: Sequence[float],
    parts: Sequence[str],
) -> pd.DataFrame:
    rows = [score(reference.mask(name), prediction.mask(name), spacing_mm, parts) for name in names]
    return pd.DataFrame(rows, index=names)


def monai_scores(reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], parts: Sequence[str]):
    planes = {"y_pred": torch.from_numpy(prediction)[None, None], "y": torch.from_numpy(reference)[None, None]}
    whole = {**planes, "include_background": True}
    spaced = {**whole, "spacing": list(spacing_mm)}
    functions = {
        "dice": lambda: monai_metrics.compute_dice(**whole),
        "iou": lambda: monai_metrics.compute_iou(**whole),
        "hd95_mm": lambda: monai_metrics.compute_hausdorff_distance(**spaced, percentile=95),
        "assd_mm": lambda: monai_metrics.compute_average_surface_distance(**spaced, symmetric=True),
        "nsd": lambda: monai_metrics.compute_surface_dice(
            **spaced, class_thresholds=[TOLERANCE_MM], use_subvoxels=True
        ),
    }
    return {part: float(functions[part]()) for part in parts}


def deepmind_scores(reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], parts: Sequence[str]):
    """HD95 here weighs surface elements by their area, so that it differs from that of voxels."""
    distances = surface_distance.compute_surface_distances(reference, prediction, spacing_mm)
    functions = {
        "hd95_mm": lambda: surface_distance.compute_robust_hausdorff(distances, 95),
        "nsd": lambda: surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE_MM),
    }
    return {part: float(functions[part]()) for part in parts}


def in_turns(sides: dict[str, Callable]) -> tuple[dict[str, float], dict[str, pd.DataFrame]]:
    """Median seconds and result of each side, all run in turns after one round that warms up."""
    taken, results = {name: [] for name in sides}, {}
    for turn in range(ROUNDS + 1):
        for name, work in sides.items():
            started = time.perf_counter()
            results[name] = work()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}, results


if __name__ == "__main__":
    main()
