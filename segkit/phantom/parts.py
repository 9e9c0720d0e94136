"""A part of the body: shapes, what they are made of and the structure that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from .shapes import Shape, Solid, Vector, around

SIDES = ("right", "left")


@dataclass(frozen=True)
class Material:
    """What a part looks like in the CT, in HU."""

    hu: float  # mean inside
    sd: float = 8.0  # slow texture inside
    cortex: float | None = None  # HU of a denser rim, as bone has
    cortex_mm: float = 3.0  # thickness of that rim
    gas: float = 0.0  # 0 no gas, 1 gas in about half of the inside
    vessels: bool = False  # bright thread-like vessels through it, as in the lung


@dataclass(frozen=True)
class Part:
    """The union of `solids`, cut to every shape of `within` and none of `without`, painted over all parts before it.

    `name` is the structure whose mask it joins, None for what no mask holds. Structures in `shares` keep the outermost
    millimetres that this part paints over: their masks overlap, as in the real data.
    """

    name: str | None
    solids: tuple[Shape, ...]  # of a part that is moved: Solid
    material: Material
    within: tuple[Shape, ...] = ()
    without: tuple[Shape, ...] = ()
    shares: tuple[str, ...] = ()
    group: str = ""  # parts of one group are shifted and scaled together

    def moved(self, pivot: Vector, offset: Vector, scale: float) -> Part:
        """The same part with its solids scaled about the pivot and shifted, in mm; what cuts it stays."""
        solids = cast(tuple[Solid, ...], self.solids)
        return replace(self, solids=tuple(solid.moved(pivot, offset, scale) for solid in solids))

    @property
    def bounds(self) -> tuple[Vector, Vector]:
        """The box about its solids: lowest and highest corner, mm."""
        return around(self.solids)


def both_sides(name: str | None, solids: Sequence[Solid], material: Material, **cuts: Any) -> list[Part]:
    """The right part and its mirror image; "{side}" in the name becomes right and left."""
    mirrored = [solid.mirrored() for solid in solids]
    return [
        Part(name and name.format(side=side), tuple(own), material, **cuts)
        for side, own in zip(SIDES, (solids, mirrored), strict=True)
    ]
