"""The figure of the page: how many times as long as segkit each side takes, and what models reach."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.page import number
from benchmarks.tables import Row, Table
from segkit.styles import BLUE, GREEN, GREY, VERMILION, save_figure

SLOWER, FASTER, FLOOR, OURS = BLUE, VERMILION, GREY, GREEN


def draw(tables: Sequence[Table], path: Path) -> None:
    """Bars of times segkit of every peer and floor on a logarithmic axis, and of macro Dice where it was scored."""
    timed = [(table, [row for row in table.rows if row.kind != "segkit" and row.times]) for table in tables]
    timed = [(table, rows) for table, rows in timed if rows]
    scored = [(table, [row for row in table.rows if row.score is not None]) for table in tables]
    scored = [(table, rows) for table, rows in scored if rows]
    lines = max(sum(len(rows) + 1 for _, rows in part) for part in (timed, scored, [(None, [0])]))
    figure = Figure(figsize=(13, 0.9 + 0.19 * lines), layout="constrained")
    panels = [panel for panel in ((_times, timed, 3), (_scores, scored, 2)) if panel[1]] or [(_times, timed, 3)]
    widths = [width for *_, width in panels]
    row, *_ = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)
    for axes, (draw_bars, groups, _) in zip(row, panels, strict=True):
        draw_bars(axes, groups)
    for axes in figure.axes:
        axes.set_ylim(lines, -1)  # bars of both are as thick
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(path, figure)


def _times(axes: Axes, groups: Sequence[tuple[Table, list[Row]]]) -> None:
    _bars(axes, [(table.title, [(row.side, row.times, _colour(row.kind, row.times)) for row in rows])
                 for table, rows in groups], start=1)  # fmt: skip
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as long as segkit (blue: slower, orange: faster, grey: a floor)")


def _scores(axes: Axes, groups: Sequence[tuple[Table, list[Row]]]) -> None:
    _bars(axes, [(table.title, [(row.side, row.score, {"segkit": OURS, "floor": FLOOR}.get(row.kind, SLOWER))
                                for row in rows]) for table, rows in groups], start=0)  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_xlabel("macro Dice (green: segkit, grey: the best that its input size allows)")


def _colour(kind: str, times: float) -> str:
    return FLOOR if kind == "floor" else SLOWER if times >= 1 else FASTER


def _bars(axes: Axes, groups: Sequence[tuple[str, list[tuple[str, float, str]]]], start: float) -> None:
    """A bar from `start` to each value, with its number at its end."""
    place, ticks = 0, []
    for title, rows in groups:
        ticks.append((place, title, "bold"))
        for side, value, colour in rows:
            place += 1
            axes.barh(place, value - start, left=start, color=colour, height=0.75)
            side_of_end = "left" if value >= start else "right"
            axes.annotate(f" {number(value)} ", (value, place), va="center", ha=side_of_end, fontsize=7)
            ticks.append((place, side, "normal"))
        place += 1
    axes.set_yticks([tick for tick, _, _ in ticks], [text.replace("`", "") for _, text, _ in ticks], fontsize=7)
    for label, (_, _, weight) in zip(axes.get_yticklabels(), ticks, strict=True):
        label.set_fontweight(weight)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.2)
