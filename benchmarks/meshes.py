"""How fast meshes and pages are made, how large a page is, and how far its surfaces lie from the full detail.

usage: python benchmarks/meshes.py SUBJECT_DIR

SUBJECT_DIR holds ct.nii.gz and segmentations/, of full size, as ../shared/data/make_torso_15mm.py writes. The other
side is scikit-image's marching cubes of each structure on the full volume, and a plotly page of what comes out. Both
sides run in turns in one process and thread, medians of ROUNDS rounds. The prediction is the truth, shifted by SHIFT
voxels.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from skimage import measure

from segkit.codes import CodeVolume
from segkit.meshes import Mesh, distances_mm, is_closed, make_mesh, make_meshes
from segkit.pages import mesh_figure, write_page
from segkit.staging import StagedSubject, stage_subject
from segkit.subjects import find_subjects

ROUNDS = 5
SHIFT = (2, 1, 1)  # voxels (z, y, x)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        [subject] = [each for each in find_subjects(folder.parent)[0] if each.name == folder.name]
        staged = stage_subject(subject, Path(scratch) / "store")
        compare_speed(staged, Path(scratch))
        describe_meshes(staged)


def compare_speed(subject: StagedSubject, scratch: Path) -> None:
    """Both sides in turns, and the size of the page of truth and prediction."""
    truth = subject.labels()
    prediction = truth.with_codes(shifted(truth.codes))
    there = make_meshes(truth, subject.grid)
    layers = {"ground truth": there, "prediction": make_meshes(prediction, subject.grid)}
    sides = {
        "plain: marching cubes on the full volume": lambda: plain_meshes(truth),
        "plain: the same and a page": lambda: plain_page(plain_meshes(truth), scratch / "plain.html"),
        "segkit: all meshes": lambda: make_meshes(truth, subject.grid),
        "segkit: all meshes and the page": lambda: write_page(
            scratch / "one.html", mesh_figure("s0000", {"ground truth": make_meshes(truth, subject.grid)})
        ),
        "segkit: page of both, with distances, from the meshes": lambda: write_page(
            scratch / "pair.html", mesh_figure("s0000", layers)
        ),
    }
    seconds = in_turns(sides)
    plain = seconds["plain: marching cubes on the full volume"]
    print(f"{subject.name}: {truth.codes.shape} voxels, {len(there)} structures, medians of {ROUNDS} rounds\n")
    print("| | s | marching cubes on the full volume takes |\n|---|---|---|")
    for name, time_taken in seconds.items():
        print(f"| {name} | {time_taken:.2f} | {plain / time_taken:.1f} times as long |")
    print("\n| page | MB |\n|---|---|")
    for name in ("plain", "one", "pair"):
        print(f"| {name} | {(scratch / f'{name}.html').stat().st_size / 1e6:.1f} |")
    print(f"| of these plotly.js | {len(get_plotlyjs().encode()) / 1e6:.1f} |\n")


def describe_meshes(subject: StagedSubject) -> None:
    """Distances between simplified and full-detail surfaces in both directions, and whether the meshes are closed."""
    volume, grid = subject.labels(), subject.grid
    made = make_meshes(volume, grid)
    voxel = min(subject.spacing_mm)
    away, lost, faces = {}, {}, 0
    for name, mesh in made.items():
        full = make_mesh(volume.mask(name), grid.canonical_affine, 1)
        away[name] = float(distances_mm(mesh.vertices, full).max()) / voxel
        lost[name] = float(distances_mm(full.vertices, mesh).max()) / voxel
        faces += len(full.faces)
    kept = sum(len(mesh.faces) for mesh in made.values())
    print("| | |\n|---|---|")
    print(f"| triangles | {kept} of {faces} |")
    print(f"| closed meshes | {sum(is_closed(mesh.faces) for mesh in made.values())} of {len(made)} |")
    for title, found in (("vertex from the full detail", away), ("full detail from the surface", lost)):
        worst = max(found, key=found.get)
        print(f"| farthest {title} | {found[worst]:.2f} voxels ({worst}) |")


def plain_meshes(volume: CodeVolume) -> dict[str, Mesh]:
    """What people write: a mask for each structure, marching cubes over all of it."""
    made = {}
    for name in volume.boxes():
        vertices, faces, _, _ = measure.marching_cubes(volume.mask(name).astype(np.float32), 0.5)
        made[name] = Mesh(vertices, faces)
    return made


def plain_page(made: dict[str, Mesh], path: Path) -> None:
    figure = go.Figure()
    for name, mesh in made.items():
        (z, y, x), (i, j, k) = mesh.vertices.T, mesh.faces.T
        figure.add_trace(go.Mesh3d(x=x, y=y, z=z, i=i, j=j, k=k, name=name))
    figure.write_html(path)


def shifted(codes: np.ndarray) -> np.ndarray:
    """The codes moved by SHIFT, background where they came from."""
    moved = np.zeros_like(codes)
    moved[tuple(slice(step, None) for step in SHIFT)] = codes[tuple(slice(None, -step) for step in SHIFT)]
    return moved


def in_turns(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of each side."""
    taken = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    main()
