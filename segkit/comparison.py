"""Two or more models on the same cases: paired differences with their intervals."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import pandas as pd

from segkit.errors import SegkitError
from segkit.intervals import macro_interval, mean_interval
from segkit.labels import group_of
from segkit.metrics import MEASURES
from segkit.summaries import values_of, within_limits

ALL = "all structures"


def compare(tables: Mapping[str, pd.DataFrame], measure: str = "dice") -> pd.DataFrame:
    """How much each further model differs from the first: name -> table of scores, in the order of comparison.

    A row a model and structure, and before them one for all structures. Columns: model, structure, group, first,
    second (means of the first and of this model), difference (second less first), low, high (95 % interval of the
    paired differences, see `segkit.intervals`), n (subjects; of all structures: structures). What counts are cases
    that the reference holds and that both models have a value for; others are left out with a warning that says how
    many.
    Of a measure with a sign its size is compared: an error of -5 ml is as large as one of 5.
    Raises SegkitError for fewer than two tables, for another measure, for tables without a common case, of different
    references, or of surface Dice at different tolerances.
    """
    if len(tables) < 2:
        raise SegkitError(f"expected two or more tables of scores to compare, found {len(tables)}")
    if measure not in MEASURES:
        raise SegkitError(f"no measure {measure!r}: choose among {', '.join(MEASURES)}")
    (first_name, first), *others = tables.items()
    rows = [_differences(first_name, first, name, table, measure) for name, table in others]
    return pd.concat(rows, ignore_index=True)


def _differences(first_name: str, first: pd.DataFrame, name: str, second: pd.DataFrame, measure: str) -> pd.DataFrame:
    cases = _common_cases(first_name, first, name, second)
    if measure == "nsd":
        _refuse_other_tolerance(first_name, name, cases)
    measured = (cases[f"{measure}_{place}"] for place in (1, 2))
    measured = (values.abs() if MEASURES[measure].signed else values for values in measured)
    before, after = (values_of(cases.assign(**{measure: values}), measure, cases["present"]) for values in measured)
    both = before.notna() & after.notna()
    _warn_of_left_out({first_name: before, name: after}, measure, int(cases["present"].sum()), int(both.sum().sum()))
    before, after = before.where(both), after.where(both)
    difference = (after - before).to_numpy()
    most = MEASURES[measure].limits[1]  # neither can two values differ by more
    table = pd.DataFrame({"model": name, "structure": before.columns})
    table["group"] = [group_of(structure) for structure in before.columns]
    table["first"], table["second"] = before.mean().to_numpy(), after.mean().to_numpy()
    table["difference"], table["low"], table["high"] = within_limits(mean_interval(difference), -most, most)
    table["n"] = both.sum().to_numpy()
    means = [each.mean().mean() for each in (before, after)]
    overall = [
        name, ALL, "all", *means, *within_limits(macro_interval(difference), -most, most), int(both.any().sum()),
    ]  # fmt: skip
    held = table[table["n"] > 0].sort_values("difference", ascending=False)
    return pd.concat([pd.DataFrame([overall], columns=table.columns), held], ignore_index=True)


def _common_cases(first_name: str, first: pd.DataFrame, name: str, second: pd.DataFrame) -> pd.DataFrame:
    """The cases of both tables, with the measures of each; checked to be of the same references."""
    key = ["subject", "structure"]
    common = first.merge(second, on=key, suffixes=("_1", "_2"))
    if common.empty:
        raise SegkitError(
            f"{first_name} and {name} have no subject and structure in common: evaluate both on the same subjects"
        )
    other = common[common["reference_voxels_1"] != common["reference_voxels_2"]]
    if len(other):
        case = other.iloc[0]
        raise SegkitError(
            f"{first_name} and {name} were scored against different references: {case['structure']} of "
            f"{case['subject']} has {case['reference_voxels_1']} voxels in the one, "
            f"{case['reference_voxels_2']} in the other"
        )
    left_out = len(first) + len(second) - 2 * len(common)
    if left_out:
        warnings.warn(f"{left_out} cases that only one of {first_name} and {name} has are left out", stacklevel=4)
    return common.assign(present=common["present_1"])


def _refuse_other_tolerance(first_name: str, name: str, cases: pd.DataFrame) -> None:
    """Raise SegkitError where the two tables have surface Dice at different tolerances."""
    one, other = cases["nsd_tolerance_mm_1"], cases["nsd_tolerance_mm_2"]
    if (one != other).any():
        case = cases[one != other].iloc[0]
        raise SegkitError(
            f"surface Dice of {first_name} is at {case['nsd_tolerance_mm_1']:g} mm, of {name} at "
            f"{case['nsd_tolerance_mm_2']:g} mm: evaluate both with the same TOLERANCE_MM"
        )


def _warn_of_left_out(values: Mapping[str, pd.DataFrame], measure: str, held: int, compared: int) -> None:
    """Say of how many cases that the reference holds a model has no value, as of a distance to what it missed."""
    if compared < held:
        lacking = [f"{held - int(table.notna().sum().sum())} of {name}" for name, table in values.items()]
        warnings.warn(
            f"{held - compared} of {held} cases have no {measure} and are left out ({', '.join(lacking)}): what a "
            "model missed has none, and counts in dice",
            stacklevel=4,
        )
