"""Figures: training curves, slices with their masks, score distributions and rankings.

Slices are shown as radiologists hang them: seen from the feet, the patient's right on the left of the picture, the
spine at the bottom, with true proportions in mm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from segkit.codes import CodeVolume
from segkit.labels import GROUPS, OFFICIAL, color_of, group_of, rgb_of
from segkit.metrics import SUCCESS_THRESHOLDS
from segkit.runs import write_whole

SOFT_TISSUE = (40.0, 400.0)  # window level and width in HU


def save_figure(path: str | Path, figure: Figure) -> Path:
    """Write a figure as PNG, whole or not at all."""
    return write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight"))


def hang(plane: np.ndarray) -> np.ndarray:
    """An axial slice (y, x, ...) of the canonical grid turned as it is shown: front at the top, right on the left."""
    return plane[::-1, ::-1]


def window(hu: np.ndarray, level_width: tuple[float, float] = SOFT_TISSUE) -> np.ndarray:
    """HU -> grey 0..1 for a window given as (level, width) in HU."""
    level, width = level_width
    return np.clip((hu - level) / width + 0.5, 0, 1)


def colors_of_codes(volume: CodeVolume) -> np.ndarray:
    """Colour of each code, float (K, 4), RGBA 0..1: the mean over the structures of an overlap, background clear."""
    rgb = np.array([rgb_of(name) for name in volume.structures]) / 255
    number = volume.codebook.sum(1)
    mean = volume.codebook.astype(float) @ rgb / np.maximum(number, 1)[:, None]
    return np.concatenate([mean, (number > 0)[:, None]], 1)


def overlay(hu: np.ndarray, volume: CodeVolume, opacity: float = 0.55) -> np.ndarray:
    """A slice in grey with its structures in colour, float (y, x, 3), hung. `hu` and the codes are (y, x)."""
    color = colors_of_codes(volume)[volume.codes]
    alpha = color[..., 3:] * opacity
    return hang(window(hu)[..., None] * (1 - alpha) + color[..., :3] * alpha)


def difference(reference: CodeVolume, prediction: CodeVolume) -> np.ndarray:
    """Per pixel, int (y, x): 0 background in both, 1 the same structures, 2 missed, 3 false alarm, 4 other structures.

    Compared on the structures that the reference annotates; what was not annotated is neither right nor wrong.
    """
    names = [name for name in reference.structures if name in prediction.structures]
    ref, pred = (
        volume.codebook[:, [volume.structures.index(name) for name in names]] for volume in (reference, prediction)
    )
    same = (ref[:, None] == pred[None]).all(2)
    kinds = np.where(same, 1, np.where(pred.any(1)[None], np.where(ref.any(1)[:, None], 4, 3), 2))
    kinds[np.ix_(~ref.any(1), ~pred.any(1))] = 0
    return kinds[reference.codes, prediction.codes]


DIFFERENCE_COLORS = {1: ("agrees", "#4daf4a"), 2: ("missed", "#e41a1c"), 3: ("false alarm", "#377eb8"),
                     4: ("other structure", "#ff9f1c")}  # fmt: skip


def show_slice(
    axes: Axes, picture: np.ndarray, spacing_mm: Sequence[float], title: str = "", cmap: str | None = None
) -> None:
    """Draw a hung slice with true proportions and R / L at its sides. `spacing_mm` is (y, x)."""
    axes.imshow(picture, aspect=spacing_mm[0] / spacing_mm[1], cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
    for x, letter in ((0.02, "R"), (0.98, "L")):
        axes.text(
            x, 0.5, letter, transform=axes.transAxes, color="white", fontsize=8, ha="left" if x < 0.5 else "right",
            bbox={"facecolor": "black", "alpha": 0.4, "pad": 1, "edgecolor": "none"},
        )  # fmt: skip


def structure_legend(figure: Figure, volumes: Sequence[CodeVolume], most: int = 27) -> None:
    """A legend under the figure with the colours of the structures that are shown, at most the `most` largest."""
    pixels = sum((Counter(volume.voxels()) for volume in volumes), Counter())
    shown = {name for name, number in pixels.most_common(most) if number}
    order = [*(name for name in OFFICIAL if name in shown), *sorted(shown - set(OFFICIAL))]
    handles = [Patch(color=color_of(name), label=name) for name in order]
    left_out = len(+pixels) - len(shown)
    if left_out:
        handles.append(Patch(color="none", label=f"and {left_out} smaller ones"))
    if handles:
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, fontsize=7, frameon=False)


def occurring(volume: CodeVolume) -> list[str]:
    """The structures with at least one voxel in these codes."""
    members = volume.codebook[np.unique(volume.codes)].any(0)
    return [name for name, there in zip(volume.structures, members, strict=True) if there]


def _tallest(samples: Sequence[tuple]) -> float:
    """The largest height of a slice relative to its width, in mm, so that panels leave no gaps."""
    return max(hu.shape[0] * spacing[0] / (hu.shape[1] * spacing[1]) for _, hu, *_, spacing in samples)


def plot_slices(samples: Sequence[tuple[str, np.ndarray, CodeVolume, Sequence[float]]]) -> Figure:
    """Slices beside their masks: per sample a title, HU (y, x), codes (y, x), spacing in mm (y, x)."""
    size = (3.2 * len(samples), 2 * (3.2 * _tallest(samples) + 0.2))
    figure, axes = plt.subplots(2, len(samples), figsize=size, squeeze=False, layout="constrained")
    for column, (title, hu, volume, spacing_mm) in zip(axes.T, samples, strict=True):
        show_slice(column[0], hang(window(hu)), spacing_mm, title, cmap="gray")
        show_slice(column[1], overlay(hu, volume), spacing_mm)
    structure_legend(figure, [volume for _, _, volume, _ in samples])
    return figure


def plot_history(history: Sequence[Mapping]) -> Figure:
    """Loss of training and validation, and validation Dice, over epochs."""
    table = pd.DataFrame(history)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for column, label in (("train_loss", "training"), ("val_loss", "validation")):
        left.plot(table["epoch"], table[column], marker="o", label=label)
    left.set(xlabel="epoch", ylabel="loss", title="Loss", yscale="log")
    left.legend()
    right.plot(table["epoch"], table["val_dice"].astype(float), marker="o", color="tab:green")
    right.set(xlabel="epoch", ylabel="macro Dice", title="Validation Dice (val split, network's grid)", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_predictions(
    samples: Sequence[tuple[str, np.ndarray, CodeVolume, CodeVolume, Sequence[float]]], title: str = ""
) -> Figure:
    """A row a slice: CT, ground truth, prediction, difference.

    Per sample a title, HU (y, x), the codes of both (y, x), spacing in mm (y, x).
    """
    size = (13, len(samples) * (3.2 * _tallest(samples) + 0.3))
    figure, axes = plt.subplots(len(samples), 4, figsize=size, squeeze=False, layout="constrained")
    for row, (name, hu, reference, prediction, spacing_mm) in zip(axes, samples, strict=True):
        show_slice(row[0], hang(window(hu)), spacing_mm, f"{name}: CT", cmap="gray")
        show_slice(row[1], overlay(hu, reference), spacing_mm, "ground truth")
        show_slice(row[2], overlay(hu, prediction), spacing_mm, "prediction")
        show_slice(row[3], _difference_picture(hu, reference, prediction), spacing_mm, "difference")
    handles = [Patch(color=color, label=label) for label, color in DIFFERENCE_COLORS.values()]
    axes[-1, 3].legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=7, frameon=False)
    structure_legend(figure, [volume for _, _, *both, _ in samples for volume in both])
    if title:
        figure.suptitle(title)
    return figure


def _difference_picture(hu: np.ndarray, reference: CodeVolume, prediction: CodeVolume) -> np.ndarray:
    picture = np.repeat(window(hu)[..., None], 3, axis=2)
    kinds = difference(reference, prediction)
    for kind, (_, color) in DIFFERENCE_COLORS.items():
        rgb = np.array(list(bytes.fromhex(color[1:]))) / 255
        picture[kinds == kind] = 0.35 * picture[kinds == kind] + 0.65 * rgb
    return hang(picture)


def plot_distribution(scores: pd.DataFrame, split: str) -> Figure:
    """Distribution of Dice and IoU over the cases that the reference holds, and a box a group with its cases."""
    held = scores[scores["present"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=(1, 1.5), layout="constrained")
    bins = np.linspace(0, 1, 21)
    for column, name, color in (("dice", "Dice", "tab:blue"), ("iou", "IoU", "tab:orange")):
        label = f"{name}, mean {held[column].mean():.3f}"
        left.hist(held[column], bins, alpha=0.55, color=color, label=label)
    left.set(xlabel="score", ylabel="cases (subject, structure)", title=f"{len(held)} cases, {split} split")
    left.legend()
    groups = [group for group in GROUPS if (held["group"] == group).any()]
    values = [held.loc[held["group"] == group, "dice"].to_numpy() for group in groups]
    right.boxplot(values, orientation="horizontal", widths=0.6, showfliers=False, medianprops={"color": "black"})
    spread = np.random.default_rng(0)
    for place, (group, cases) in enumerate(zip(groups, values, strict=True), start=1):
        right.scatter(cases, place + spread.uniform(-0.22, 0.22, len(cases)), s=7, alpha=0.5,
                      color=color_of(next(n for n in OFFICIAL if group_of(n) == group)))  # fmt: skip
    right.set_yticks(range(1, len(groups) + 1), [f"{g} (n = {len(v)})" for g, v in zip(groups, values, strict=True)])
    right.set(xlim=(-0.02, 1.02), xlabel="Dice", title="Dice per group")
    right.invert_yaxis()
    right.grid(axis="x", alpha=0.3)
    return figure


def plot_ranking(table: pd.DataFrame, split: str) -> Figure:
    """Every structure that a subject holds, ranked by mean Dice, in its colour. `table`: `evaluation.per_structure`."""
    ranked = table[table["n"] > 0]
    columns = max(1, -(-len(ranked) // 40))
    rows = -(-len(ranked) // columns)
    size = (5.2 * columns, 1.2 + 0.17 * rows)
    figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False, layout="constrained")
    for column, axis in enumerate(axes[0]):
        part = ranked.iloc[rows * column : rows * (column + 1)]
        places = np.arange(len(part))
        axis.barh(
            places, part["dice"], color=[color_of(name) for name in part["structure"]], edgecolor="#555555", lw=0.3
        )
        axis.set_yticks(
            places, [f"{name} ({n})" for name, n in zip(part["structure"], part["n"], strict=True)], fontsize=7
        )
        for place, value in zip(places, part["dice"], strict=True):
            axis.text(value + 0.01, place, f"{value:.2f}", va="center", fontsize=6)
        axis.set(xlim=(0, 1.08), ylim=(rows - 0.4, -0.6), xlabel="mean Dice")
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(f"Structures by mean Dice, {split} split (in brackets: subjects that hold it)")
    return figure


def plot_success_rates(scores: pd.DataFrame, split: str) -> Figure:
    """Share of the cases at or above each Dice threshold, a curve a group; the thresholds of the table are marked."""
    held = scores[scores["present"]]
    thresholds = np.linspace(0, 1, 101)
    figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    for group in [group for group in GROUPS if (held["group"] == group).any()]:
        values = held.loc[held["group"] == group, "dice"].to_numpy()
        color = color_of(next(name for name in OFFICIAL if group_of(name) == group))
        axes.plot(
            thresholds, (values[:, None] >= thresholds).mean(0), color=color, lw=1.4, label=f"{group} ({len(values)})"
        )
    values = held["dice"].to_numpy()
    axes.plot(thresholds, (values[:, None] >= thresholds).mean(0), color="black", lw=2.4, label=f"all ({len(values)})")
    for threshold in SUCCESS_THRESHOLDS:
        axes.add_line(Line2D([threshold] * 2, [0, 1], color="#999999", lw=0.7, ls=":"))
    axes.set(xlabel="Dice threshold", ylabel="share of cases at or above it", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"Success rate, {split} split")
    axes.legend(fontsize=7, loc="upper right")
    axes.grid(alpha=0.3)
    return figure
