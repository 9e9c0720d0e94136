"""Label codes -> closed surface meshes in mm, and distances between surfaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import fast_simplification
import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from skimage import measure

from segkit.codes import CodeVolume
from segkit.formats.nifti import Grid

KEPT_FACES = (0.1, 0.25)  # for fine and for coarse voxels; the rest adds bytes but little that an eye sees on a page
FACE_MM2 = 11
FEWEST_FACES = 400
ISLAND_FACES = 200
THICK_VOXELS = 4  # from this mean thickness on half of the resolution does, unless it loses something
STRAY_VOXELS = 0.9
NOWHERE = (slice(0, 0),) * 3
PIECE = 4096
"""Points whose distances are computed together."""
TINY = 1e-30  # mm2; a side or triangle without extent has no direction to divide by


@dataclass(frozen=True)
class Mesh:
    """A closed surface: vertices float32 (V, 3) in world mm (RAS+), faces int32 (F, 3), counter-clockwise outside."""

    vertices: np.ndarray
    faces: np.ndarray


def make_meshes(volume: CodeVolume, grid: Grid, structures: Sequence[str] | None = None) -> dict[str, Mesh]:
    """The meshes of the structures that occur in codes (z, y, x); all of them, or those named.

    One after the other: the simplification keeps its mesh in global variables and holds Python's lock, so that threads
    are out; two processes took longer than one. Raises SegkitError for a structure that is not annotated.
    """
    boxes, canonical_affine = volume.boxes(), grid.canonical_affine
    meshes = {}
    for name in volume.structures if structures is None else structures:
        box = boxes.get(name, NOWHERE)
        affine = canonical_affine.copy()
        affine[:3, 3] += affine[:3, :3] @ [side.start for side in box[::-1]]
        mesh = make_mesh(volume.at(box).mask(name), affine)
        if mesh is not None:
            meshes[name] = mesh
    return meshes


def make_mesh(mask: np.ndarray, canonical_affine: np.ndarray, kept_faces: float | None = None) -> Mesh | None:
    """The surface of a mask, bool (z, y, x) on the canonical grid or a part of it; None for an empty one.

    Marching cubes (Lewiner et al. 2003, scikit-image) after a light smoothing that takes away the steps of the voxels,
    then simplified (quadric errors, Garland and Heckbert 1997, fast-simplification) to the share `kept_faces` of the
    triangles: 1 is the full detail, None one triangle for about 11 mm2 within the bounds of KEPT_FACES. Closed: each
    edge has two faces, also where the mask touches the border.
    """
    if not mask.any():
        return None
    volume = np.linalg.det(canonical_affine[:3, :3])  # of a voxel in mm3, negative where the affine mirrors
    if kept_faces is None:
        kept_faces = float(np.clip(abs(volume) ** (2 / 3) / (2 * FACE_MM2), *KEPT_FACES))
    sides = _voxel_sides(mask)
    # a slab n voxels thick has a side above and below for each n voxels
    thick = bool(2 * np.count_nonzero(mask) >= THICK_VOXELS * sides)
    vertices, faces = _surface(mask, halve=thick and kept_faces < 1)
    target = max(FEWEST_FACES, int(kept_faces * 2 * sides))  # marching cubes makes about two triangles a side
    if kept_faces < 1 and len(faces) > target:
        vertices, faces = _simplify(vertices, faces, target)
    if volume < 0:
        faces = faces[:, ::-1]  # a mirroring affine turns the surface inside out
    world = vertices @ canonical_affine[:3, :3].T + canonical_affine[:3, 3]
    return Mesh(world.astype(np.float32), faces)


def _voxel_sides(mask: np.ndarray) -> int:
    """The number of sides of voxels between inside and outside; what lies beyond the border is outside."""
    turned = (np.moveaxis(mask, axis, 0) for axis in range(3))
    return sum(
        int(np.count_nonzero(plane[1:] != plane[:-1]) + np.count_nonzero(plane[0]) + np.count_nonzero(plane[-1]))
        for plane in turned
    )


def _surface(mask: np.ndarray, halve: bool) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) in voxels (x, y, z) and faces, int32 (F, 3); with `halve` from the means of 2 x 2 x 2 voxels,
    unless those lose something.
    """
    step = 2 if halve else 1
    counts = _counts(mask, step)
    field, level = _smoothed(counts)
    if halve and _loses(counts, field > level):
        return _surface(mask, False)
    zyx, faces, _, _ = measure.marching_cubes(field.astype(np.float32), level)
    return (zyx[:, ::-1] - 2) * step + (step - 1) / 2, faces.astype(np.int32)


def _counts(mask: np.ndarray, step: int) -> np.ndarray:
    """The mask's voxels in each cube of `step` voxels a side, uint16, with two cells of outside around it."""
    counts = np.zeros([-(-n // step) * step + 4 * step for n in mask.shape], np.uint16)
    counts[tuple(slice(2 * step, 2 * step + n) for n in mask.shape)] = mask
    for axis in range(3) if step == 2 else ():
        along = np.moveaxis(counts, axis, 0)
        counts = np.moveaxis(along[::2] + along[1::2], 0, axis)
    return counts


def _smoothed(counts: np.ndarray) -> tuple[np.ndarray, float]:
    """Smoothed in whole numbers with the weights 1, 7, 1 along each axis (a Gaussian of 0.47 cells), and the level of
    the surface: in between two of them it is met by no cell, so that no triangle degenerates.
    """
    field = counts
    for axis in range(3):
        smooth = field * np.uint16(7)
        before, after = np.moveaxis(field, axis, 0), np.moveaxis(smooth, axis, 0)
        after[1:] += before[:-1]
        after[:-1] += before[1:]
        field = smooth
    # what is one or two voxels thick would vanish below one half: half of its own height is its surface
    return field, (int(field.max()) - 1) // 2 + 0.5


def _loses(counts: np.ndarray, inside: np.ndarray) -> bool:
    """Whether some of the mask lies where neither its cell nor one beside it is inside, or some of the outside where
    all of them are; counts: the mask's voxels in each cell of 2 x 2 x 2.
    """
    lost = (counts > 0) & ~ndimage.binary_dilation(inside) | (counts < 8) & ndimage.binary_erosion(inside)
    return bool(lost.any())


def _simplify(vertices: np.ndarray, faces: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray]:
    """A closed mesh (vertices in voxels) with about `target` faces, still closed and near the surface that it had.

    Islands of few faces stay as they are: simplified they would vanish, and a false alarm may be no larger.
    """
    island = _sizes_of_pieces(len(vertices), faces) <= ISLAND_FACES
    if np.count_nonzero(~island) <= target:
        return vertices, faces
    fewer, kept = fast_simplification.simplify(vertices, faces[~island], target_count=target)
    # where faces are nearly flat the best point of a collapse can lie far off
    away, nearest = cKDTree(vertices, compact_nodes=False, balanced_tree=False).query(fewer)
    stray = away > STRAY_VOXELS
    fewer[stray] = vertices[nearest[stray]]
    kept = _without_folds(kept)
    for order in (1, -1):
        if not is_closed(kept):
            fewer, kept = _cut_apart(fewer, kept, order)
    if not is_closed(kept):
        return vertices, faces  # rare: the full detail is closed
    joined = np.concatenate([kept, faces[island] + len(fewer)])
    used, joined = np.unique(joined, return_inverse=True)
    return np.concatenate([fewer, vertices])[used], joined.reshape(-1, 3).astype(np.int32)


def _sizes_of_pieces(vertices: int, faces: np.ndarray) -> np.ndarray:
    """For each face, (F,), how many faces the connected piece has to which it belongs."""
    ends = np.concatenate([faces[:, 0], faces[:, 0]]), np.concatenate([faces[:, 1], faces[:, 2]])
    _, piece = connected_components(coo_array((np.ones(len(ends[0]), bool), ends), (vertices, vertices)), False)
    piece = piece[faces[:, 0]]
    return np.bincount(piece)[piece]


def is_closed(faces: np.ndarray) -> bool:
    """Whether each edge of faces (F, 3) has exactly two of them."""
    edges = np.sort(_half_edges(faces), axis=1).astype(np.int64)
    return bool((np.unique(edges[:, 0] << 32 | edges[:, 1], return_counts=True)[1] == 2).all())


def _half_edges(faces: np.ndarray) -> np.ndarray:
    """From which vertex to which the sides of the faces run, (3 F, 2); side 3 f + c starts at corner c of face f."""
    return np.stack([faces, np.roll(faces, -1, axis=1)], axis=-1).reshape(-1, 2)


def _without_folds(faces: np.ndarray) -> np.ndarray:
    """The faces (F, 3) without those that lie back to back on the same three vertices: a fold has no inside."""
    small, middle, large = np.sort(faces, axis=1).astype(np.int64).T
    triangles, same = np.unique((small << 42) | (middle << 21) | large, return_inverse=True)
    if len(triangles) == len(faces):
        return faces
    after_smallest = np.take_along_axis(faces, (faces.argmin(1)[:, None] + 1) % 3, axis=1)[:, 0]
    front = np.where(after_smallest == middle, 1, -1)
    left = np.flatnonzero(np.bincount(same, front)[same] * front > 0)
    return faces[left[np.unique(same[left], return_index=True)[1]]]


def _cut_apart(vertices: np.ndarray, faces: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Sheets that share an edge of four faces, as where a tube was squeezed flat, get vertices of their own.

    The sides that run one way are paired with those that run back, where there are two of each in rising (`order` 1)
    or falling (-1) order of their faces; corners that meet over a pair are one vertex.
    """
    sides = _half_edges(faces)
    forth = np.flatnonzero(sides[:, 0] < sides[:, 1])
    back = np.flatnonzero(sides[:, 0] > sides[:, 1])
    forth = forth[np.lexsort((forth, sides[forth, 1], sides[forth, 0]))]
    back = back[np.lexsort((order * back, sides[back, 0], sides[back, 1]))]
    if not np.array_equal(sides[forth], sides[back][:, ::-1]):
        return vertices, faces
    following = np.roll(np.arange(faces.size).reshape(-1, 3), -1, axis=1).ravel()
    ends = np.concatenate([forth, following[forth]]), np.concatenate([following[back], back])
    meeting = coo_array((np.ones(len(ends[0]), bool), ends), shape=(faces.size, faces.size))
    _, corner = connected_components(meeting, directed=False)
    _, first = np.unique(corner, return_index=True)
    return vertices[faces.ravel()[first]], corner.reshape(-1, 3)


def distances_mm(points: np.ndarray, mesh: Mesh) -> np.ndarray:
    """The distance of each point, (N, 3) in mm, to the nearest place on a mesh's surface: float32 (N,) in mm.

    Exact: triangles are looked at in the order of their middles, until those to come are too far away to matter.
    """
    triangles = _split_large(mesh.vertices.astype(float)[mesh.faces])
    middles = triangles.mean(1)
    reaches = np.linalg.norm(triangles - middles[:, None], axis=2).max(1)
    tree = cKDTree(middles)
    pieces = np.array_split(np.asarray(points, float), max(1, len(points) // PIECE))
    return np.concatenate([_distances(piece, triangles, reaches, tree) for piece in pieces]).astype(np.float32)


def _distances(points: np.ndarray, triangles: np.ndarray, reaches: np.ndarray, tree: cKDTree) -> np.ndarray:
    """As `distances_mm`; `reaches` is how far the triangles extend from their middles, which are in the tree."""
    found = _to_triangles(points, triangles[tree.query(points)[1]])
    places, number = np.arange(len(points)), 0
    while len(places) and number < len(triangles):
        number = min(max(24, 2 * number), len(triangles))
        away, which = tree.query(points[places], np.arange(1, number + 1))
        row, column = np.nonzero(away - reaches[which] < found[places, None])
        candidates = _to_triangles(points[places[row]], triangles[which[row, column]])
        np.minimum.at(found, places[row], candidates)
        places = places[away[:, -1] - reaches.max() < found[places]]
    return found


def _to_triangles(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Distances of points (N, 3) to a triangle each, (N, 3, 3): to the plane from above the inside, else to a side."""
    sides = np.roll(triangles, -1, axis=1) - triangles
    from_corners = points[:, None] - triangles
    along = np.einsum("ncx,ncx->nc", from_corners, sides) / np.maximum(np.einsum("ncx,ncx->nc", sides, sides), TINY)
    to_sides = from_corners - np.clip(along, 0, 1)[..., None] * sides
    squared = np.einsum("ncx,ncx->nc", to_sides, to_sides).min(1)
    normal = np.cross(sides[:, 0], sides[:, 1])
    inside = (np.einsum("ncx,nx->nc", np.cross(sides, from_corners), normal) > 0).all(1)
    height = np.einsum("nx,nx->n", from_corners[:, 0], normal)
    above = height**2 / np.maximum(np.einsum("nx,nx->n", normal, normal), TINY)
    return np.sqrt(np.where(inside, above, squared))


def _split_large(triangles: np.ndarray) -> np.ndarray:
    """The same surface, (F, 3, 3), in triangles of similar size: those with a long side are halved until none has."""
    longest = np.linalg.norm(np.roll(triangles, -1, axis=1) - triangles, axis=2).max(1)
    limit = max(float(np.median(longest)), float(longest.max()) / 30)
    small = []
    while len(triangles):
        lengths = np.linalg.norm(np.roll(triangles, -1, axis=1) - triangles, axis=2)
        large = lengths.max(1) > limit
        small.append(triangles[~large])
        turn = (lengths[large].argmax(1)[:, None] + np.arange(3)) % 3
        start, end, other = np.moveaxis(np.take_along_axis(triangles[large], turn[..., None], 1), 1, 0)
        middle = (start + end) / 2
        triangles = np.concatenate([np.stack([start, middle, other], 1), np.stack([middle, end, other], 1)])
    return np.concatenate(small)
