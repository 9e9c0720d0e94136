"""Scores in mm of all structures of a subject, from masks in memory on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.sides import Side
from benchmarks.tables import Table, floor_row, rows_of

if TYPE_CHECKING:
    from benchmarks.bench import Bench  # of segkit's environment

SHIFT = (2, 1, 1)  # voxels (z, y, x)
TOLERANCE_MM = 3.0
Scores = dict[str, dict[str, float]]


def measure(bench: Bench) -> Table:
    [subject] = bench.open(bench.subject_dir).staged.values()
    volume = subject.labels()
    held = list(volume.boxes())
    pair = bench.scratch / "pair.npz"
    np.savez(
        pair, codes=volume.codes, codebook=volume.codebook, structures=volume.structures, spacing=subject.spacing_mm,
        held=held,
    )  # fmt: skip
    parameters = {"path": str(pair)}
    sides = [
        Side("segkit: Dice, IoU, HD95, HD, ASSD, surface Dice, centroids", "benchmarks.scoring:segkit", parameters),
        Side("surface-distance: HD95, surface Dice", "benchmarks.scoring:deepmind", parameters, "peer"),
        Side("TotalSegmentator's evaluation: Dice, surface Dice", "benchmarks.scoring:totalsegmentator", parameters,
             "peer"),
        Side("MONAI: HD95, surface Dice", "benchmarks.scoring:monai_two", parameters, "peer", rounds=1),
        Side("MONAI: Dice, IoU, HD95, ASSD, surface Dice", "benchmarks.scoring:monai_five", parameters, "peer",
             rounds=1),
    ]  # fmt: skip
    taken = bench.turns(sides)
    ours = taken[sides[0].name].found
    apart = {side.name: _apart(taken[side.name].found, ours) for side in sides if side.kind == "peer"}
    rows = rows_of(sides, taken, apart)
    machine = bench.store.kept("machine")
    if machine:
        seconds = 2 * volume.codes.nbytes / machine["rates"]["memory_gb_s"] / 1e9
        rows.append(floor_row("reading both label volumes once from memory", seconds, rows))
    what = (
        f"{len(held)} structures that a subject of {bench.scan_name(volume.codes.shape[::-1])} voxels (made of "
        f"{bench.data_name}) holds, against a copy shifted by {SHIFT} voxels, {TOLERANCE_MM:g} mm tolerance. segkit "
        "gets codes, the peers masks one structure after the other: what unpacks them is part of their time."
    )
    notes = [
        "HD95 of surface-distance weighs surface elements by their area, so that it differs from that of voxels. "
        "TotalSegmentator's evaluation is written here from its resources/evaluate.py: whole masks, Dice from their "
        "sums, surface Dice by surface-distance."
    ]
    return Table("scoring", f"Score {len(held)} structures", what, rows, notes)


def _apart(theirs: Scores, ours: Scores) -> str:
    """How far scores are from segkit's at most."""
    pairs = [(score, abs(value - ours[name][score])) for name, of in theirs.items() for score, value in of.items()]
    largest = {score: max(gap for other, gap in pairs if other == score) for score in dict(pairs)}
    return "largest difference from segkit: " + ", ".join(f"{k} {v:.1g}" for k, v in largest.items()) if pairs else ""


class Pair:
    """The subject's codes and the shifted ones, with the masks of each structure."""

    def __init__(self, path: str):
        content = np.load(path)
        self.codes, self.codebook = content["codes"], content["codebook"]
        self.structures, self.held = content["structures"].tolist(), content["held"].tolist()
        self.spacing_mm = content["spacing"].tolist()
        self.shifted = shifted(self.codes)

    def masks(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        members = self.codebook[:, self.structures.index(name)]
        return members[self.codes], members[self.shifted]


def shifted(codes: np.ndarray) -> np.ndarray:
    """The codes moved by SHIFT, background where they came from."""
    moved = np.zeros_like(codes)
    moved[tuple(slice(step, None) for step in SHIFT)] = codes[tuple(slice(None, -step) for step in SHIFT)]
    return moved


def segkit(path: str) -> Callable[[], Scores]:
    from segkit import metrics
    from segkit.codes import CodeVolume
    from segkit.surface import surface_scores

    pair = Pair(path)
    reference = CodeVolume(pair.codes, pair.codebook, tuple(pair.structures))
    prediction = reference.with_codes(pair.shifted)

    def work() -> Scores:
        table = surface_scores(reference, prediction, pair.spacing_mm, TOLERANCE_MM)
        counts = metrics.code_pairs(reference, prediction).counts()
        tp, fp, fn = (counts[name].to_numpy() for name in ("tp", "fp", "fn"))
        table["dice"], table["iou"] = metrics.dice(tp, fp, fn), metrics.iou(tp, fp, fn)
        return table.loc[pair.held, ["dice", "iou", "nsd", "hd95_mm", "assd_mm"]].to_dict("index")

    return work


def one_by_one(path: str, scores_of: Callable[[np.ndarray, np.ndarray, list[float]], dict]) -> Callable[[], Scores]:
    pair = Pair(path)
    return lambda: {name: scores_of(*pair.masks(name), pair.spacing_mm) for name in pair.held}


def deepmind(path: str) -> Callable[[], Scores]:
    import surface_distance

    def scores_of(reference: np.ndarray, prediction: np.ndarray, spacing_mm: list[float]) -> Mapping[str, float]:
        distances = surface_distance.compute_surface_distances(reference, prediction, spacing_mm)
        return {
            "hd95_mm": float(surface_distance.compute_robust_hausdorff(distances, 95)),
            "nsd": float(surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE_MM)),
        }

    return one_by_one(path, scores_of)


def totalsegmentator(path: str) -> Callable[[], Scores]:
    import surface_distance

    def scores_of(reference: np.ndarray, prediction: np.ndarray, spacing_mm: list[float]) -> Mapping[str, float]:
        both = np.logical_and(reference, prediction).sum()
        distances = surface_distance.compute_surface_distances(reference, prediction, spacing_mm)
        return {
            "dice": float(2 * both / (reference.sum() + prediction.sum())),
            "nsd": float(surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE_MM)),
        }

    return one_by_one(path, scores_of)


def monai_two(path: str) -> Callable[[], Scores]:
    return one_by_one(path, monai_scores(("hd95_mm", "nsd")))


def monai_five(path: str) -> Callable[[], Scores]:
    return one_by_one(path, monai_scores(("dice", "iou", "hd95_mm", "assd_mm", "nsd")))


def monai_scores(wanted: tuple[str, ...]) -> Callable[[np.ndarray, np.ndarray, list[float]], dict]:
    import torch
    from monai import metrics

    def scores_of(reference: np.ndarray, prediction: np.ndarray, spacing_mm: list[float]) -> Mapping[str, float]:
        planes = {"y_pred": torch.from_numpy(prediction)[None, None], "y": torch.from_numpy(reference)[None, None]}
        whole = {**planes, "include_background": True}
        spaced = {**whole, "spacing": spacing_mm}
        functions = {
            "dice": lambda: metrics.compute_dice(**whole),
            "iou": lambda: metrics.compute_iou(**whole),
            "hd95_mm": lambda: metrics.compute_hausdorff_distance(**spaced, percentile=95),
            "assd_mm": lambda: metrics.compute_average_surface_distance(**spaced, symmetric=True),
            "nsd": lambda: metrics.compute_surface_dice(**spaced, class_thresholds=[TOLERANCE_MM], use_subvoxels=True),
        }
        return {name: float(functions[name]()) for name in wanted}

    return scores_of
