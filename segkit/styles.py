"""How figures look: colours that colour-blind readers can tell apart, a style a group, and how a figure is kept.

The colours are those of Okabe and Ito (Color Universal Design, 2008). Where several groups stand in one chart each also
has its own marker and line, so that a chart says the same in grey. A structure's own colour (`labels.color_of`) is for
masks over a CT alone: no eye can tell 117 colours apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from segkit.labels import GROUPS
from segkit.runs import write_whole

BLACK, GREY = "#000000", "#777777"
ORANGE, SKY, GREEN, YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
BLUE, VERMILION, PURPLE = "#0072b2", "#d55e00", "#cc79a7"


class GroupStyle(NamedTuple):
    """How a group is drawn in every chart."""

    color: str
    marker: str
    line: Any  # what matplotlib takes as a line style


GROUP_STYLES: Mapping[str, GroupStyle] = {
    "organs": GroupStyle(BLUE, "o", "-"),
    "digestive tract": GroupStyle(ORANGE, "s", "--"),
    "lungs and airways": GroupStyle(SKY, "^", "-."),
    "other bones": GroupStyle(PURPLE, "D", ":"),
    "vertebrae": GroupStyle(VERMILION, "v", "-"),
    "heart and vessels": GroupStyle(GREEN, "P", "--"),
    "brain and cord": GroupStyle(ORANGE, "X", ":"),
    "muscles": GroupStyle(BLUE, "<", (0, (6, 2))),
    "ribs": GroupStyle(GREEN, ">", "-"),
    "other": GroupStyle(GREY, "*", "-."),
}


def groups_in(table: pd.DataFrame) -> list[str]:
    """The groups of a table with a column `group`, in the order of every figure."""
    return [group for group in GROUPS if (table["group"] == group).any()]


def counted(number: int, thing: str) -> str:
    """`1 case`, `2 cases`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def sentence(text: str) -> Figure:
    """A figure that only says why there is nothing to draw."""
    figure = plt.figure(figsize=(6, 1.2))
    figure.text(0.5, 0.5, text, ha="center", va="center", wrap=True)
    return figure


def save_figure(path: str | Path, figure: Figure) -> Path:
    """Write a figure as PNG, whole or not at all."""
    return write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight"))
