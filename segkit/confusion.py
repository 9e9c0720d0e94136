"""Which structure's voxels were called what: left for right, a vertebra one level off, a rib one off."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from segkit.labels import group_of, partner_of
from segkit.metrics import CodePairs

NOTHING = "nothing"
"""Stands for no structure: where the reference's structure was called nothing, or nothing was called a structure."""

COLUMNS = ("subject", "reference", "predicted", "ml")

_RIB = re.compile(r"rib_(left|right)_(\d+)")
_LEVELS = {
    **{f"vertebrae_C{number}": number for number in range(1, 8)},
    **{f"vertebrae_T{number}": number + 7 for number in range(1, 13)},
    **{f"vertebrae_L{number}": number + 19 for number in range(1, 6)},
    "vertebrae_L6": 24.5,  # where there is one, it lies between L5 and S1, which otherwise are neighbours
    "vertebrae_S1": 25,
}


def confused(subject: str, pairs: CodePairs, voxel_ml: float) -> pd.DataFrame:
    """What a subject's wrong voxels were called: columns as in COLUMNS, ml, a row a pair that occurs.

    A voxel counts for every structure of the reference that it lacks (`reference`) together with every structure that
    it has too much (`predicted`); where one of the two sets is empty, `nothing` stands for it.
    """
    missed, extra = pairs.reference & ~pairs.prediction, pairs.prediction & ~pairs.reference
    # a last column for "nothing": a voxel that only lacks, or only has too much
    missed, extra = (
        np.column_stack([own, ~own.any(1) & other.any(1)]).astype(float)
        for own, other in ((missed, extra), (extra, missed))
    )
    voxels = missed.T @ (extra * pairs.voxels[:, None])
    rows, columns = voxels.nonzero()
    names = np.array([*pairs.structures, NOTHING], dtype=object)
    content = {"subject": subject, "reference": names[rows], "predicted": names[columns]}
    return pd.DataFrame({**content, "ml": voxels[rows, columns] * voxel_ml}, columns=list(COLUMNS))


def worst_pairs(confusion: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """All pairs over all subjects, the largest shares first.

    confusion: the tables of `confused`; scores: those of the same evaluation. Columns: reference, predicted, relation,
    ml (sum), share (of the volume of the reference's structure over the subjects; NaN where the reference holds
    nothing), subjects (in which the pair occurs).
    """
    table = confusion.groupby(["reference", "predicted"]).agg(ml=("ml", "sum"), subjects=("subject", "nunique"))
    table = table.reset_index()
    whole = scores.groupby("structure")["reference_ml"].sum()
    table["share"] = table["ml"] / table["reference"].map(whole).astype(float)
    table["relation"] = [relation(*names) for names in zip(table["reference"], table["predicted"], strict=True)]
    table = table[["reference", "predicted", "relation", "ml", "share", "subjects"]]
    return table.sort_values(["share", "ml"], ascending=False, na_position="last", ignore_index=True)


def relation(reference: str, predicted: str) -> str:
    """How two structures are related: "other side", "neighbouring level", "same group", "other"; or "nothing"."""
    if NOTHING in (reference, predicted):
        return NOTHING
    if partner_of(reference) == predicted:
        return "other side"
    here, there = _level(reference), _level(predicted)
    if here and there and here[0] == there[0] and abs(here[1] - there[1]) <= 1:
        return "neighbouring level"
    return "same group" if group_of(reference) == group_of(predicted) else "other"


def _level(name: str) -> tuple[str, float] | None:
    """The row of bones that a structure belongs to, and its place there."""
    if name in _LEVELS:
        return "vertebrae", _LEVELS[name]
    rib = _RIB.fullmatch(name)
    return (rib[1], int(rib[2])) if rib else None
