"""Counts first, ratios after: TP, FP, FN -> Dice, IoU, precision, recall, success rate, detection.

The rule for empty masks, in this one place (reference / prediction):

    empty / empty          NaN, left out of every mean; a true negative
    empty / not empty      Dice, IoU and surface Dice 0, distances NaN; a false alarm
    not empty / empty      Dice, IoU and surface Dice 0, distances NaN; missed
    not annotated          no row, no count

Means leave NaN out at every level and say how many values they are of. What is measured of each case: MEASURES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from segkit.codes import CodeVolume

SUCCESS_THRESHOLDS = (0.5, 0.7, 0.8, 0.9)

_SLAB_VOXELS = 4_000_000
_DENSE_PAIRS = 4_000_000


@dataclass(frozen=True)
class CodePairs:
    """Which pairs of sets of structures two volumes hold at the same voxels, and how often: all that counts need.

    structures: the S names that the reference annotates and the prediction looks for. reference, prediction: bool
    (P, S), the members of each pair's two sets. voxels: int64 (P,).
    """

    structures: tuple[str, ...]
    reference: np.ndarray
    prediction: np.ndarray
    voxels: np.ndarray

    def counts(self) -> pd.DataFrame:
        """TP, FP and FN in voxels: a row a structure, with columns tp, fp, fn; overlaps count for each structure."""
        tp, of_prediction, of_reference = (
            self.voxels @ members.astype(np.int64)
            for members in (self.reference & self.prediction, self.prediction, self.reference)
        )
        return pd.DataFrame({"tp": tp, "fp": of_prediction - tp, "fn": of_reference - tp}, index=list(self.structures))


def code_pairs(reference: CodeVolume, prediction: CodeVolume) -> CodePairs:
    """Count the pairs of codes of two volumes of the same shape, once for all structures, a slab at a time.

    Raises ValueError if the shapes differ.
    """
    if reference.codes.shape != prediction.codes.shape:
        raise ValueError(f"shapes differ: reference {reference.codes.shape}, prediction {prediction.codes.shape}")
    names = tuple(name for name in reference.structures if name in prediction.structures)
    width = len(prediction.codebook)
    pairs = len(reference.codebook) * width
    if pairs <= _DENSE_PAIRS:
        dense = np.zeros(pairs, np.int64)
        for keys in _keys(reference.codes, prediction.codes, width):
            dense += np.bincount(keys, minlength=pairs)
        seen = np.flatnonzero(dense)
        number = dense[seen]
    else:  # codebooks of thousands of overlaps each: the pairs that occur are far fewer than those that could
        slabs = [np.unique(keys, return_counts=True) for keys in _keys(reference.codes, prediction.codes, width)]
        seen, place = np.unique(np.concatenate([keys for keys, _ in slabs]), return_inverse=True)
        number = np.zeros(len(seen), np.int64)
        np.add.at(number, place, np.concatenate([counted for _, counted in slabs]))
    of_reference, of_prediction = np.divmod(seen, width)
    return CodePairs(
        names, _members(reference, names)[of_reference], _members(prediction, names)[of_prediction], number
    )


def _keys(reference: np.ndarray, prediction: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """One number a voxel for its pair of codes, int64, some millions of voxels at a time."""
    reference, prediction = reference.reshape(-1), prediction.reshape(-1)
    for start in range(0, reference.size, _SLAB_VOXELS):
        keys = reference[start : start + _SLAB_VOXELS].astype(np.int64)
        keys *= width
        keys += prediction[start : start + _SLAB_VOXELS]
        yield keys


def _members(volume: CodeVolume, names: tuple[str, ...]) -> np.ndarray:
    return volume.codebook[:, [volume.structures.index(name) for name in names]]


def dice(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN) (Dice 1945), float64 of the counts' shape; NaN where all three are 0."""
    return _ratio(2 * np.asarray(tp, float), 2 * np.asarray(tp, float) + fp + fn)


def iou(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """TP / (TP + FP + FN) (Jaccard 1912), = Dice / (2 - Dice), float64 of the counts' shape; NaN where all are 0."""
    return _ratio(np.asarray(tp, float), np.asarray(tp, float) + fp + fn)


def precision(tp: np.ndarray, fp: np.ndarray) -> np.ndarray:
    """TP / (TP + FP): the share of the prediction that is right, of the counts' shape; NaN where there is none."""
    return _ratio(np.asarray(tp, float), np.asarray(tp, float) + fp)


def recall(tp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """TP / (TP + FN): the share of the reference that was found, of the counts' shape; NaN where there is none."""
    return _ratio(np.asarray(tp, float), np.asarray(tp, float) + fn)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def nan_mean(values: np.ndarray, axis: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the values that are not NaN, and their number; NaN where there are none. All, or those along `axis`."""
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


def volume_error_ml(cases: pd.DataFrame) -> np.ndarray:
    """Predicted less reference volume of cases as in `Measure`, ml, float64 (n,); NaN where both are empty."""
    either = cases["predicted_ml"] + cases["reference_ml"] > 0
    return (cases["predicted_ml"] - cases["reference_ml"]).where(either).to_numpy()


@dataclass(frozen=True)
class Measure:
    """One number a case, a column of the table of scores.

    of: from a table with a row a case and columns tp, fp, fn (voxels), reference_ml and predicted_ml, float64 (n,)
    with NaN for no value; None: `surface.surface_scores` has a column of that name.
    """

    title: str  # in figures and tables
    of: Callable[[pd.DataFrame], np.ndarray] | None = None
    higher_is_better: bool = False  # else a model is better the nearer it is to 0
    signed: bool = False  # whether it may be below 0; others are from 0 to 1, or distances whose name ends in _mm

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest value that there can be."""
        return (0.0, 1.0) if self.higher_is_better else (-np.inf if self.signed else 0.0, np.inf)


MEASURES: Mapping[str, Measure] = {
    "dice": Measure("Dice", lambda cases: dice(cases["tp"], cases["fp"], cases["fn"]), higher_is_better=True),
    "iou": Measure("IoU", lambda cases: iou(cases["tp"], cases["fp"], cases["fn"]), higher_is_better=True),
    "nsd": Measure("surface Dice", higher_is_better=True),
    "precision": Measure("precision", lambda cases: precision(cases["tp"], cases["fp"]), higher_is_better=True),
    "recall": Measure("recall", lambda cases: recall(cases["tp"], cases["fn"]), higher_is_better=True),
    "hd95_mm": Measure("HD95 (mm)"),
    "hd_mm": Measure("Hausdorff distance (mm)"),
    "assd_mm": Measure("ASSD (mm)"),
    "centroid_distance_mm": Measure("centroid distance (mm)"),
    "volume_error_ml": Measure("volume error (ml)", volume_error_ml, signed=True),
}
"""What is measured of each case, in the order of tables and figures."""
