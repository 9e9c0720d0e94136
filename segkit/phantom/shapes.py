"""Primitive shapes in the body's own frame: x to the patient's right, y to the front, z to the head, in mm.

Every shape answers one question: how far is a point from its surface, in mm, negative inside. The answers are
close to true distances near the surface, which is where antialiasing needs them. Only + - * / and square roots
touch arrays, because those are rounded the same on every processor: the same seed gives the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

Vector = tuple[float, ...]  # x, y, z
Rotation = tuple[Vector, ...]  # three rows: the shape's own axes as seen from the body
Points = tuple[np.ndarray, ...]  # x, y, z: float32 arrays of one shape

UPRIGHT: Rotation = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


class Shape(Protocol):
    """A solid with a distance."""

    @property
    def bounds(self) -> tuple[Vector, Vector]:
        """The box that holds it: lowest and highest corner, mm."""

    def distance(self, points: Points) -> np.ndarray:
        """How far points are from its surface, mm, negative inside: float32 of the points' shape."""


class Solid(Shape, Protocol):
    """A shape that can be put elsewhere, resized and mirrored: what structures are made of."""

    def moved(self, pivot: Vector, offset: Vector, scale: float) -> Solid:
        """The same scaled about the pivot, then shifted by the offset, in mm."""

    def mirrored(self) -> Solid:
        """The same on the other side of the body."""


def _shift(point: Vector, pivot: Vector, offset: Vector, scale: float) -> Vector:
    """Scale a point about the pivot, then add the offset."""
    return tuple(c + o + scale * (p - c) for p, c, o in zip(point, pivot, offset, strict=True))


def _flip(point: Vector) -> Vector:
    return (-point[0], point[1], point[2])


def _local(points: Points, centre: Vector, rotation: Rotation) -> Points:
    """Coordinates along the shape's own axes, from its centre."""
    x, y, z = (p - c for p, c in zip(points, centre, strict=True))
    if rotation is UPRIGHT:
        return x, y, z
    return tuple(x * a + y * b + z * c for a, b, c in rotation)


def _reach(half: Vector, rotation: Rotation) -> Vector:
    """Half the size of the upright box around a rotated box with these half sizes."""
    return tuple(sum(abs(row[axis]) * size for row, size in zip(rotation, half, strict=True)) for axis in range(3))


@dataclass(frozen=True)
class _Centred(Solid):
    """What shapes with a centre, half sizes along their own axes and a rotation have in common."""

    centre: Vector
    half: Vector
    rotation: Rotation = UPRIGHT

    @property
    def bounds(self) -> tuple[Vector, Vector]:
        reach = _reach(self.half, self.rotation)
        return (
            tuple(c - r for c, r in zip(self.centre, reach, strict=True)),
            tuple(c + r for c, r in zip(self.centre, reach, strict=True)),
        )

    def moved(self, pivot: Vector, offset: Vector, scale: float) -> _Centred:
        centre = _shift(self.centre, pivot, offset, scale)
        return replace(self, centre=centre, half=tuple(scale * size for size in self.half))

    def mirrored(self) -> _Centred:
        rotation = self.rotation if self.rotation is UPRIGHT else tuple(_flip(row) for row in self.rotation)
        return replace(self, centre=_flip(self.centre), rotation=rotation)


class Ellipsoid(_Centred):
    """An ellipsoid with the semi-axes `half`."""

    def distance(self, points: Points) -> np.ndarray:
        x, y, z = (p / r for p, r in zip(_local(points, self.centre, self.rotation), self.half, strict=True))
        level = np.sqrt(x * x + y * y + z * z)
        x, y, z = (p / r for p, r in zip((x, y, z), self.half, strict=True))
        slope = np.sqrt(x * x + y * y + z * z)
        return level * (level - 1) / np.maximum(slope, 1e-6)


class Cylinder(_Centred):
    """An elliptic cylinder along its third axis, like the body of a vertebra."""

    def distance(self, points: Points) -> np.ndarray:
        x, y, z = _local(points, self.centre, self.rotation)
        wide, deep, high = self.half
        level = np.sqrt((x / wide) ** 2 + (y / deep) ** 2)
        slope = np.sqrt((x / wide**2) ** 2 + (y / deep**2) ** 2)
        return np.maximum(level * (level - 1) / np.maximum(slope, 1e-6), np.abs(z) - high)


class Slab(_Centred):
    """A box, like the breastbone or a spinous process."""

    def distance(self, points: Points) -> np.ndarray:
        x, y, z = (np.abs(p) - s for p, s in zip(_local(points, self.centre, self.rotation), self.half, strict=True))
        return np.maximum(np.maximum(x, y), z)


@dataclass(frozen=True)
class Capsule(Solid):
    """A bar with round ends from `start` to `end`, its radius changing along the way."""

    start: Vector
    end: Vector
    radii: tuple[float, float]

    @property
    def bounds(self) -> tuple[Vector, Vector]:
        (r0, r1), pairs = self.radii, tuple(zip(self.start, self.end, strict=True))
        return tuple(min(a - r0, b - r1) for a, b in pairs), tuple(max(a + r0, b + r1) for a, b in pairs)

    def distance(self, points: Points) -> np.ndarray:
        along = tuple(b - a for a, b in zip(self.start, self.end, strict=True))
        x, y, z = (p - a for p, a in zip(points, self.start, strict=True))
        length = max(along[0] ** 2 + along[1] ** 2 + along[2] ** 2, 1e-6)
        share = np.clip((x * along[0] + y * along[1] + z * along[2]) / length, 0, 1)
        x, y, z = (p - share * a for p, a in zip((x, y, z), along, strict=True))
        return np.sqrt(x * x + y * y + z * z) - (self.radii[0] + share * (self.radii[1] - self.radii[0]))

    def moved(self, pivot: Vector, offset: Vector, scale: float) -> Capsule:
        start, end = (_shift(point, pivot, offset, scale) for point in (self.start, self.end))
        return Capsule(start, end, (scale * self.radii[0], scale * self.radii[1]))

    def mirrored(self) -> Capsule:
        return Capsule(_flip(self.start), _flip(self.end), self.radii)


@dataclass(frozen=True)
class Loft(Shape):
    """A stack of ellipses along z: rows of (z, centre y, half width, half depth) in ascending z, centre x 0.

    `grow` moves the surface outwards by that many mm (negative: inwards).
    """

    rows: tuple[tuple[float, float, float, float], ...]
    grow: float = 0.0

    @property
    def bounds(self) -> tuple[Vector, Vector]:
        z, y, wide, deep = np.array(self.rows).T
        low = (-wide.max() - self.grow, (y - deep).min() - self.grow, z[0])
        high = (wide.max() + self.grow, (y + deep).max() + self.grow, z[-1])
        return tuple(map(float, low)), tuple(map(float, high))

    def at(self, z: float) -> Vector:
        """Centre y, half width and half depth at a height, in mm."""
        table = np.array(self.rows).T
        y, wide, deep = (float(np.interp(z, table[0], column)) for column in table[1:])
        return y, wide + self.grow, deep + self.grow

    def distance(self, points: Points) -> np.ndarray:
        x, y, z = points
        heights, *columns = np.array(self.rows).T
        # One table row a millimetre, looked up: far cheaper than interpolating for every voxel.
        steps = np.arange(heights[0], heights[-1] + 1)
        row = np.clip(z - float(heights[0]), 0, len(steps) - 1).astype(np.int16)
        middle, wide, deep = (np.interp(steps, heights, column).astype(np.float32)[row] for column in columns)
        y = y - middle
        level = np.sqrt((x / wide) ** 2 + (y / deep) ** 2)
        radial = np.sqrt(x * x + y * y) * (1 - 1 / np.maximum(level, 1e-3)) - self.grow
        return np.maximum(radial, np.maximum(float(heights[0]) - z, z - float(heights[-1])))


@dataclass(frozen=True)
class HalfSpace(Shape):
    """Everything on the side of a plane away from its unit normal."""

    point: Vector
    normal: Vector

    @property
    def bounds(self) -> tuple[Vector, Vector]:
        return (-np.inf,) * 3, (np.inf,) * 3

    def distance(self, points: Points) -> np.ndarray:
        x, y, z = ((p - c) * n for p, c, n in zip(points, self.point, self.normal, strict=True))
        return x + y + z


@dataclass(frozen=True)
class AnyOf(Shape):
    """The union of shapes."""

    shapes: tuple[Shape, ...]

    @property
    def bounds(self) -> tuple[Vector, Vector]:
        return around(self.shapes)

    def distance(self, points: Points) -> np.ndarray:
        return np.minimum.reduce([shape.distance(points) for shape in self.shapes])


def around(shapes: Sequence[Shape]) -> tuple[Vector, Vector]:
    """The box that holds all the shapes."""
    lows, highs = zip(*(shape.bounds for shape in shapes), strict=True)
    return tuple(min(column) for column in zip(*lows, strict=True)), tuple(
        max(column) for column in zip(*highs, strict=True)
    )


def chain(points: Sequence[Vector], radii: float | Sequence[float]) -> list[Capsule]:
    """Capsules from each point to the next; one radius for all points or one a point, in mm."""
    each = [float(radii)] * len(points) if isinstance(radii, int | float) else [float(radius) for radius in radii]
    joints = zip(points, points[1:], each, each[1:], strict=False)
    return [Capsule(tuple(start), tuple(end), (r0, r1)) for start, end, r0, r1 in joints]


def tube(points: Sequence[Vector], radii: float | Sequence[float], pieces: int = 3) -> list[Capsule]:
    """Capsules along a smooth curve (Catmull-Rom) through the points, `pieces` between each two of them."""
    path = np.array(points, dtype=np.float64)
    each = np.broadcast_to(np.asarray(radii, dtype=np.float64), len(path))
    rows = np.column_stack([path, each])
    padded = np.vstack([2 * rows[0] - rows[1], rows, 2 * rows[-1] - rows[-2]])
    smooth = [rows[0]]
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        smooth += [
            0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * (t * t) + (3 * b - a - 3 * c + d) * (t * t * t))
            for t in np.arange(1, pieces + 1) / pieces
        ]
    listed = np.array(smooth).tolist()
    return chain([tuple(row[:3]) for row in listed], [row[3] for row in listed])


def tilted(angle_x: float = 0.0, angle_y: float = 0.0, angle_z: float = 0.0) -> Rotation:
    """Own axes after turning about x, then y, then z by angles in degrees (right-handed)."""
    a, b, c = np.deg2rad((angle_x, angle_y, angle_z))
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    # The columns of the turn are the turned axes; rounding hides the last bits of sine and cosine.
    return tuple(map(tuple, np.round((about_z @ about_y @ about_x).T, 9).tolist()))
