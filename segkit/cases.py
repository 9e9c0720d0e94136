"""Single cases of a score table, looked at: the worst, the median and the best one as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from segkit.codes import CodeVolume
from segkit.labels import group_of
from segkit.pictures import (
    TEXT_BOX,
    WINDOWS,
    difference_handles,
    difference_picture,
    hang,
    occurring,
    only,
    outline_handles,
    sample,
    show_outlines,
    show_slice,
    window,
)
from segkit.splits import Part
from segkit.staging import StagedSubject
from segkit.styles import sentence

MARGIN_MM = 30.0  # shown around the structure
BAR_MM = 20.0  # the scale bar

WINDOW_OF_GROUP = {"lungs and airways": "lung", "other bones": "bone", "vertebrae": "bone", "ribs": "bone"}
"""The window in which a group's structures are seen, a name in WINDOWS; soft tissue for the others."""


def pick_cases(scores: pd.DataFrame) -> pd.DataFrame:
    """The worst, median and best case by Dice among those that the reference holds.

    Rows of `scores` with a first column `case` ("worst", "median", "best"). Of an even number the lower of the two in
    the middle is the median; ties go by subject, then structure. Fewer than three cases give fewer rows, none gives an
    empty table.
    """
    held = scores[scores["present"] & scores["dice"].notna()].sort_values(["dice", "subject", "structure"])
    last = len(held) - 1
    # where a place is taken twice the later word stays
    places = {} if held.empty else dict(sorted({last // 2: "median", last: "best", 0: "worst"}.items()))
    picked = held.iloc[list(places)]
    picked.insert(0, "case", list(places.values()))
    return picked.reset_index(drop=True)


def case_sample(row: Mapping[str, Any], subject: StagedSubject, part: Part, prediction: CodeVolume) -> tuple:
    """What `plot_cases` takes, from a row of `pick_cases`: the slice of `part` that holds most of the structure.

    prediction: codes (z, y, x) of the whole subject.
    """
    labels, structure = subject.labels(), row["structure"]
    reference, predicted = only(labels, [structure]), only(prediction, [structure])
    slices = part.slices(len(labels.codes))
    z = slices[int(reference.mask(structure)[slices].sum((1, 2)).argmax())]
    title = f"{row['case']}: {row['subject']}, {structure}, Dice {row['dice']:.2f}"
    return sample(subject, z, reference.at(z), predicted.at(z), title=title)


def plot_cases(cases: Sequence[tuple[str, np.ndarray, CodeVolume, CodeVolume, Sequence[float]]], title: str) -> Figure:
    """A row a case, cut out around its structure: CT, CT with the outlines of both, error overlay.

    Per case a title, HU (y, x), the codes of reference and prediction (y, x) with no structure but the one that the
    case is about, spacing in mm (y, x). The window fits the structure's group (WINDOW_OF_GROUP).
    """
    if not cases:
        return sentence(f"{title}: the reference holds no structure, there is no case to show")
    size = (9.3, 3.35 * len(cases) + 0.6)
    figure, axes = plt.subplots(len(cases), 3, figsize=size, squeeze=False, layout="constrained")
    for row, (name, hu, reference, prediction, spacing_mm) in zip(axes, cases, strict=True):
        box = box_around(reference, prediction, spacing_mm)
        inside, predicted = (volume.with_codes(volume.codes[box]) for volume in (reference, prediction))
        _show_case(row, hu[box], inside, predicted, spacing_mm)
        row[0].set_title(name, fontsize=10, loc="left")
    figure.suptitle(title, fontsize=11)
    handles = [*outline_handles(), *difference_handles()[:3]]  # one structure cannot be taken for another one
    figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(handles), fontsize=8, frameon=False
    )
    return figure


def _show_case(
    panels: Sequence[Axes], hu: np.ndarray, reference: CodeVolume, prediction: CodeVolume, spacing_mm: Sequence[float]
) -> None:
    name = window_for(reference)
    grey = hang(window(hu, WINDOWS[name]))
    for panel, picture, text in (
        (panels[0], grey, f"CT, {name} window"),
        (panels[1], grey, "outlines"),
        (panels[2], difference_picture(hu, reference, prediction, WINDOWS[name]), "errors"),
    ):
        show_slice(panel, picture, spacing_mm, cmap="gray")
        panel.text(0.03, 0.97, text, transform=panel.transAxes, color="white", fontsize=8, va="top", bbox=TEXT_BOX)
    show_outlines(panels[1], reference, prediction, width=1.4)
    _scale_bar(panels[0], spacing_mm)


def window_for(volume: CodeVolume) -> str:
    """The window, a name in WINDOWS, that fits what a volume holds, if that is all of one kind; else soft tissue."""
    names = {WINDOW_OF_GROUP.get(group_of(name), "soft tissue") for name in occurring(volume)}
    return names.pop() if len(names) == 1 else "soft tissue"


def box_around(
    reference: CodeVolume, prediction: CodeVolume, spacing_mm: Sequence[float], margin_mm: float = MARGIN_MM
) -> tuple[slice, slice]:
    """What to cut out of a slice to see what both hold: square in mm where the slice reaches that far.

    Codes (y, x), spacing in mm (y, x); with `margin_mm` on each side of the longer side. The whole slice where neither
    holds anything.
    """
    boxes = [box for volume in (reference, prediction) for box in volume.boxes().values()]
    if not boxes:
        return slice(None), slice(None)
    low = np.array([[side.start for side in box] for box in boxes]).min(0)
    high = np.array([[side.stop for side in box] for box in boxes]).max(0)
    half = ((high - low) * spacing_mm).max() / 2 + margin_mm
    centre, reach = (low + high) / 2, half / np.array(spacing_mm)
    first = np.maximum(0, np.floor(centre - reach)).astype(int)
    last = np.ceil(centre + reach).astype(int)  # a slice may end beyond the array
    return slice(first[0], last[0]), slice(first[1], last[1])


def _scale_bar(axes: Axes, spacing_mm: Sequence[float]) -> None:
    """A white line of BAR_MM at the lower left, with its length."""
    rows, columns = axes.images[0].get_size()
    left, y, length = 0.05 * columns, 0.94 * rows, BAR_MM / spacing_mm[1]
    dark = [withStroke(linewidth=4, foreground="black", alpha=0.6)]
    axes.plot([left, left + length], [y, y], color="white", lw=2, path_effects=dark)
    text = f"{BAR_MM:g} mm"
    axes.text(left + length / 2, y - 0.02 * rows, text, color="white", fontsize=8, ha="center", path_effects=dark)
