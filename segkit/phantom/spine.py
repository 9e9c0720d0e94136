"""The spine from the sacrum to the atlas and the cord inside it, in the body's frame (mm)."""

from __future__ import annotations

import math

import numpy as np

from .parts import Material, Part
from .shapes import Cylinder, Ellipsoid, Slab, Solid, chain, tilted, tube

BONE = Material(105, sd=50, cortex=600, cortex_mm=3.5)
CORD = Material(18, sd=6)

# Level: height z, y of the middle of the vertebral body, its half width, half depth and half height, length of the
# spinous process, reach of the transverse processes (mm).
SPINE = {
    "S1": (-44, -26, 25, 16, 13, 12, 30),
    "L5": (-17, -6, 25, 17.5, 13, 18, 42),
    "L4": (15, 4, 24.5, 17.5, 13.7, 24, 42),
    "L3": (50, 4, 24, 17.5, 14, 26, 42),
    "L2": (84, -3, 23, 17, 13.7, 25, 39),
    "L1": (117, -14, 22.5, 16.5, 13.3, 24, 36),
    "T12": (149, -25, 21, 16, 12.6, 22, 30),
    "T11": (178, -35, 19, 15, 11.5, 22, 28),
    "T10": (205, -43, 18, 15, 11, 24, 30),
    "T9": (231, -50, 17, 14.5, 10.5, 26, 31),
    "T8": (256, -55, 16.5, 14.5, 10.5, 27, 32),
    "T7": (280, -58, 16, 14, 10, 28, 33),
    "T6": (303, -58, 15.5, 13.5, 9.5, 28, 33),
    "T5": (325, -56, 15, 13, 9, 27, 33),
    "T4": (346, -52, 15, 12.5, 8.8, 26, 34),
    "T3": (366, -46, 15, 12, 8.5, 26, 35),
    "T2": (385.5, -39, 16, 11.5, 8.3, 27, 37),
    "T1": (404.5, -31, 17, 11, 8.2, 23, 39),
    "C7": (423, -23, 16, 10.5, 7.8, 20, 34),
    "C6": (440, -15, 15, 10, 7.2, 21, 30),
    "C5": (456, -10, 14.5, 10, 7, 17, 29),
    "C4": (472, -7, 14, 10, 7, 16, 28),
    "C3": (488, -6, 14, 10, 7, 17, 28),
    "C2": (505, -6, 14, 10, 8.5, 20, 28),
    "C1": (525, -8, 18, 9, 7, 8, 38),
}


def spine_at(z: float) -> tuple[float, float]:
    """y of the middle of the vertebral bodies and of the spinal canal at a height, in mm."""
    rows = np.array(list(SPINE.values()))
    body = float(np.interp(z, rows[:, 0], rows[:, 1]))
    return body, body - float(np.interp(z, rows[:, 0], rows[:, 3])) - 9.5


def _lean(z: float) -> float:
    """The angle (degrees about x) by which a vertebra at this height follows the curve of the spine."""
    slope = (spine_at(z + 12)[0] - spine_at(z - 12)[0]) / 24
    return -math.degrees(math.atan(slope))


def _vertebra(level: str) -> list[Solid]:
    z, body, wide, deep, high, spinous, reach = SPINE[level]
    lean = tilted(_lean(z))
    back = body - deep  # the rear wall of the body, where the canal begins
    solids: list[Solid] = [Cylinder((0, body, z), (wide, deep, high), lean)]
    bulk = wide / 17  # the arch is as stout as the body
    drop = 14 if level[0] == "T" else 4
    for side in (-1, 1):
        near = side * max(0.62 * wide, 11)
        solids += chain(
            [(near, back + 3, z), (near, back - 13, z), (0, back - 23, z - drop / 3)],
            (4.8 * bulk, 5.5 * bulk, 5 * bulk),
        )
        solids += chain([(near, back - 11, z), (side * reach, back - 15, z + 2)], (5.5 * bulk, 4.5 * bulk))
        solids += chain([(near, back - 13, z - high), (near, back - 13, z + high)], 5.5 * bulk)
    tail = (0, back - 20 - spinous / 2, z - drop * 0.7)
    return [*solids, Slab(tail, (3.8 * bulk, spinous / 2, max(0.7 * high, 5)), tilted(drop))]


def _atlas() -> list[Solid]:
    """C1: a ring around the canal with two stout sides and no body."""
    z, body, wide, *_, reach = SPINE["C1"]
    turns = np.linspace(0, 2 * math.pi, 13)
    ring = [(round(wide * math.sin(t), 6), round(body - 10 + 19 * math.cos(t), 6), z) for t in turns]
    sides = [chain([(s * wide, body - 6, z), (s * reach, body - 8, z)], (8, 5)) for s in (-1, 1)]
    return [*chain(ring, 5), *sides[0], *sides[1]]


def spine() -> list[Part]:
    """Discs (in no mask), sacrum, vertebrae from S1 to C1 and the spinal cord in its canal."""
    rows = list(SPINE.values())
    discs = chain([(0, row[1], row[0]) for row in rows[:-1]], [0.8 * row[3] for row in rows[:-1]])
    parts = [Part(None, tuple(discs), Material(75, sd=6)), _sacrum()]
    for level in SPINE:
        solids = _atlas() if level == "C1" else _vertebra(level)
        parts.append(Part(f"vertebrae_{level}", tuple(solids), BONE, shares=("sacrum",)))
    heights = [-60, -44, -17, *range(15, 540, 20)]
    canal = [(0, spine_at(z)[1], z) for z in heights]
    return [*parts, Part("spinal_cord", tuple(chain(canal, 7.2)), CORD)]


def _sacrum() -> Part:
    wings = [Ellipsoid((side * 28, -56, -50), (30, 16, 28), tilted(25, 0, 12 * side)) for side in (-1, 1)]
    tail = tube([(0, -52, -60), (0, -72, -85), (0, -80, -110), (0, -72, -128), (0, -62, -138)], (26, 24, 16, 9, 6))
    return Part("sacrum", (*wings, *tail), Material(90, sd=40, cortex=330, cortex_mm=4))
