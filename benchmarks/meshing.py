"""All structures of a subject as meshes, and a page of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.sides import Side
from benchmarks.tables import Table, floor_row, rows_of

if TYPE_CHECKING:
    from benchmarks.bench import Bench  # of segkit's environment
    from segkit.staging import StagedSubject


def measure(bench: Bench) -> Table:
    [subject] = bench.open(bench.subject_dir).staged.values()
    parameters = {"folder": str(subject.folder), "page": str(bench.scratch / "page.html")}
    sides = [
        Side("segkit: closed, simplified, in mm, and the page", "benchmarks.meshing:segkit", parameters),
        Side("scikit-image on full volumes, and a plotly page", "benchmarks.meshing:plain", parameters, "peer",
             rounds=2, at_home=True),
    ]  # fmt: skip
    taken = bench.turns(sides)
    rows = rows_of(sides, taken, {name: f"page of {side.found['page_mb']:.1f} MB" for name, side in taken.items()
                                  if "page_mb" in side.found})  # fmt: skip
    machine = bench.store.kept("machine")
    if machine:
        seconds = int(np.prod(subject.shape)) / machine["rates"]["memory_gb_s"] / 1e9
        rows.append(floor_row("reading the label volume once from memory", seconds, rows))
    what = (
        f"{len(subject.labels().boxes())} structures of a subject of {bench.scan_name(subject.shape[::-1])} voxels "
        f"(made of {bench.data_name}), from label codes on."
    )
    return Table("meshing", "Meshes and a page", what, rows, [described(subject)])


def described(subject: StagedSubject) -> str:
    """What simplification costs: triangles, closedness, and the farthest that surfaces lie from the full detail."""
    from segkit.meshes import distances_mm, is_closed, make_mesh, make_meshes

    volume, grid = subject.labels(), subject.grid
    made, voxel, away, faces = make_meshes(volume, grid), min(subject.spacing_mm), [], 0
    for name, mesh in made.items():
        full = make_mesh(volume.mask(name), grid.canonical_affine, 1)
        away.append(float(distances_mm(mesh.vertices, full).max()) / voxel)
        faces += len(full.faces)
    closed = sum(is_closed(mesh.faces) for mesh in made.values())
    kept = sum(len(mesh.faces) for mesh in made.values())
    return (
        f"Of segkit's meshes {closed} of {len(made)} are closed, with {kept:,} of {faces:,} triangles; no vertex lies "
        f"more than {max(away):.2f} voxels from the full detail."
    )


def segkit(folder: str, page: str) -> Callable[[], dict]:
    from benchmarks.fetching import staged
    from segkit.meshes import make_meshes
    from segkit.pages import mesh_figure, write_page

    subject = staged(folder)
    volume = subject.labels()

    def work() -> dict:
        write_page(page, mesh_figure("s0000", {"ground truth": make_meshes(volume, subject.grid)}))
        return {"page_mb": Path(page).stat().st_size / 1e6}

    return work


def plain(folder: str, page: str) -> Callable[[], dict]:
    """What people write: a mask for each structure, marching cubes over all of it."""
    import plotly.graph_objects as go
    from skimage import measure as scikit

    from benchmarks.fetching import staged

    volume = staged(folder).labels()
    held = list(volume.boxes())

    def work() -> dict:
        figure = go.Figure()
        for name in held:
            vertices, faces, _, _ = scikit.marching_cubes(volume.mask(name).astype(np.float32), 0.5)
            (z, y, x), (i, j, k) = vertices.T, faces.T
            figure.add_trace(go.Mesh3d(x=x, y=y, z=z, i=i, j=j, k=k, name=name))
        figure.write_html(page)
        return {"page_mb": Path(page).stat().st_size / 1e6}

    return work
