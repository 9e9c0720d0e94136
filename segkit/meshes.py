"""Label codes -> surface meshes in mm -> one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fast_simplification
import numpy as np
import plotly.graph_objects as go
from scipy import ndimage
from skimage import measure

from segkit.codes import CodeVolume
from segkit.formats.nifti import Grid
from segkit.labels import GROUPS, OFFICIAL, color_of, group_of
from segkit.runs import write_whole

KEPT_FACES = 0.15  # the rest adds bytes but nothing that an eye sees at the size of a page
SMOOTHING_VOXELS = 0.5


@dataclass(frozen=True)
class Mesh:
    """A closed surface: vertices float32 (V, 3) in world mm (RAS+), faces int (F, 3)."""

    vertices: np.ndarray
    faces: np.ndarray


def make_mesh(mask: np.ndarray, canonical_affine: np.ndarray, kept_faces: float = KEPT_FACES) -> Mesh | None:
    """The surface of a mask, bool (z, y, x) on the canonical grid; None for an empty one.

    Marching cubes (Lewiner et al. 2003, scikit-image) on the bounding box, after a light Gaussian that takes away the
    steps of the voxels; then simplified to the share `kept_faces` of its triangles.
    """
    boxes = ndimage.find_objects(mask.astype(np.uint8), max_label=1)
    if not boxes or boxes[0] is None:
        return None
    padded = np.pad(mask[boxes[0]], 2).astype(np.float32)
    smooth = ndimage.gaussian_filter(padded, SMOOTHING_VOXELS)
    # what is one or two voxels thick would vanish below one half: then half of its own height is its surface
    level = min(0.5, float(smooth.max()) / 2)
    vertices, faces, _, _ = measure.marching_cubes(smooth, level, allow_degenerate=False)
    if kept_faces < 1 and len(faces) > 200:
        vertices, faces = fast_simplification.simplify(
            vertices.astype(np.float32), faces.astype(np.int32), target_reduction=1 - max(kept_faces, 200 / len(faces))
        )
    xyz = (vertices - 2 + [side.start for side in boxes[0]])[:, ::-1]
    world = xyz @ canonical_affine[:3, :3].T + canonical_affine[:3, 3]
    if np.linalg.det(canonical_affine[:3, :3]) < 0:
        faces = faces[:, ::-1]  # a mirroring affine turns the surface inside out
    return Mesh(world.astype(np.float32), faces)


def make_meshes(volume: CodeVolume, grid: Grid, structures: Sequence[str] | None = None) -> dict[str, Mesh]:
    """The meshes of the structures that occur in codes (z, y, x); all of them, or those named."""
    meshes = {}
    for name in volume.structures if structures is None else structures:
        mesh = make_mesh(volume.mask(name), grid.canonical_affine)
        if mesh is not None:
            meshes[name] = mesh
    return meshes


def mesh_figure(subject: str, layers: Mapping[str, Mapping[str, Mesh]]) -> go.Figure:
    """A plotly figure of layers ("ground truth", "prediction") of meshes, a legend each.

    In a legend: a click on a structure switches it, a double click its whole group, a click on the legend's title the
    whole layer. The first layer starts visible, the others in their legend only.
    """
    figure = go.Figure()
    for place, (layer, meshes) in enumerate(layers.items()):
        for name in sorted(meshes, key=_page_order):
            figure.add_trace(_trace(name, meshes[name], layer, place))
    legends = {f"legend{place + 1 if place else ''}": _legend(layer, place) for place, layer in enumerate(layers)}
    side = {"showbackground": False, "showgrid": True, "gridcolor": "#dddddd", "zeroline": False, "ticksuffix": " mm"}
    figure.update_layout(
        title=f"{subject}: {' and '.join(layers)} in mm, seen from the front",
        scene={
            "aspectmode": "data",
            "xaxis": {**side, "title": "left — right"},
            "yaxis": {**side, "title": "back — front"},
            "zaxis": {**side, "title": "feet — head"},
            "camera": _from_the_front([mesh for meshes in layers.values() for mesh in meshes.values()]),
        },
        margin={"l": 0, "r": 0, "t": 45, "b": 0},
        paper_bgcolor="white",
        **legends,
    )
    return figure


def _from_the_front(meshes: Sequence[Mesh]) -> dict:
    """A camera in front of the patient, whose right is on the left of the picture, from where everything is seen."""
    corners = np.array([corner for mesh in meshes for corner in (mesh.vertices.min(0), mesh.vertices.max(0))])
    extent = np.ptp(corners, axis=0) if len(corners) else np.ones(3)
    # plotly's unit with the aspect mode "data": the geometric mean of the three extents
    extent = extent / np.prod(extent) ** (1 / 3)
    away = 1.25 * max(extent[0], extent[2]) + extent[1] / 2
    return {"eye": {"x": 0.0, "y": float(away), "z": 0.15}, "up": {"x": 0, "y": 0, "z": 1}}


def _page_order(name: str) -> tuple:
    official = list(OFFICIAL).index(name) if name in OFFICIAL else len(OFFICIAL)
    return (GROUPS.index(group_of(name)), official, name)


def _trace(name: str, mesh: Mesh, layer: str, place: int) -> go.Mesh3d:
    x, y, z = np.round(mesh.vertices, 1).T
    i, j, k = mesh.faces.astype(np.int32).T
    group = group_of(name)
    return go.Mesh3d(
        x=x, y=y, z=z, i=i, j=j, k=k, color=color_of(name), name=name, showlegend=True,
        legend=f"legend{place + 1 if place else ''}",
        legendgroup=f"{layer}: {group}", legendgrouptitle={"text": group},
        visible=True if place == 0 else "legendonly",
        flatshading=False, lighting={"ambient": 0.45, "diffuse": 0.75, "specular": 0.15, "roughness": 0.7},
        lightposition={"x": 0, "y": 1e5, "z": 1e5},
        hovertemplate=f"{name} ({layer})<br>%{{x:.0f}}, %{{y:.0f}}, %{{z:.0f}} mm<extra></extra>",
    )  # fmt: skip


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


def write_page(path: str | Path, figure: go.Figure) -> Path:
    """Write a figure as one HTML file that opens without a network: plotly.js is inside."""
    config = {"displaylogo": False, "responsive": True}
    html = figure.to_html(include_plotlyjs=True, full_html=True, config=config, default_height="100vh")
    return write_whole(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))
