"""Counts first, ratios after: TP, FP, FN -> Dice, IoU, success rate, detection.

The rule for empty masks, in this one place (reference / prediction):

    empty / empty          NaN, left out of every mean; a true negative
    empty / not empty      Dice and IoU 0; a false alarm
    not empty / empty      Dice and IoU 0; missed
    not annotated          no row, no count

Means leave NaN out at every level and say how many values they are of.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from segkit.codes import CodeVolume

SUCCESS_THRESHOLDS = (0.5, 0.7, 0.8, 0.9)
DETECTED_DICE = 0.1


def joint_counts(reference: CodeVolume, prediction: CodeVolume) -> pd.DataFrame:
    """TP, FP and FN in voxels for each structure that the reference annotates and the prediction looks for.

    Counts pairs of codes once for all structures; overlaps count for each of their structures. Both volumes have the
    same shape. Returns a row a structure, with columns tp, fp, fn.
    """
    if reference.codes.shape != prediction.codes.shape:
        raise ValueError(f"shapes differ: reference {reference.codes.shape}, prediction {prediction.codes.shape}")
    names = [name for name in reference.structures if name in prediction.structures]
    tables = []
    for volume in (reference, prediction):
        tables.append(volume.codebook[:, [volume.structures.index(name) for name in names]].astype(np.int64))
    pairs = reference.codes.ravel().astype(np.int64) * len(prediction.codebook) + prediction.codes.ravel()
    seen, number = np.unique(pairs, return_counts=True)
    of_reference, of_prediction = (
        tables[i][codes] for i, codes in enumerate(np.divmod(seen, len(prediction.codebook)))
    )
    tp = number @ (of_reference * of_prediction)
    return pd.DataFrame({"tp": tp, "fp": number @ of_prediction - tp, "fn": number @ of_reference - tp}, index=names)


def dice(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN) (Dice 1945); NaN where all three are 0."""
    return _ratio(2 * np.asarray(tp, float), 2 * np.asarray(tp, float) + fp + fn)


def iou(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """TP / (TP + FP + FN) (Jaccard 1912), which is Dice / (2 - Dice); NaN where all three are 0."""
    return _ratio(np.asarray(tp, float), np.asarray(tp, float) + fp + fn)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def nan_mean(values: np.ndarray, axis: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the values that are not NaN, and their number; NaN where there are none."""
    values = np.asarray(values, float)
    number = (~np.isnan(values)).sum(axis)
    return _ratio(np.nansum(values, axis), np.asarray(number)), number


def detection(present: np.ndarray, predicted: np.ndarray, dice_values: np.ndarray, found_at: float) -> np.ndarray:
    """One word a case: "found" (present, Dice >= `found_at`), "missed", "false alarm" or "correctly absent".

    present, predicted: bool, whether the reference and the prediction hold a voxel of the structure.
    """
    found = present & (np.nan_to_num(dice_values) >= found_at)
    return np.select([found, present, predicted], ["found", "missed", "false alarm"], "correctly absent")


def success_rate(dice_values: np.ndarray, threshold: float) -> float:
    """Share of the cases that are not NaN with a Dice of at least `threshold`; NaN where there are none."""
    values = np.asarray(dice_values, float)
    values = values[~np.isnan(values)]
    return float((values >= threshold).mean()) if values.size else float("nan")


def macro_dice(scores: pd.DataFrame) -> tuple[float, int]:
    """The headline: per structure the mean Dice over the subjects whose reference holds it, then their mean.

    scores: rows with columns structure, present and dice. Returns the mean and the number of structures; (NaN, 0)
    if no reference holds any.
    """
    per_structure = scores[scores["present"]].groupby("structure")["dice"].mean()
    return (float(per_structure.mean()), len(per_structure)) if len(per_structure) else (float("nan"), 0)
