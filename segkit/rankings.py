"""Charts over structures, readable at all 117: ranking, comparison of two models, confusions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from segkit.comparison import ALL
from segkit.confusion import NOTHING
from segkit.labels import OFFICIAL
from segkit.metrics import MEASURES
from segkit.styles import BLACK, BLUE, GREY, GROUP_STYLES, VERMILION, counted, groups_in, sentence

ROWS = 40  # the most structures below each other

RELATION_LETTERS = {"other side": "S", "neighbouring level": "L", "same group": "G"}
"""What a cell of the confusions says about its two structures; nothing for other pairs."""


def plot_ranking(table: pd.DataFrame, split: str) -> Figure:
    """Every structure that a subject holds, ranked by mean Dice, with its interval.

    table: a row a structure with structure, group, dice and n (subjects that hold it), as `summaries.per_structure`
    gives it; dice_low and dice_high, the ends of a 95 % interval, are drawn where they are there and not NaN.
    """
    ranked = table[table["dice"].notna()].sort_values("dice", ascending=False, kind="stable")
    if ranked.empty:
        return sentence(f"ranking, {split} split: the reference holds no structure")
    ends = ranked.reindex(columns=["dice_low", "dice_high"]).to_numpy(float)
    figure, panels = _panels(len(ranked), width=3.7)
    for axis, rows in panels:
        part, (low, high) = ranked.iloc[rows], ends[rows].T
        places = np.arange(len(part))
        colors = [GROUP_STYLES[group].color for group in part["group"]]
        axis.hlines(places, 0, part["dice"], color="#dddddd", lw=0.8, zorder=1)
        axis.hlines(places, low, high, color=colors, lw=2.2, alpha=0.55, zorder=2)
        for group in groups_in(part):
            those = (part["group"] == group).to_numpy()
            style = GROUP_STYLES[group]
            axis.plot(part["dice"][those], places[those], style.marker, color=style.color, ms=5, zorder=3)
        _name_rows(axis, part, [f"{value:.2f}" for value in part["dice"]])
        axis.set(xlim=(0, 1), xlabel="mean Dice")
    groups = groups_in(ranked)
    handles = [
        Line2D([], [], color=GROUP_STYLES[group].color, marker=GROUP_STYLES[group].marker, ls="none", label=group)
        for group in groups
    ]
    _legend(figure, handles, per_row=3 * len(panels))
    interval = ", line: 95 % interval" if np.isfinite(ends).any() else ""
    title = f"{counted(len(ranked), 'structure')} by mean Dice, {split} split"
    notes = [f"in brackets: subjects that hold it{interval}"]
    if len(ranked) < len(table):
        notes.append(f"not held by any subject: {len(table) - len(ranked)}")
    figure.suptitle("\n".join([title, *notes]), fontsize=10)
    return figure


def plot_comparison(table: pd.DataFrame, names: tuple[str, str], measure: str = "dice") -> Figure:
    """The paired differences of two models, a row a structure, the largest on top.

    table: the rows of one model of `comparison.compare`. names: of the first and of this second model. measure: what
    was compared. A filled triangle points to the better one where the interval excludes 0.
    """
    # a pair of dollars would be set as mathematics
    first, second = ((name if len(name) <= 30 else f"{name[:29]}…").replace("$", r"\$") for name in names)
    overall = table[table["structure"] == ALL]
    ranked = table[(table["structure"] != ALL) & table["difference"].notna()].sort_values(
        "difference", ascending=False, kind="stable"
    )
    if ranked.empty:
        return sentence(f"{first} and {second}: no structure that both were scored on")
    left, right = (first, second) if MEASURES[measure].higher_is_better else (second, first)
    kinds = np.select([ranked["high"] < 0, ranked["low"] > 0], ["left", "right"], "open")
    looks: dict[str, tuple[str, dict[str, Any]]] = {
        "left": (f"{left} better", {"marker": "<", "color": BLUE}),
        "right": (f"{right} better", {"marker": ">", "color": VERMILION}),
        "open": ("interval holds 0, or none", {"marker": "o", "color": GREY, "mfc": "white"}),
    }
    reach = 1.08 * max(0.01, np.nanmax(np.abs(ranked[["difference", "low", "high"]].to_numpy(float))))
    figure, panels = _panels(len(ranked), width=5.2)
    for axis, rows in panels:
        part, places = ranked.iloc[rows], np.arange(len(ranked.iloc[rows]))
        axis.axvline(0, color=BLACK, lw=0.9)
        for kind, (_, look) in looks.items():
            those = kinds[rows] == kind
            axis.hlines(places[those], part["low"][those], part["high"][those], color=look["color"], lw=1.6, alpha=0.6)
            axis.plot(part["difference"][those], places[those], ls="none", ms=5, **look)
        _name_rows(axis, part, [f"{value:+.3f}" for value in part["difference"]])
        axis.set(xlim=(-reach, reach))
        axis.set_xlabel(f"← {left} better      {right} better →", fontsize=8)
    counts = {kind: int((kinds == kind).sum()) for kind in looks}
    handles = [
        Line2D([], [], ls="none", label=f"{label}: {counts[kind]}", **look) for kind, (label, look) in looks.items()
    ]
    _legend(figure, handles, per_row=3 if len(panels) > 1 else 1)
    title = MEASURES[measure].title
    what = f"{f'size of {title}' if MEASURES[measure].signed else title}, {second} less {first}"
    title = f"Difference of {what}: {counted(len(ranked), 'structure')} (in brackets: subjects; line: interval)"
    every = [
        f"all structures: {row.difference:+.3f}"
        + ("" if np.isnan(row.low) else f" ({row.low:+.3f} to {row.high:+.3f})")
        for row in overall.itertuples()
    ]
    figure.suptitle("\n".join([title, *every]), fontsize=10)
    return figure


def _panels(total: int, width: float) -> tuple[Figure, list[tuple[Axes, slice]]]:
    """Panels side by side for `total` rows, at most ROWS each, and which rows each shows, the first at its top."""
    columns = -(-total // ROWS)
    rows = -(-total // columns)
    size = (width * columns, 1.9 + 0.19 * rows)
    figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.set_ylim(rows - 0.4, -0.6)
        axis.grid(axis="x", alpha=0.3)
    return figure, [(axis, slice(rows * place, rows * (place + 1))) for place, axis in enumerate(axes[0])]


def _name_rows(axis: Axes, part: pd.DataFrame, values: Sequence[str]) -> None:
    """Structures with their n on the left, values in a column on the right, where no line reaches them."""
    names = [f"{name} ({n})" for name, n in zip(part["structure"], part["n"], strict=True)]
    axis.set_yticks(range(len(part)), names, fontsize=7)
    for place, value in enumerate(values):
        axis.text(1.015, place, value, transform=axis.get_yaxis_transform(), va="center", fontsize=7)


def _legend(figure: Figure, handles: Sequence[Line2D], per_row: int) -> None:
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=min(per_row, len(handles)), fontsize=8,
        frameon=False,
    )  # fmt: skip


def plot_confusion(pairs: pd.DataFrame, split: str, most: int = 20) -> Figure:
    """The worst pairs of a structure and what it was called instead: rows reference, columns what the model said.

    pairs: reference and predicted (structures, or "nothing"), relation, ml, share (of the reference's volume, 0..1;
    NaN for a reference of "nothing"), subjects. Shown are the `most` largest shares of two structures, then, if there
    are fewer, those with "nothing"; a cell of their rows and columns shows its pair also if it is not one of them.
    """
    worst = worst_pairs(pairs, most)
    if worst.empty:
        return sentence(f"confusions, {split} split: no voxel was called another structure")
    rows, columns = _in_order(worst["reference"]), _in_order(worst["predicted"])
    if (pairs["reference"].isin(rows) & (pairs["predicted"] == NOTHING)).any() and NOTHING not in columns:
        columns.append(NOTHING)
    shown = pairs[pairs["reference"].isin(rows) & pairs["predicted"].isin(columns)]
    shares = shown.pivot(index="reference", columns="predicted", values="share").reindex(index=rows, columns=columns)
    size = (max(6.4, 3.2 + 0.52 * len(columns)), max(4.2, 2.6 + 0.34 * len(rows)))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(100 * shares.to_numpy(float), cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for pair in shown.itertuples():
        text = _cell(pair)
        color = "white" if pair.share > 0.55 else BLACK
        axes.text(columns.index(pair.predicted), rows.index(pair.reference), text, ha="center", va="center",
                  color=color, fontsize=7)  # fmt: skip
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set(ylabel="reference", xlabel="what the model called it")
    axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="#cccccc", lw=0.5)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(image, label="per cent of the reference's volume", fraction=0.04, pad=0.02)
    letters = ", ".join(f"{letter} {relation}" for relation, letter in RELATION_LETTERS.items())
    title = f"The worst {len(worst)} of {counted(len(pairs), 'confusion')}, {split} split"
    axes.set_title(f"{title}\n{letters}; below: subjects", fontsize=9)
    return figure


def worst_pairs(pairs: pd.DataFrame, most: int) -> pd.DataFrame:
    """The `most` worst rows of `plot_confusion`'s pairs: two structures before "nothing", then the largest share."""
    with_nothing = (pairs["reference"] == NOTHING) | (pairs["predicted"] == NOTHING)
    ordered = pairs.assign(with_nothing=with_nothing).sort_values(
        ["with_nothing", "share", "ml", "reference", "predicted"], ascending=[True, False, False, True, True]
    )
    return ordered.drop(columns="with_nothing").head(most)


def _in_order(names: pd.Series) -> list[str]:
    """Each name once: official ones in the official order, so that neighbours stand together, then others, nothing."""
    there = set(names)
    return [
        *(name for name in OFFICIAL if name in there),
        *sorted(there - set(OFFICIAL) - {NOTHING}),
        *({NOTHING} & there),
    ]


def _cell(pair: Any) -> str:
    """What a cell says: per cent (ml where there is no share) and the relation's letter, below it the subjects."""
    per_cent = "<1" if pair.share < 0.005 else f"{100 * pair.share:.0f}"
    amount = f"{pair.ml:.3g} ml" if np.isnan(pair.share) else per_cent
    return f"{amount} {RELATION_LETTERS.get(pair.relation, '')}".rstrip() + f"\n{pair.subjects}"
