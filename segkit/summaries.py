"""The table of scores -> means that say what they are over, of how many, and how sure they are (`segkit.intervals`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd

from segkit import metrics
from segkit.errors import SegkitError
from segkit.intervals import Interval, cases_interval, macro_interval, mean_interval, subjects_interval
from segkit.labels import GROUPS, group_of
from segkit.metrics import MEASURES

PROTOCOLS = ("segkit", "totalsegmentator", "nnunet")


def aggregate(
    scores: pd.DataFrame, measures: Sequence[str] = tuple(MEASURES), protocol: str = "segkit"
) -> pd.DataFrame:
    """Means over everything: a row a measure and what it is over.

    Columns: measure, over, mean, low, high (95 % interval), n (how many of what it is over), cases (how many pairs of
    subject and structure went in). `over` is "structures" (per structure the mean over subjects, then over
    structures: with Dice the headline), "cases" (all pairs alike), "subjects" (per subject, then over subjects), and
    each anatomical group (as "structures", those of the group).

    protocol: which cases count, where a measure has a value at all.
        "segkit": those that the reference holds; "cases" also false alarms, with 0.
        "totalsegmentator": those that the reference holds, everywhere: false alarms cost nothing (its
        resources/evaluate.py).
        "nnunet": those that the reference or the prediction holds, everywhere; the mean over structures is NaN as soon
        as one structure has no case (its evaluation/evaluate_predictions.py).
    SegkitError for another protocol or measure.
    """
    rows = []
    for measure in measures:
        for over, values, average in _means(scores, measure, protocol):
            mean, low, high = within_limits(average(values), *MEASURES[measure].limits)
            cases = int((~np.isnan(values)).sum())
            rows.append((measure, over, mean, low, high, _number(over, values), cases))
    return pd.DataFrame(rows, columns=["measure", "over", "mean", "low", "high", "n", "cases"])


def within_limits(interval: Interval, least: float, most: float) -> Interval:
    """Cut the ends of an interval to the values that there can be."""
    mean, low, high = interval
    return mean, np.clip(low, least, most), np.clip(high, least, most)


def _means(
    scores: pd.DataFrame, measure: str, protocol: str
) -> Iterable[tuple[str, np.ndarray, Callable[[np.ndarray], Interval]]]:
    """What a measure is averaged over, its cases (subjects, structures) with NaN for none, and how."""
    either = values_of(scores, measure, scores["detection"] != "correctly absent")
    held = values_of(scores, measure, scores["present"])
    if protocol == "nnunet":
        of_structures, of_cases, macro = either, either, _strict_interval
    elif protocol in PROTOCOLS:
        of_structures, of_cases, macro = held, held if protocol == "totalsegmentator" else either, macro_interval
    else:
        raise SegkitError(f"PROTOCOL = {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    yield "structures", of_structures.to_numpy(), macro
    yield "cases", of_cases.to_numpy(), cases_interval
    yield "subjects", of_structures.to_numpy(), subjects_interval
    groups = np.array([group_of(name) for name in of_structures.columns])
    for group in [group for group in GROUPS if (groups == group).any()]:
        yield group, of_structures.to_numpy()[:, groups == group], macro


def values_of(scores: pd.DataFrame, measure: str, counted: pd.Series) -> pd.DataFrame:
    """Values by subject (rows) and structure (columns), in the order of the table; NaN where a case is not `counted`.

    Raises SegkitError for a measure that the table does not have.
    """
    if measure not in scores.columns or measure not in MEASURES:
        raise SegkitError(f"no measure {measure!r} in this table: choose among {', '.join(MEASURES)}")
    table = scores.assign(value=scores[measure].where(counted)).pivot(
        index="subject", columns="structure", values="value"
    )
    return table.reindex(index=scores["subject"].unique(), columns=scores["structure"].unique()).astype(float)


def _strict_interval(values: np.ndarray) -> Interval:
    """As `macro_interval`, NaN where a structure has no case."""
    if np.isnan(values).all(0).any():
        return np.nan, np.nan, np.nan
    return macro_interval(values)


def _number(over: str, values: np.ndarray) -> int:
    there = ~np.isnan(values)
    return int(there.sum() if over == "cases" else there.any(1 if over == "subjects" else 0).sum())


def per_structure(scores: pd.DataFrame) -> pd.DataFrame:
    """A row a structure, best first: means over the subjects that hold it, and detection over all that annotate it.

    Columns: structure, group, dice, dice_low, dice_high, nsd, nsd_low, nsd_high (95 % intervals), the means of the
    other measures, reference_ml (mean volume), n (subjects that hold it), found, missed, false_alarms,
    correctly_absent, sensitivity = found / (found + missed), specificity = correctly absent / (correctly absent +
    false alarms). Distances are means over the subjects in which both hold it: those missed stand beside them.
    Structures that no subject holds come last, with NaN.
    """
    held = scores[scores["present"]].groupby("structure")
    table = pd.DataFrame(index=pd.Index(scores["structure"].unique(), name="structure"))
    table["group"] = [group_of(name) for name in table.index]
    for measure in MEASURES:
        if measure in ("dice", "nsd"):
            values = values_of(scores, measure, scores["present"])
            columns = [measure, f"{measure}_low", f"{measure}_high"]
            found = within_limits(mean_interval(values.to_numpy()), *MEASURES[measure].limits)
            for column, numbers in zip(columns, found, strict=True):
                table[column] = pd.Series(numbers, values.columns)
        else:
            table[measure] = held[measure].mean()
    table["reference_ml"] = held["reference_ml"].mean()
    table["n"] = held.size()
    table["n"] = table["n"].fillna(0).astype(int)
    table = table.join(detections(scores, "structure"))
    return table.sort_values("dice", ascending=False, kind="stable", na_position="last").reset_index()


def per_subject(scores: pd.DataFrame) -> pd.DataFrame:
    """A row a subject, best first: what it scores over the structures that it holds, and detection over all.

    Columns: subject, dice and nsd (means), dice_25 and dice_75 (quartiles), n (structures that it holds), found,
    missed, false_alarms, correctly_absent, sensitivity, specificity. A subject that holds nothing comes last, with NaN.
    """
    held = scores[scores["present"]].groupby("subject")
    table = pd.DataFrame(index=pd.Index(scores["subject"].unique(), name="subject"))
    table["dice"], table["nsd"] = held["dice"].mean(), held["nsd"].mean()
    table["dice_25"], table["dice_75"] = held["dice"].quantile(0.25), held["dice"].quantile(0.75)
    table["n"] = held.size()
    table["n"] = table["n"].fillna(0).astype(int)
    table = table.join(detections(scores, "subject"))
    return table.sort_values("dice", ascending=False, kind="stable", na_position="last").reset_index()


def detections(scores: pd.DataFrame, by: str) -> pd.DataFrame:
    """How many cases of each structure or subject were found, missed, ..., with sensitivity and specificity."""
    words = scores.groupby([by, "detection"]).size().unstack(fill_value=0)
    names = {
        "found": "found",
        "missed": "missed",
        "false alarm": "false_alarms",
        "correctly absent": "correctly_absent",
    }
    table = words.reindex(columns=list(names), fill_value=0).rename(columns=names)
    table["sensitivity"] = table["found"] / (table["found"] + table["missed"])
    table["specificity"] = table["correctly_absent"] / (table["correctly_absent"] + table["false_alarms"])
    return table


def success_rates(scores: pd.DataFrame, thresholds: Iterable[float] = metrics.SUCCESS_THRESHOLDS) -> pd.DataFrame:
    """Share of the cases (subject, structure it holds) with a Dice of at least each threshold, per group and in all.

    A row a group and a last row "all"; columns: one a threshold ("0.5", ...), and n, the number of cases.
    """
    held = scores[scores["present"]]
    rows = {}
    for group in [*[g for g in GROUPS if (held["group"] == g).any()], "all"]:
        values = (held if group == "all" else held[held["group"] == group])["dice"].to_numpy()
        rates = {f"{threshold:g}": metrics.success_rate(values, threshold) for threshold in thresholds}
        rows[group] = {**rates, "n": len(values)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("group")


def summarize(scores: pd.DataFrame) -> dict[str, float | int | None]:
    """The headline and what stands beside it: macro_dice with its interval and n structures, subjects, detection.

    The headline is None where no reference holds any structure, its interval where there is one subject.
    """
    [headline] = aggregate(scores, ["dice"]).query("over == 'structures'").itertuples()
    mean, low, high = (None if np.isnan(number) else float(number) for number in headline[3:6])
    counts = scores["detection"].value_counts()
    return {
        "macro_dice": mean,
        "macro_dice_low": low,
        "macro_dice_high": high,
        "structures": headline.n,
        "subjects": int(scores["subject"].nunique()),
        "found": int(counts.get("found", 0)),
        "missed": int(counts.get("missed", 0)),
        "false_alarms": int(counts.get("false alarm", 0)),
        "correctly_absent": int(counts.get("correctly absent", 0)),
    }
