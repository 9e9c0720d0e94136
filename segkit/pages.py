"""Meshes -> one HTML page that opens without a network: layers to switch, and how far a prediction lies beside."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from segkit.labels import GROUPS, OFFICIAL, check_name, color_of, group_of
from segkit.meshes import Mesh, distances_mm
from segkit.runs import write_whole

DISTANCE_COLORS = "Viridis"  # from dark to bright also for the colour-blind and in print
FALSE_ALARM_COLOR = "#9e9e9e"  # grey: no distance to a surface that is not there
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body {{ margin: 0; }}</style>
</head>
<body>
{body}
</body>
</html>
"""
SIDE = {"showbackground": False, "showgrid": True, "gridcolor": "#dddddd", "zeroline": False}


def mesh_figure(subject: str, layers: Mapping[str, Mapping[str, Mesh]], note: str = "") -> go.Figure:
    """A plotly figure of layers ("ground truth", "prediction") of meshes, a legend each; `note` follows in its title.

    In a legend: a click on a structure switches it, a double click its whole group, a click on the legend's title the
    whole layer. The first layer starts visible, the others in their legend only. Buttons colour these others by the
    distance of each vertex to the same structure's surface in the first, in mm; grey is what the first does not hold,
    be it absent or not annotated. Letters say which side of the patient lies where, however the view is turned.
    Raises SegkitError for names of the subject or of a structure that are not safe (`segkit.labels.check_name`).
    """
    layers = {html.escape(layer): meshes for layer, meshes in layers.items()}
    box = _box([mesh for meshes in layers.values() for mesh in meshes.values()])
    first, reference = next(iter(layers.items()), ("", {}))
    figure = go.Figure()
    for place, (layer, meshes) in enumerate(layers.items()):
        for name in sorted(map(check_name, meshes), key=_page_order):
            figure.add_trace(_trace(name, meshes[name], layer, place))
            if place:
                _add_distances(figure.data[-1], meshes[name], reference.get(name), first)
    legends = {_legend_id(place): _legend(layer, place) for place, layer in enumerate(layers)}
    figure.update_layout(
        title={"text": f"{check_name(subject)}, from the front{note}", "x": 0.01, "font": {"size": 15}},
        scene={
            "aspectmode": "data",
            "xaxis": {**SIDE, "nticks": 4, "title": "x (mm)"},
            "yaxis": {**SIDE, "nticks": 3, "title": "y (mm)"},  # seen from its end
            "zaxis": {**SIDE, "title": "z (mm)"},
            "camera": _from_the_front(box),
            "annotations": _sides(box),
        },
        margin={"l": 0, "r": 0, "t": 45, "b": 0},
        paper_bgcolor="white",
        **legends,
    )
    if any(trace.intensity is not None for trace in figure.data):
        _add_buttons(figure, first)
    return figure


def write_page(path: str | Path, figure: go.Figure) -> Path:
    """Write a figure as one HTML file that opens without a network: plotly.js is inside."""
    config = {"displaylogo": False, "responsive": True}
    body = figure.to_html(include_plotlyjs=True, full_html=False, config=config, default_height="100vh")
    page = _PAGE.format(title=html.escape(figure.layout.title.text), body=body)
    return write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _box(meshes: Sequence[Mesh]) -> np.ndarray:
    """What holds all meshes: float (2, 3), its lowest and highest corner in mm; that of a unit cube without meshes."""
    corners = np.array([corner for mesh in meshes for corner in (mesh.vertices.min(0), mesh.vertices.max(0))])
    return np.array([corners.min(0), corners.max(0)]) if len(corners) else np.array([[0.0] * 3, [1.0] * 3])


def _sides(box: np.ndarray) -> list[dict]:
    """Letters at the ends of a box in RAS coordinates: right, left, anterior, posterior, head, feet."""
    (x, y, z), (left, back, feet), (right, front, head) = box.mean(0), *box
    # front and back stand at a corner: in the middle one would hide the other, and what lies between them
    places = {
        "R": (right, y, z), "L": (left, y, z), "A": (left, front, feet), "P": (left, back, feet), "H": (x, y, head),
        "F": (x, y, feet),
    }  # fmt: skip
    return [
        {**dict(zip("xyz", map(float, place), strict=True)), "text": f"<b>{letter}</b>", "showarrow": False,
         "font": {"size": 14}, "bgcolor": "rgba(255,255,255,0.75)"}
        for letter, place in places.items()
    ]  # fmt: skip


def _from_the_front(box: np.ndarray) -> dict:
    """A camera in front of the patient, whose right is on the left of the picture, from where a box is seen."""
    extent = np.ptp(box, axis=0)
    # plotly's unit with the aspect mode "data": the geometric mean of the three extents
    extent = extent / np.prod(extent) ** (1 / 3)
    away = 1.4 * max(extent[0], extent[2]) + extent[1] / 2
    return {"eye": {"x": 0.0, "y": float(away), "z": 0.15}, "up": {"x": 0, "y": 0, "z": 1}}


def _page_order(name: str) -> tuple:
    official = list(OFFICIAL).index(name) if name in OFFICIAL else len(OFFICIAL)
    return (GROUPS.index(group_of(name)), official, name)


def _trace(name: str, mesh: Mesh, layer: str, place: int) -> go.Mesh3d:
    x, y, z = mesh.vertices.astype(np.float32).T
    # the page holds the arrays byte by byte: indices as small as the vertices allow
    i, j, k = mesh.faces.astype(np.min_scalar_type(len(mesh.vertices))).T
    group = group_of(name)
    return go.Mesh3d(
        x=x, y=y, z=z, i=i, j=j, k=k, color=color_of(name), name=name, showlegend=True,
        legend=_legend_id(place), legendgroup=f"{layer}: {group}", legendgrouptitle={"text": group},
        visible=True if place == 0 else "legendonly",
        flatshading=False, lighting={"ambient": 0.45, "diffuse": 0.75, "specular": 0.15, "roughness": 0.7},
        lightposition={"x": 0, "y": 1e5, "z": 1e5},
        hovertemplate=f"{name} ({layer})<br>%{{x:.0f}}, %{{y:.0f}}, %{{z:.0f}} mm<extra></extra>",
    )  # fmt: skip


def _add_distances(trace: go.Mesh3d, mesh: Mesh, reference: Mesh | None, layer: str) -> None:
    """Give a trace the distances to its reference, or a name that says that there is none in `layer`."""
    place = trace.hovertemplate.removesuffix("<extra></extra>")
    if reference is None:
        trace.update(name=f"{trace.name} (not in {layer})", hovertemplate=f"{place}<br>not in {layer}<extra></extra>")
        return
    trace.update(
        intensity=distances_mm(mesh.vertices, reference),
        # until the button is pressed both ends of the scale are the structure's own colour
        colorscale=_plain(trace.color),
        showscale=False,
        hovertemplate=f"{place}<br>%{{intensity:.1f}} mm from {layer}<extra></extra>",
    )


def _plain(color: str) -> list:
    return [[0, color], [1, color]]


def _add_buttons(figure: go.Figure, layer: str) -> None:
    """Buttons that colour by structure, or show the further layers alone, coloured by their distance to `layer`."""
    traces = figure.data
    measured = [trace for trace in traces if trace.intensity is not None]
    most = max(1, int(np.ceil(np.percentile(np.concatenate([trace.intensity for trace in measured]), 95))))
    for trace in measured:
        trace.update(cmin=0, cmax=most)
    first = [trace.legend == _legend_id(0) for trace in traces]
    colors = [trace.color for trace in traces]
    greyed = [
        FALSE_ALARM_COLOR if trace.intensity is None and not is_first else trace.color
        for trace, is_first in zip(traces, first, strict=True)
    ]
    plain = {"color": colors, "colorscale": [trace.colorscale for trace in traces], "marker.showscale": False}
    distances = {
        "color": greyed,
        "colorscale": DISTANCE_COLORS,
        "marker.showscale": True,
        "visible": [*("legendonly" if is_first else True for is_first in first), True],
    }
    # the bar belongs to a trace without points: it stays when a structure is switched off
    figure.add_trace(_color_bar(layer, most))
    figure.update_layout(
        updatemenus=[{
            "type": "buttons", "direction": "right", "showactive": True,
            "x": 0.5, "xanchor": "center", "y": 1.0, "yanchor": "bottom", "pad": {"b": 4},
            "buttons": [
                {"label": "structures", "method": "restyle", "args": [plain]},
                {"label": f"distance to {layer}", "method": "restyle", "args": [distances]},
            ],
        }]
    )  # fmt: skip


def _color_bar(layer: str, most: int) -> go.Scatter3d:
    """A trace that shows nothing but the colours of 0 to `most` mm."""
    bar = {
        "title": {"text": f"distance to {layer}", "side": "top"}, "ticksuffix": " mm", "orientation": "h",
        "len": 0.4, "thickness": 12, "x": 0.5, "y": 0.01, "yanchor": "bottom", "bgcolor": "rgba(255,255,255,0.75)",
    }  # fmt: skip
    marker = {"color": [0], "colorscale": DISTANCE_COLORS, "cmin": 0, "cmax": most, "showscale": False, "colorbar": bar}
    return go.Scatter3d(x=[None], y=[None], z=[None], mode="markers", marker=marker, name="scale", showlegend=False)


def _legend_id(place: int) -> str:
    return f"legend{place + 1 if place else ''}"


def _legend(layer: str, place: int) -> dict:
    return {
        "title": {"text": f"<b>{layer}</b>"},
        "x": 1.0 if place == 0 else 0.0,
        "xanchor": "right" if place == 0 else "left",
        "y": 1.0,
        "maxheight": 0.95,
        "groupclick": "toggleitem",
        "groupdoubleclick": "togglegroup",
        "itemdoubleclick": "toggle",
        "titleclick": "toggle",
        "titledoubleclick": False,
        "bgcolor": "rgba(255,255,255,0.75)",
        "font": {"size": 11},
    }
