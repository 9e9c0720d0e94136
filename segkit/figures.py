"""The network as a drawing, and charts over cases: curves, distributions, success rates, volumes, subjects.

A case: a subject's structure. Scores are the table of `evaluation.evaluate`. Every chart says the split and how many
cases it is of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from segkit.calibration import Reliability
from segkit.errors import SegkitError
from segkit.metrics import MEASURES, SUCCESS_THRESHOLDS, nan_mean
from segkit.styles import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    GROUP_STYLES,
    ORANGE,
    SKY,
    VERMILION,
    counted,
    groups_in,
    sentence,
)
from segkit.summaries import per_subject
from segkit.unet import UNet2D

DRAWN = {name: measure.title for name, measure in MEASURES.items() if not measure.signed}
"""What `plot_distribution` draws: all measures but those that may be below 0."""

LINEAR_TO_MM = 1.0  # axes of distances are linear up to here, logarithmic above, so that 0 has a place


def plot_unet(network: UNet2D, target_shape: tuple[int, int] = (256, 256)) -> Figure:
    """The network as data walk through it: down the left side, up the right one, channels and pixels of each level."""
    levels = len(network.features)
    widths = [*network.features, 2 * network.features[-1], *reversed(network.features)]
    depths = [*range(levels), levels, *reversed(range(levels))]
    figure, axes = plt.subplots(figsize=(11, 0.9 + 0.62 * (levels + 1)), layout="constrained")
    for place, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        side = " x ".join(str(size // 2**depth) for size in target_shape)
        color = SKY if place <= levels else ORANGE
        axes.text(place, -depth, f"{width} channels\n{side}", ha="center", va="center", fontsize=8,
                  bbox={"boxstyle": "round", "facecolor": color, "alpha": 0.45, "edgecolor": "none"})  # fmt: skip
    for text, x in (
        (f"slice\n{counted(network.in_channels, 'channel')}", -1),
        (f"{network.head.out_channels} outputs,\none a structure", 2 * levels + 1.2),
    ):
        axes.text(x, 0, text, ha="center", va="center", fontsize=8)
    path = [(-1, 0), *zip(range(2 * levels + 1), (-depth for depth in depths), strict=True), (2 * levels + 1, 0)]
    skips = [((level, -level), (2 * levels - level, -level)) for level in range(levels)]
    for (start, end), line in [*((pair, "-") for pair in pairwise(path)), *((skip, "--") for skip in skips)]:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "ls": line, "color": GREY, "shrinkA": 30,
                                                  "shrinkB": 30}, zorder=0)  # fmt: skip
    axes.set(xlim=(-1.5, 2 * levels + 1.8), ylim=(-levels - 0.5, 0.5))
    axes.set_axis_off()
    return figure


class _PlainNumbers(LogFormatter):
    """0.4 where a logarithmic axis usually says 4 x 10^-1, at the same ticks."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def plot_history(history: Sequence[Mapping]) -> Figure:
    """Loss of training and validation, and validation Dice, over epochs."""
    if not history:
        return sentence("no epoch is done yet")
    table = pd.DataFrame(history)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for column, label, style in (("train_loss", "training", "o-"), ("val_loss", "validation", "s--")):
        color = BLUE if label == "training" else VERMILION
        left.plot(table["epoch"], table[column].astype(float), style, ms=4, color=color, label=label)
    left.set(xlabel="epoch", ylabel="loss", yscale="log")
    left.yaxis.set_major_formatter(_PlainNumbers())
    left.yaxis.set_minor_formatter(
        _PlainNumbers(minor_thresholds=(1, 0.4))
    )  # within one power of ten there is no other
    left.set_title("Loss (train and val split)", fontsize=10)
    left.legend()
    scored = table[table["val_dice"].notna()]
    right.plot(scored["epoch"], scored["val_dice"].astype(float), "o-", ms=4, color=GREEN)
    number = counted(max(row.get("val_structures", 0) for row in history), "structure")
    right.set(xlabel="epoch", ylabel="macro Dice", ylim=(0, 1))
    right.set_title(f"Validation Dice (val split, {number})", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_distribution(scores: pd.DataFrame, split: str, metric: str = "dice") -> Figure:
    """Distribution of a metric over the cases that the reference holds, and a box a group with its cases as points.

    metric: a column in DRAWN; SegkitError for another one. Distances are on an axis that is logarithmic above 1 mm;
    a case without one (nothing was predicted) is not drawn, its number is named.
    """
    if metric not in DRAWN:
        raise SegkitError(f"no distribution of {metric!r}: choose one of {', '.join(DRAWN)}")
    held = scores[scores["present"]]
    cases = held[held[metric].notna()]
    if cases.empty:
        return sentence(f"{DRAWN[metric]}, {split} split: none of {counted(len(held), 'case')} has a value")
    groups = groups_in(held)
    size = (11, max(3.4, 1.4 + 0.34 * len(groups)))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=(1, 1.5), layout="constrained")
    values = cases[metric].to_numpy(float)
    left.hist(values, _bins(values, metric), color=SKY, edgecolor="white", lw=0.4)
    for name, value, line in (("mean", values.mean(), "-"), ("median", np.median(values), "--")):
        left.axvline(value, color=BLACK, lw=1.4, ls=line, label=f"{name} {value:.3g}")
    left.set(ylabel="cases (subject, structure)")
    left.yaxis.get_major_locator().set_params(integer=True)
    without = len(held) - len(cases)
    missed = f"\n{without:,} more missed: nothing predicted, no value" if without else ""
    left.set_title(f"{counted(len(cases), 'case')}, {split} split{missed}", fontsize=10)
    left.legend(fontsize=8)
    _group_boxes(right, held, groups, metric)
    for axes in (left, right):
        axes.set_xlabel(_name(scores, metric))
        if metric.endswith("_mm"):
            axes.set_xscale("symlog", linthresh=LINEAR_TO_MM)
            axes.set_xlim(0, max(10.0, 1.15 * values.max()))
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            axes.set_xlim(-0.02, 1.02)
    return figure


def _group_boxes(axes: Axes, held: pd.DataFrame, groups: Sequence[str], metric: str) -> None:
    """A box a group with its cases as points and its mean as a diamond."""
    of_groups = [held.loc[held["group"] == group, metric] for group in groups]
    values = [column.dropna().to_numpy() for column in of_groups]
    axes.boxplot(
        values, orientation="horizontal", widths=0.6, showfliers=False, medianprops={"color": BLACK, "lw": 1.6}
    )
    spread = np.random.default_rng(0)
    for place, (group, points) in enumerate(zip(groups, values, strict=True), start=1):
        style = GROUP_STYLES[group]
        heights = place + spread.uniform(-0.22, 0.22, len(points))
        alpha = float(np.clip(40 / max(1, len(points)), 0.15, 0.6))
        axes.scatter(points, heights, s=9, alpha=alpha, color=style.color, marker=style.marker, lw=0)
        if len(points):
            axes.plot(points.mean(), place, "D", ms=5, mfc="white", mec=BLACK)
    labels = [
        f"{group} (n = {len(points)}{f', {len(column) - len(points)} missed' if len(column) > len(points) else ''})"
        for group, points, column in zip(groups, values, of_groups, strict=True)
    ]
    axes.set_yticks(range(1, len(groups) + 1), labels, fontsize=8)
    axes.set_title("per group: median, middle half, mean (diamond)", fontsize=10)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def _bins(values: np.ndarray, metric: str) -> np.ndarray:
    """Edges of the histogram: twenty for 0 to 1, for distances four up to 1 mm and eight a decade above."""
    if not metric.endswith("_mm"):
        return np.linspace(0, 1, 21)
    decades = max(1, int(np.ceil(np.log10(values.max() + 1e-9))))
    return np.concatenate([np.linspace(0, LINEAR_TO_MM, 5)[:-1], np.logspace(0, decades, 8 * decades + 1)])


def _name(scores: pd.DataFrame, metric: str) -> str:
    """How the axis of a metric is called: of a surface Dice with its tolerance."""
    tolerance = f" at {scores['nsd_tolerance_mm'].iloc[0]:g} mm" if metric == "nsd" else ""
    return DRAWN[metric] + tolerance


def plot_success_rates(scores: pd.DataFrame, split: str, thresholds: Sequence[float] = SUCCESS_THRESHOLDS) -> Figure:
    """Share of the cases at or above each Dice threshold, a curve a group; `thresholds` are marked."""
    held = scores[scores["present"] & scores["dice"].notna()]
    if held.empty:
        return sentence(f"success rate, {split} split: the reference holds no structure")
    drawn = np.arange(101) / 100
    figure, axes = plt.subplots(figsize=(8.6, 4.6), layout="constrained")
    groups = groups_in(held)
    for place, group in enumerate(groups):
        values, style = held.loc[held["group"] == group, "dice"].to_numpy(), GROUP_STYLES[group]
        axes.plot(
            drawn, (values[:, None] >= drawn).mean(0), color=style.color, ls=style.line, lw=1.4, ms=5,
            marker=style.marker, markevery=(2 * place, 20), label=f"{group} ({len(values)})",
        )  # fmt: skip
    shares = (held["dice"].to_numpy()[:, None] >= drawn).mean(0)
    axes.plot(drawn, shares, color=BLACK, lw=2.6, label=f"all ({len(held)})")
    for threshold in thresholds:
        axes.axvline(threshold, color="#999999", lw=0.8, ls=":", zorder=0)
    marked = axes.secondary_xaxis("top")
    rates = [(held["dice"] >= threshold).mean() for threshold in thresholds]
    labels = [f"≥ {threshold:g}\n{rate:.0%}" for threshold, rate in zip(thresholds, rates, strict=True)]
    marked.set_xticks(list(thresholds), labels, fontsize=8)
    axes.set(xlabel="Dice threshold", ylabel="share of cases at or above it", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"Success rate, {split} split (above: share of all {counted(len(held), 'case')})", fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=3.5)
    axes.grid(alpha=0.3)
    return figure


def plot_reliability(reliability: Mapping[str, Reliability], split: str) -> Figure:
    """How often a pixel is inside over what was said of it, a curve each; below, of how many pixels that was said."""
    figure, (axes, counts) = plt.subplots(
        2, 1, figsize=(6.4, 6.4), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    axes.plot([0, 1], [0, 1], color="#999999", lw=1, ls=":")
    for (name, found), (color, marker) in zip(reliability.items(), ((ORANGE, "s"), (BLUE, "o")), strict=True):
        label = f"{SAID[name]}: expected calibration error {found.expected_error:.3f}"
        axes.plot(found.said, found.inside, color=color, marker=marker, ms=5, lw=1.6, label=label)
        counts.stairs(found.number, found.edges, color=color, lw=1.6, baseline=None)
    axes.set(ylabel="share that is inside", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"Reliability, {split} split (dotted: what is said is so)", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", frameon=False)
    counts.set(xlabel="said probability that a pixel is inside of a structure", ylabel="pixels")
    if any(found.number.any() for found in reliability.values()):
        counts.set_yscale("log")
    for each in (axes, counts):
        each.grid(alpha=0.3)
    return figure


SAID = {"output": "the network's output", "probability": "calibrated"}
"""What each curve of `plot_reliability` is called."""


def plot_volume(scores: pd.DataFrame, split: str) -> Figure:
    """Dice against the volume of the structure in the reference, a point a case, with the running median."""
    held = scores[scores["present"] & scores["dice"].notna()]
    if held.empty:
        return sentence(f"Dice over volume, {split} split: the reference holds no structure")
    figure, axes = plt.subplots(figsize=(8.6, 4.6), layout="constrained")
    alpha = float(np.clip(300 / len(held), 0.25, 0.8))
    for group in groups_in(held):
        part, style = held[held["group"] == group], GROUP_STYLES[group]
        axes.scatter(part["reference_ml"], part["dice"], s=16, alpha=alpha, color=style.color, marker=style.marker,
                     lw=0, label=f"{group} ({len(part)})")  # fmt: skip
    volumes, medians, cases = running_median(held["reference_ml"].to_numpy(), held["dice"].to_numpy())
    if len(volumes):
        axes.plot(volumes, medians, color=BLACK, lw=1.8, label=f"median of {cases} neighbours")
    axes.set(xscale="log", ylim=(-0.03, 1.03), xlabel="volume in the reference (ml)", ylabel="Dice")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"Dice over volume, {counted(len(held), 'case')}, {split} split", fontsize=10)
    legend = axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    for handle in filter(None, legend.legend_handles):
        handle.set_alpha(1)
    axes.grid(alpha=0.3)
    return figure


def running_median(volume: np.ndarray, dice: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Medians of volume and of Dice over as many neighbours in volume, in rising order, and that number.

    The number is odd: a twelfth of the cases, at least 11; with fewer cases than that nothing is returned.
    """
    window = max(11, len(volume) // 12) | 1
    if len(volume) < window:
        return np.zeros(0), np.zeros(0), window
    order = np.argsort(volume, kind="stable")
    pieces = (np.lib.stride_tricks.sliding_window_view(values[order], window) for values in (volume, dice))
    medians = [np.median(piece, axis=1) for piece in pieces]
    return medians[0], medians[1], window


def plot_subjects(scores: pd.DataFrame, split: str) -> Figure:
    """Each subject, best first: mean Dice over the structures that it holds with their middle half, and its errors.

    Below: structures that it holds and that were missed (upwards), false alarms (downwards).
    """
    if scores.empty:
        return sentence(f"no subject, {split} split")
    table = per_subject(scores)
    places = np.arange(len(table))
    middle, half = (len(table) - 1) / 2, max(5.0, len(table) / 2 + 0.3)  # so that one bar is no wall
    size = (max(6.0, 1.6 + 0.17 * len(table)), 5.2)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=size, height_ratios=(2, 1), sharex=True, layout="constrained")
    top.vlines(places, table["dice_25"], table["dice_75"], color=SKY, lw=5, label="middle half of its structures")
    top.plot(places, table["dice"], "o", ms=4, color=BLACK, ls="none", label="mean")
    overall, number = nan_mean(table["dice"].to_numpy())
    if number:
        top.axhline(overall, color=BLACK, lw=0.8, ls=":", label=f"mean of the subjects, {overall:.3f}")
    top.set(ylabel="Dice", ylim=(-0.02, 1.02))
    top.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    missed = f"missed, Dice below {scores['found_at_dice'].iloc[0]:g} ({table['missed'].sum()})"
    bottom.bar(places, table["missed"], color=VERMILION, label=missed)
    alarms = table["false_alarms"].sum()
    bottom.bar(places, -table["false_alarms"], color=SKY, hatch="///", label=f"false alarms ({alarms})")
    bottom.axhline(0, color=BLACK, lw=0.8)
    bottom.yaxis.set_major_locator(plt.MaxNLocator(nbins=5, integer=True))
    bottom.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    bottom.set(ylabel="structures", xlim=(middle - half, middle + half))
    bottom.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    names = [f"{name} ({n})" for name, n in zip(table["subject"], table["n"], strict=True)]
    bottom.set_xticks(places, names, rotation=90, fontsize=7)
    for axes in (top, bottom):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(
        f"{counted(len(table), 'subject')}, {split} split (in brackets: structures that it holds)", fontsize=10
    )
    return figure
