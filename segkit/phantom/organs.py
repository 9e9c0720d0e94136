"""The organs of the chest, the belly and the pelvis, in the body's frame (mm)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .parts import Material, Part, both_sides
from .shapes import AnyOf, Capsule, Ellipsoid, HalfSpace, Loft, Shape, Solid, Vector, tilted, tube
from .skeleton import CAGE

LUNG = Material(-835, sd=25, vessels=True)
AIR = Material(-960, sd=4)
SOFT = Material(38, sd=8)

# The inside of the belly, filled with fat around the organs.
CAVITY = Loft(
    (
        (-185, -6, 42, 36),
        (-150, -2, 80, 58),
        (-100, 6, 106, 82),
        (-50, 24, 126, 92),
        (0, 37, 134, 82),
        (50, 36, 137, 79),
        (110, 30, 139, 82),
        (170, 16, 137, 88),
        (240, 4, 120, 80),
    )
)
DOMES = AnyOf((Ellipsoid((66, 10, 105), (96, 100, 108)), Ellipsoid((-66, 10, 100), (94, 96, 98))))
MEDIASTINUM = Loft(
    (
        (60, 10, 40, 94),
        (200, 15, 28, 70),
        (260, 12, 20, 62),
        (330, 8, 24, 52),
        (380, 2, 27, 44),
        (420, 0, 30, 40),
    )
)
INSIDE = AnyOf((CAVITY, Loft(CAGE.rows[1:])))
"""What holds every organ of the trunk."""
FATTY = AnyOf((CAVITY, Loft(CAGE.rows[2:])))
"""Where fat fills the gaps between them; low behind the belly it is muscle that does."""


def _plane(point: Vector, normal: Vector) -> HalfSpace:
    length = sum(c * c for c in normal) ** 0.5
    return HalfSpace(point, tuple(c / length for c in normal))


def lungs() -> list[Part]:
    """Five lobes: the cage without domes and mediastinum, split by the fissures."""
    oblique = (0, 125, 165)  # from the top of the back to the bottom of the front
    above = tuple(-c for c in oblique)
    start = (0, 0, 268)
    level = (0, 0, 290)
    right, left = _plane((0, 0, 0), (-1, 0, 0)), _plane((0, 0, 0), (1, 0, 0))
    lobes = {
        "lung_upper_lobe_left": (left, _plane(start, above)),
        "lung_lower_lobe_left": (left, _plane(start, oblique)),
        "lung_upper_lobe_right": (right, _plane(start, above), _plane(level, (0, 0.1, -1))),
        "lung_middle_lobe_right": (right, _plane(start, above), _plane(level, (0, -0.1, 1))),
        "lung_lower_lobe_right": (right, _plane(start, oblique)),
    }
    whole = {"left": Ellipsoid((-75, 0, 268), (90, 120, 190)), "right": Ellipsoid((75, 0, 268), (90, 120, 190))}
    pleura = Loft(CAGE.rows, grow=-2)
    return [
        Part(name, (whole[name.split("_")[-1]],), LUNG, within=(pleura, *planes), without=(DOMES, MEDIASTINUM))
        for name, planes in lobes.items()
    ]


def upper_belly() -> list[Part]:
    """Stomach, spleen, pancreas, liver, gallbladder, adrenal glands."""
    stomach = tube(
        [(-66, 8, 172), (-68, 34, 148), (-56, 62, 122), (-28, 76, 102), (2, 70, 98), (20, 62, 102)],
        (30, 34, 30, 24, 18, 11),
    )
    pancreas = tube([(26, 44, 82), (12, 52, 98), (-18, 56, 108), (-55, 40, 118), (-88, 14, 126)], (12, 10, 8, 7.5, 7))
    liver = [
        Ellipsoid((78, 18, 140), (58, 78, 72)),
        Ellipsoid((92, 12, 88), (38, 54, 48)),
        Ellipsoid((8, 64, 164), (72, 36, 32), tilted(0, -8, 8)),
        Ellipsoid((52, 50, 160), (60, 46, 42)),
    ]
    spleen = Ellipsoid((-107, -22, 140), (66, 45, 31), ((-0.64, 0.51, -0.57), (0.01, 0.76, 0.66), (0.77, 0.42, -0.49)))
    gallbladder = tube([(52, 40, 108), (62, 66, 92), (68, 80, 80)], (7, 14, 15))
    renal_bed = Ellipsoid((62, -24, 74), (46, 44, 72))
    inside: tuple[Shape, ...] = (INSIDE, AnyOf((DOMES, CAVITY)))
    return [
        Part("stomach", tuple(stomach), Material(35, sd=12, gas=0.55), within=inside),
        Part("spleen", (spleen,), Material(45, sd=6), within=inside, shares=("stomach",)),
        Part("liver", tuple(liver), Material(54, sd=6), within=inside, without=(renal_bed,), shares=("stomach",)),
        Part("gallbladder", tuple(gallbladder), Material(6, sd=4), shares=("liver",)),
        Part("pancreas", tuple(pancreas), Material(36, sd=16), within=inside, shares=("stomach",)),
    ]


def adrenals() -> list[Part]:
    """A lambda of two limbs above each kidney."""
    right: list[Capsule] = tube([(26, -2, 140), (30, 2, 134), (38, -12, 126)], (5.2, 6.2, 5.2))
    right += tube([(30, 2, 138), (27, -8, 130), (24, -16, 122)], (6, 5.2, 4.8))
    left = [part.mirrored().moved((0, 0, 0), (-14, 4, 2), 1.0) for part in right]
    look = Material(22, sd=10)
    return [Part("adrenal_gland_right", tuple(right), look), Part("adrenal_gland_left", tuple(left), look)]


def kidneys(cysts: Sequence[bool], rng: np.random.Generator) -> list[Part]:
    """Kidneys with a fatty hilum, and the cysts (right, left) that this subject has."""
    axes = {
        "right": ((72, -16, 80), (61, 32, 27), ((-0.35, -0.39, 0.85), (-0.59, 0.8, 0.12), (-0.73, -0.46, -0.51))),
        "left": ((-76, -18, 94), (58, 31, 27), ((0.35, -0.35, 0.87), (0.6, 0.79, 0.08), (0.72, -0.5, -0.49))),
    }
    parts = []
    for (side, (centre, half, rotation)), cyst in zip(axes.items(), cysts, strict=True):
        sign = 1 if side == "right" else -1
        name = f"kidney_{side}"
        parts.append(Part(name, (Ellipsoid(centre, half, rotation),), Material(32, sd=6), group=name))
        hilum = (centre[0] - sign * 19, centre[1] + 8, centre[2])
        parts.append(Part(None, (Ellipsoid(hilum, (14, 12, 20), rotation),), Material(-70, sd=25), group=name))
        turn, height, size = rng.uniform(-0.6, 0.9), rng.uniform(-24, 20), rng.uniform(11, 21)
        if cyst:
            place = (centre[0] + sign * (18 + 9 * (turn < 0)), centre[1] - 10 - 12 * turn, centre[2] + height)
            ball = Ellipsoid(tuple(map(float, place)), (float(size),) * 3)
            parts.append(Part(f"kidney_cyst_{side}", (ball,), Material(8, sd=3), shares=(name,), group=name))
    return parts


def bowel(rng: np.random.Generator) -> list[Part]:
    """Small bowel in loops, colon around it down to the rectum, duodenum around the head of the pancreas."""
    loops: list[Vector] = []
    for row, z in enumerate(np.linspace(56, -88, 7)):
        reach = 84 - 3.5 * row
        across = np.linspace(-reach - 16, reach - 22, 5)[:: 1 if row % 2 else -1]
        for column, x in enumerate(across):
            depth = 46 + (34 if (row + column) % 2 else 0) - 3 * row
            wander = rng.normal(0, 5, 3)
            loops.append(tuple(float(v) for v in np.array([x, depth, z]) + wander))
    frame = [
        (72, 36, -52), (92, 30, -25), (103, 18, 15), (106, 12, 50), (98, 44, 72), (62, 84, 52), (10, 96, 34),
        (-45, 88, 52), (-88, 62, 92), (-104, 24, 104), (-110, 2, 70), (-110, 0, 30), (-104, 12, -20), (-84, 28, -58),
        (-52, 44, -72), (-22, 24, -62), (8, 4, -78), (4, -34, -96), (0, -54, -124), (0, -44, -158), (0, -32, -186),
    ]  # fmt: skip
    radii = [26, 27, 26, 24, 23, 22, 21, 21, 21, 21, 19, 18, 17, 17, 16, 16, 17, 18, 20, 17, 11]
    sway = rng.normal(0, 5, (len(frame), 3))
    sway[-4:] *= 0.3
    path = [tuple(float(v) for v in np.array(point) + shift) for point, shift in zip(frame, sway, strict=True)]
    colon = [
        Capsule(piece.start, piece.end, (piece.radii[0] * (1.06 if k % 2 else 0.92), piece.radii[1] * 0.99))
        for k, piece in enumerate(tube(path, radii, 4))  # the haustra: narrow and wide in turn
    ]
    arch = [(24, 62, 102), (44, 52, 96), (52, 42, 76), (46, 34, 52), (22, 36, 42), (-10, 38, 46), (-28, 46, 60)]
    walls = (INSIDE,)
    return [
        Part("small_bowel", tuple(tube(loops, 13.5, 2)), Material(24, sd=14, gas=0.12), within=walls),
        Part("colon", tuple(colon), Material(25, sd=22, gas=0.75), within=walls, shares=("small_bowel",)),
        Part(
            "duodenum", tuple(tube(arch, (11, 12, 12, 12, 11, 11, 10))), Material(28, sd=12, gas=0.3), shares=("colon",)
        ),
    ]


def pelvic_organs(male: bool) -> list[Part]:
    """Bladder, and the prostate below it or the womb (in no mask) behind it."""
    bladder = Part("urinary_bladder", (Ellipsoid((2, 30, -114), (52, 45, 40)),), Material(8, sd=3))
    if male:
        ball = Ellipsoid((0, 4, -162), (22, 17, 18))
        return [bladder, Part("prostate", (ball,), Material(38, sd=6), shares=("urinary_bladder",))]
    return [bladder, Part(None, (Ellipsoid((0, -8, -112), (26, 20, 34)),), Material(55, sd=8))]


def heart() -> list[Part]:
    """Heart, left atrial appendage and pulmonary veins."""
    axis = tilted(0, 38, -35)
    muscle = [Ellipsoid((-22, 36, 252), (62, 46, 50), axis), Ellipsoid((8, 22, 266), (38, 40, 42))]
    veins = []
    for side in (-1, 1):
        veins += tube([(side * 8, -14, 284), (side * 38, -16, 296), (side * 62, -20, 306)], (9, 8, 5))
        veins += tube([(side * 8, -18, 272), (side * 36, -28, 264), (side * 58, -38, 252)], (9, 8, 5))
    ear = tube([(-34, 14, 292), (-52, 28, 298), (-60, 40, 292)], (11, 11, 7))
    trunk = tube([(-14, 48, 290), (-20, 34, 312), (-18, 12, 318)], (14, 14, 12))
    across = tube([(-48, -4, 316), (-18, 12, 318), (18, 4, 312), (44, -4, 308)], (8, 11, 10, 7))
    blood = Material(40, sd=6)
    return [
        Part("heart", tuple(muscle), Material(40, sd=8), group="heart"),
        Part(None, (*trunk, *across), blood, group="heart"),  # pulmonary arteries: in no mask
        Part("pulmonary_vein", tuple(veins), blood, shares=("heart",), group="heart"),
        Part("atrial_appendage_left", tuple(ear), blood, shares=("heart",), group="heart"),
    ]


def airways_and_neck() -> list[Part]:
    """Trachea with the main bronchi, oesophagus with a little air, thyroid gland."""
    pipe = tube([(0, 27, 462), (0, 14, 420), (0, 2, 380), (2, -8, 336)], (9, 8.5, 8.5, 9))
    for side in (-1, 1):
        pipe += tube([(2, -8, 336), (side * 20, -12, 320), (side * 40, -14, 310)], (8, 7, 6))
    gullet = tube(
        [
            (-2, 8, 452),
            (-4, -4, 410),
            (-6, -16, 360),
            (-4, -28, 310),
            (-6, -26, 260),
            (-12, -10, 220),
            (-30, 8, 190),
            (-50, 16, 176),
        ],
        8.5,
    )
    gland: list[Solid] = [Ellipsoid((19, 20, 426), (10, 13, 24)), Ellipsoid((-19, 20, 426), (10, 13, 24))]
    gland += tube([(-14, 31, 418), (0, 35, 418), (14, 31, 418)], 5)
    return [
        Part("esophagus", tuple(gullet), Material(34, sd=8, gas=0.2), shares=("heart",)),
        Part("thyroid_gland", tuple(gland), Material(100, sd=8)),
        Part(None, tuple(Capsule(c.start, c.end, (c.radii[0] + 2, c.radii[1] + 2)) for c in pipe), Material(60)),
        Part("trachea", tuple(pipe), AIR, shares=("thyroid_gland",)),
    ]


def lower_jaw_glands() -> list[Part]:
    """Salivary glands and tongue: soft tissue of the head in no mask."""
    glands = [Ellipsoid((55, -5, 535), (10, 16, 24)), Ellipsoid((36, 30, 490), (10, 16, 12))]
    return [*both_sides(None, glands, SOFT), Part(None, (Ellipsoid((0, 46, 506), (26, 28, 20)),), Material(60))]
