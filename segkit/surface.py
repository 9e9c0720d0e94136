"""Distances in mm between the surfaces of two code volumes, for all structures of a subject at once.

All work on a structure is done on a crop about both of its masks, a byte a voxel. The crop has an empty margin, so that
a step to a neighbour is the same step in flat memory everywhere. Most surfaces are close to each other: the shortest
steps are tried in the order of their length, and only what is further away is searched in a tree.

The rule for empty masks (reference / prediction), as in `metrics`:

    empty / empty          all NaN
    empty / not empty      NSD 0, distances NaN
    not empty / empty      NSD 0, distances NaN
    not annotated          no row
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import joblib
import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from segkit.codes import CodeVolume
from segkit.errors import SegkitError

COLUMNS = ("nsd", "hd95_mm", "hd_mm", "assd_mm", "centroid_distance_mm")
STEPS = 120
"""About how many voxels around a point are looked at before a tree is built: at 1.5 mm all up to 4.5 mm away."""
ROUNDING = 1e-6
"""Spacings come from float32 affines: 2 * 1.5000001 mm is within a tolerance of 3 mm."""


def surface_scores(
    reference: CodeVolume,
    prediction: CodeVolume,
    spacing_mm: Sequence[float],
    tolerance_mm: float = 3.0,
    jobs: int = 1,
    slices: Sequence[int] | None = None,
) -> pd.DataFrame:
    """How far apart the surfaces are of each structure that the reference annotates and the prediction looks for.

    Codes (z, y, x) of one shape; spacing_mm along (z, y, x). A row a structure in the reference's order, float64:

    hd_mm: the largest distance from a surface voxel of one mask to the nearest one of the other (Hausdorff). Surface
    voxels are those with a face on the outside; outside of the volume is outside of the mask. hd95_mm: the 95th
    percentile (linear) of either direction, the larger one. assd_mm: the mean over the distances of both directions
    together. All three as MONAI computes them (`compute_hausdorff_distance`, `compute_average_surface_distance` with
    symmetric=True).

    nsd: surface Dice (Nikolov et al., J Med Internet Res 2021, 23(7):e26151): the share of both surfaces' area that
    lies within tolerance_mm of the other surface, as google-deepmind/surface-distance computes it: elements sit between
    2 x 2 x 2 voxels and weigh the area of the surface of marching cubes there.

    centroid_distance_mm: between both centres of mass.

    Of a scan of which only some `slices` z are scored (all by default) the surfaces are those of the whole masks: where
    a structure goes on beyond these slices there is none. Distances are taken from the surface voxels in these slices
    to the surface anywhere, the area is that between two of them, centres are of what lies in them. A mask without a
    voxel there is empty. What is asked of nothing, distances without a surface voxel or surface Dice without two slices
    side by side that have a surface between them, is NaN.

    `jobs` structures are worked on at a time, in threads; the results are the same. Raises ValueError for shapes that
    differ, SegkitError for a spacing or tolerance that is not positive and finite.
    """
    if reference.codes.shape != prediction.codes.shape:
        raise ValueError(f"shapes differ: reference {reference.codes.shape}, prediction {prediction.codes.shape}")
    spacing = tuple(float(side) for side in spacing_mm)
    if len(spacing) != 3 or not all(0 < number < math.inf for number in (*spacing, tolerance_mm)):
        raise SegkitError(
            f"expected three sides of a voxel and a tolerance in mm, positive and finite; found {spacing} and "
            f"{tolerance_mm}"
        )
    # crops are cut out faster where the last axis lies together, which that of a volume from a NIfTI file does not
    volumes = [volume.with_codes(np.ascontiguousarray(volume.codes)) for volume in (reference, prediction)]
    boxes = [volume.boxes() for volume in volumes]
    scored = np.ones(len(reference.codes), bool)
    there = boxes
    if slices is not None:
        scored = np.isin(np.arange(len(scored)), slices)
        there = [volume.within(slices).boxes() for volume in volumes]
    ruler = _Ruler.of(spacing, float(tolerance_mm))

    def scores(name: str) -> tuple[float, ...]:
        held = sum(name in of_volume for of_volume in there)
        if held < 2:
            return (0.0 if held else math.nan, *[math.nan] * 4)
        own = [of_volume[name] for of_volume in boxes]
        parts = [volume.at(box).mask(name) for volume, box in zip(volumes, own, strict=True)]
        crops, first = _side_by_side(parts, own, ruler.margin)
        asked = None if slices is None else _Asked.of(scored, first[0], len(crops[0]))
        if slices is not None:
            parts = [part & scored[box[0], None, None] for part, box in zip(parts, own, strict=True)]
        centres = [_centre(part, box) for part, box in zip(parts, own, strict=True)]
        return (_surface_dice(crops, ruler, asked), *_surface_distances(crops, ruler, asked), ruler.distance(*centres))

    names = [name for name in reference.structures if name in prediction.structures]
    # threads, whatever the backend that somebody chose for work a subject at a time: nothing is copied
    rows = joblib.Parallel(jobs, require="sharedmem")(joblib.delayed(scores)(name) for name in names)
    return pd.DataFrame(rows, index=names, columns=list(COLUMNS), dtype=float)


@dataclass(frozen=True)
class _Ruler:
    """How far voxels are from each other. shells: mm and the steps (n, 3) of that length, in rising order."""

    spacing: np.ndarray
    tolerance_mm: float
    shells: list[tuple[float, np.ndarray]]

    @classmethod
    def of(cls, spacing: Sequence[float], tolerance_mm: float) -> _Ruler:
        """The shells that hold the STEPS shortest steps; sides of a voxel along (z, y, x)."""
        sides = np.array(spacing)
        radius = (STEPS * sides.prod() * 3 / (4 * math.pi)) ** (1 / 3)  # of a ball as large as that many voxels
        reach = [np.arange(-int(radius / side), int(radius / side) + 1) for side in spacing]
        steps = np.stack(np.meshgrid(*reach, indexing="ij"), axis=-1).reshape(-1, 3)
        lengths = np.sqrt(((steps * sides) ** 2).sum(1))
        radius = min(radius, np.sort(lengths)[:STEPS][-1])  # thick slices: the ball holds more within a slice
        shells = [(length, steps[lengths == length]) for length in np.unique(lengths[lengths <= radius])]
        return cls(sides, tolerance_mm * (1 + ROUNDING), shells)

    @property
    def margin(self) -> np.ndarray:
        """Empty voxels about a crop, so that no step from a surface leaves it; one more for the elements between."""
        return np.max([abs(steps).max(0) for _, steps in self.shells], axis=0) + 1

    def distance(self, first: np.ndarray, second: np.ndarray) -> float:
        return float(np.linalg.norm((first - second) * self.spacing))

    def nearest(self, points: np.ndarray, surface: np.ndarray, limit: float = math.inf) -> np.ndarray:
        """mm from each point (a place in flat memory) to the next voxel of `surface`, bool (z, y, x), not empty.

        Infinite where that is more than `limit`.
        """
        flat, strides = surface.ravel(), np.array(surface.strides)
        found, rest = np.full(len(points), math.inf), np.arange(len(points))
        for length, steps in self.shells:
            if length > limit or not len(rest):
                return found
            hit = np.zeros(len(rest), bool)
            for step in (steps @ strides).tolist():
                hit |= flat[points + step]
            found[rest[hit]] = length
            rest, points = rest[~hit], points[~hit]
        # voxels lie on a lattice: halving boxes without looking at their content makes far searches 3 times as fast
        tree = cKDTree(self._places(np.flatnonzero(flat), surface.shape), 64, compact_nodes=False, balanced_tree=False)
        found[rest] = tree.query(self._places(points, surface.shape), distance_upper_bound=limit)[0]
        return found

    def _places(self, points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.stack(np.unravel_index(points, shape), axis=1) * self.spacing


@dataclass(frozen=True)
class _Asked:
    """Which surfaces of a crop are scored: voxels by their slice, elements by the slice at which they begin.

    Both bool (z, 1, 1). An element lies between two slices that are scored, or between one and the outside of the scan.
    """

    voxels: np.ndarray
    elements: np.ndarray

    @classmethod
    def of(cls, scored: np.ndarray, first: int, length: int) -> _Asked:
        """scored: of each slice of the scan; the crop has `length` of them from `first` on, which may be below 0."""
        z = np.arange(first, first + length + 1)
        outside = (z < 0) | (z >= len(scored))
        inside = ~outside & scored[z.clip(0, len(scored) - 1)]
        elements = (inside[:-1] | outside[:-1]) & (inside[1:] | outside[1:])
        return cls(inside[:-1, None, None], elements[:, None, None])


def _side_by_side(
    parts: list[np.ndarray], boxes: list[tuple[slice, ...]], margin: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """Masks cut out of one volume at `boxes`, each on a crop that holds both and `margin` empty voxels on all sides.

    And where in the volume that crop begins.
    """
    sides = list(zip(*boxes, strict=True))
    first = np.array([min(side.start for side in pair) for pair in sides]) - margin
    last = np.array([max(side.stop for side in pair) for pair in sides]) + margin
    crops = []
    for part, box in zip(parts, boxes, strict=True):
        crop = np.zeros(last - first, bool)
        crop[tuple(slice(side.start - f, side.stop - f) for side, f in zip(box, first, strict=True))] = part
        crops.append(crop)
    return crops, first


def _centre(part: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
    """Centre of mass of a mask cut out at `box`, in voxels of the volume."""
    plane = part.sum(0, dtype=np.uint32)
    along = [[np.count_nonzero(section) for section in part], plane.sum(1), plane.sum(0)]
    return np.array([np.average(np.arange(s.start, s.stop), weights=w) for s, w in zip(box, along, strict=True)])


def _surface_distances(crops: list[np.ndarray], ruler: _Ruler, asked: _Asked | None) -> tuple[float, float, float]:
    """HD95, HD and ASSD in mm."""
    surfaces = [_surface_voxels(crop) for crop in crops]
    points = [np.flatnonzero(own if asked is None else own & asked.voxels) for own in surfaces]
    both = [ruler.nearest(own, other) for own, other in zip(points, surfaces[::-1], strict=True) if len(own)]
    if not both:
        return math.nan, math.nan, math.nan
    together = np.concatenate(both)
    return max(float(np.percentile(way, 95)) for way in both), float(together.max()), float(together.mean())


def _surface_voxels(crop: np.ndarray) -> np.ndarray:
    """The voxels of a mask, bool with an empty margin, that share a face with one outside of it."""
    flat = crop.ravel()
    reach, end = crop.strides[0], crop.size - crop.strides[0]
    inner = flat[reach:end].copy()
    for step in crop.strides:
        inner &= flat[reach - step : end - step]
        inner &= flat[reach + step : end + step]
    surface = flat.copy()
    surface[reach:end] &= ~inner
    return surface.reshape(crop.shape)


def _surface_dice(crops: list[np.ndarray], ruler: _Ruler, asked: _Asked | None) -> float:
    """Share of the area of both surfaces within the tolerance of the other one."""
    codes = [_neighbourhoods(crop) for crop in crops]
    surfaces = [(code != 0) & (code != 255) for code in codes]
    areas = _areas(ruler.spacing)
    all_area = far_area = 0.0
    for code, own, other in zip(codes, surfaces, surfaces[::-1], strict=True):
        points = np.flatnonzero(own if asked is None else own & asked.elements)
        of_points = areas[code.ravel()[points]]
        all_area += of_points.sum()
        far_area += of_points[np.isinf(ruler.nearest(points, other, ruler.tolerance_mm))].sum()
    return float(1 - far_area / all_area) if all_area else math.nan


def _neighbourhoods(crop: np.ndarray) -> np.ndarray:
    """At each voxel the 2 x 2 x 2 mask that begins there, first axis first, as the bits of a uint8, highest first."""
    codes = crop.view(np.uint8).ravel()
    for step, bits in zip(crop.strides[::-1], (1, 2, 4), strict=True):
        codes = codes[:-step] * np.uint8(1 << bits) + codes[step:]
    return np.append(codes, np.zeros(crop.size - codes.size, np.uint8)).reshape(crop.shape)


def _areas(spacing: np.ndarray) -> np.ndarray:
    """Area in mm2 of the surface in each of the 256 neighbourhoods, float64."""
    codes, corners = _triangles()
    a, b, c = np.moveaxis(corners * spacing, 1, 0)
    return np.bincount(codes, np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2, minlength=256)


@cache
def _triangles() -> tuple[np.ndarray, np.ndarray]:
    """The surface of marching cubes in each neighbourhood: its code (T,) and corners in voxels (T, 3, 3) per triangle.

    surface-distance's surface runs as that of Lorensen and Cline (1987), which has one for the neighbourhoods with up
    to four voxels; one with more has the surface of what it leaves out.
    """
    codes, corners = [], []
    for code in range(1, 255):
        inside = np.unpackbits(np.uint8(code)).reshape(2, 2, 2)
        smaller = inside if inside.sum() <= 4 else 1 - inside
        vertices, faces, _, _ = marching_cubes(smaller.astype(np.float32), 0.5, method="lorensen")
        codes += [code] * len(faces)
        corners.append(vertices[faces])
    return np.array(codes), np.concatenate(corners).astype(float)
