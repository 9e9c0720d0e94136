"""From parts to voxels: a warped grid that finds each part's voxels, and the painter that fills HU and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .parts import Material, Part
from .shapes import Points, Vector

BLOCK = (4, 8, 8)  # voxels of a search block along z, y, x
OVERLAP_MM = 2.5  # how deep a structure that shares its rim reaches into the part painted over it
FAR = np.float32(1e3)

Box = tuple[slice, ...]  # z, y, x


def smooth_field(control: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Cubic B-spline through a grid of control values: float32 of the given size, 4 controls or more an axis."""
    values = control.astype(np.float32)
    for axis in (2, 1, 0):
        values = np.moveaxis(_spline_axis(np.moveaxis(values, axis, 0), size[axis]), 0, axis)
    return np.ascontiguousarray(values)


def _spline_axis(control: np.ndarray, size: int) -> np.ndarray:
    """Spread the first axis to `size` samples."""
    where = np.arange(size) * ((len(control) - 3) / size)
    base = where.astype(np.intp)
    t = where - base
    square, cube, rest = t * t, t * t * t, 1 - t  # products, not powers: they round the same everywhere
    weights = (rest * rest * rest, 3 * cube - 6 * square + 4, -3 * cube + 3 * square + 3 * t + 1, cube)
    total = np.zeros((size, *control.shape[1:]), np.float32)
    for step, weight in enumerate(weights):
        total += control[base + step] * (weight / 6).astype(np.float32)[:, None, None]
    return total


@dataclass
class Grid:
    """For each voxel (axes z, y, x) the point of the body's frame that it shows, in mm, float32."""

    points: Points
    spacing: Vector  # mm along x, y, z
    low: np.ndarray = field(init=False)  # (3, blocks z, y, x): the smallest coordinate in each block
    high: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.low = np.stack([_blocks(p, np.minimum) for p in self.points])
        self.high = np.stack([_blocks(p, np.maximum) for p in self.points])

    def box(self, bounds: tuple[Vector, Vector], margin: float) -> Box | None:
        """The voxels that may lie within the bounds widened by a margin in mm; None if there are none."""
        low, high = bounds
        hit = np.ones(self.low.shape[1:], bool)
        for axis in range(3):
            hit &= (self.low[axis] <= high[axis] + margin) & (self.high[axis] >= low[axis] - margin)
        if not hit.any():
            return None
        box = []
        for axis, step in enumerate(BLOCK):
            found = np.flatnonzero(hit.any(axis=tuple(other for other in range(3) if other != axis)))
            box.append(slice(int(found[0]) * step, min((int(found[-1]) + 1) * step, self.points[0].shape[axis])))
        return tuple(box)

    def within(self, box: Box) -> Points:
        """The points of a box of voxels."""
        return tuple(p[box] for p in self.points)


def _blocks(values: np.ndarray, reduce: np.ufunc) -> np.ndarray:
    for axis, step in enumerate(BLOCK):
        values = reduce.reduceat(values, np.arange(0, values.shape[axis], step), axis=axis)
    return values


@dataclass
class Canvas:
    """The CT and the masks of one subject while they are painted; every array has the axes z, y, x."""

    grid: Grid
    textures: tuple[np.ndarray, ...]  # two independent smooth fields, float32, sd about 1
    codes: Mapping[str, int]  # structure -> its value in `owner`, from 1
    brightening: Mapping[str | None, float] = field(default_factory=dict)  # HU that contrast agent adds to a structure
    overlaps: bool = True
    hu: np.ndarray = field(init=False)  # float32
    owner: np.ndarray = field(init=False)  # uint8: which structure each voxel shows, 0 none
    shared: dict[str, list[np.ndarray]] = field(init=False)  # flat indices that a structure keeps under another

    def __post_init__(self) -> None:
        shape = self.grid.points[0].shape
        self.hu = np.full(shape, -1000, np.float32)
        self.owner = np.zeros(shape, np.uint8)
        self.shared = {}

    def paint(self, parts: Sequence[Part]) -> None:
        """Paint the parts one over the other."""
        for part in parts:
            self._paint(part)

    def _paint(self, part: Part) -> None:
        edge = max(self.grid.spacing) / 2  # half the width of the antialiased rim
        box = self.grid.box(part.bounds, edge)
        if box is None:
            return
        distance = self._distance(part, box, edge)
        flat = np.flatnonzero(distance < edge)
        depth = distance.reshape(-1)[flat]
        where = _flat_in_whole(flat, box, self.hu.shape)
        look = self._look(part.material, depth, where) + np.float32(self.brightening.get(part.name, 0))
        hu, owner = self.hu.reshape(-1), self.owner.reshape(-1)
        cover = np.clip(
            0.65 - depth / (2 * edge), 0, 1
        )  # a little more than half at the surface: masks hold little rim
        hu[where] += cover * (look - hu[where])
        inside = depth < 0
        where, depth = where[inside], depth[inside]
        if self.overlaps and part.shares:
            self._share(part, owner[where], where, depth)
        owner[where] = 0 if part.name is None else self.codes.get(part.name, 0)

    def _distance(self, part: Part, box: Box, edge: float) -> np.ndarray:
        distance = np.full(tuple(side.stop - side.start for side in box), FAR)
        for solid in part.solids:
            inner = self.grid.box(solid.bounds, edge)
            if inner is None:
                continue
            local = tuple(slice(i.start - b.start, i.stop - b.start) for i, b in zip(inner, box, strict=True))
            np.minimum(distance[local], solid.distance(self.grid.within(inner)), out=distance[local])
        if part.within or part.without:
            points = self.grid.within(box)
            for shape in part.within:
                np.maximum(distance, shape.distance(points), out=distance)
            for shape in part.without:
                np.maximum(distance, -shape.distance(points), out=distance)
        return distance

    def _look(self, material: Material, depth: np.ndarray, where: np.ndarray) -> np.ndarray:
        """HU of a material at voxels, by their depth (mm, negative inside) and the textures there."""
        coarse, other = (texture.reshape(-1)[where] for texture in self.textures)
        look = np.float32(material.hu) + np.float32(material.sd) * other
        if material.cortex is not None:
            rim = np.clip(1 + depth / np.float32(material.cortex_mm), 0, 1)
            look += rim * np.float32(material.cortex - material.hu)
        if material.gas:
            # A bubble wherever the texture is high enough and the wall is a few mm away.
            bubble = np.clip((coarse - np.float32(1.2 - 1.6 * material.gas)) * 4, 0, 1)
            look += bubble * np.clip(-(depth + 3) / 3, 0, 1) * (-870 - look)
        if material.vessels:
            # Both textures are near zero along thin curves: they look like vessels.
            near = np.clip(1 - (coarse * coarse + other * other) * 9, 0, 1)
            look += near * 620
        return look

    def _share(self, part: Part, below: np.ndarray, where: np.ndarray, depth: np.ndarray) -> None:
        rim = depth > -OVERLAP_MM
        for name in part.shares:
            kept = where[rim & (below == self.codes[name])]
            if len(kept):
                self.shared.setdefault(name, []).append(kept)


def _flat_in_whole(flat: np.ndarray, box: Box, shape: tuple[int, ...]) -> np.ndarray:
    """Flat indices into a box as flat indices into the whole array."""
    _, height, width = (side.stop - side.start for side in box)
    rows, x = np.divmod(flat, width)
    z, y = np.divmod(rows, height)
    return ((z + box[0].start) * shape[1] + y + box[1].start) * shape[2] + x + box[2].start
