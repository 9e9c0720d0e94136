"""The named muscles, and the unnamed ones that fill limbs, back and neck, in the body's frame (mm)."""

from __future__ import annotations

from .parts import Material, Part, both_sides
from .shapes import AnyOf, Capsule, Ellipsoid, Loft, Solid, chain, tube
from .skeleton import Pose, elbow_of
from .spine import SPINE

# The skin of trunk, neck and head.
TRUNK = Loft(
    (
        (-240, -6, 60, 90),
        (-205, -4, 168, 106),
        (-150, 0, 186, 114),
        (-100, 4, 188, 118),
        (-40, 10, 178, 122),
        (20, 13, 168, 123),
        (60, 13, 166, 123),
        (120, 10, 170, 124),
        (200, 2, 172, 126),
        (260, -3, 172, 124),
        (320, -8, 170, 114),
        (360, -14, 168, 98),
        (395, -16, 150, 84),
        (418, -16, 108, 68),
        (438, -10, 74, 62),
        (462, -4, 66, 64),
        (482, 6, 68, 80),
        (500, 10, 72, 92),
        (540, 8, 76, 98),
        (600, 7, 84, 101),
        (640, 6, 82, 97),
        (665, 5, 68, 82),
        (682, 4, 48, 58),
        (692, 4, 22, 28),
        (696, 4, 6, 8),
    )
)

MUSCLE = Material(52, sd=10)
FLESH = Material(48, sd=16)
FAT = Material(-100, sd=9)
LEAN = Material(50, sd=14)


def hip_muscles() -> list[Part]:
    """Gluteus maximus, medius, minimus and iliopsoas of both sides."""
    maximus = Ellipsoid((96, -66, -126), (82, 84, 16), ((0.94, 0.34, -0.08), (0.09, 0.0, 1.0), (0.34, -0.94, -0.03)))
    medius = Ellipsoid((124, -14, -70), (78, 44, 18), ((-0.42, -0.4, 0.82), (0.41, 0.72, 0.56), (0.81, -0.57, 0.14)))
    minimus = Ellipsoid((117, 4, -92), (52, 39, 11), ((0.15, 0.57, 0.81), (0.33, 0.74, -0.59), (0.93, -0.36, 0.08)))
    psoas = tube(
        [
            (34, -18, 138), (40, -10, 90), (50, 2, 40), (62, 16, -10), (78, 34, -70), (94, 36, -120), (108, 8, -170),
            (118, -14, -200),
        ],
        (9, 15, 21, 23, 20, 19, 15, 9),
    )  # fmt: skip
    psoas += tube([(92, -14, -26), (94, 6, -58), (90, 28, -92)], (13, 17, 15))
    under_skin = (AnyOf((Loft(TRUNK.rows, grow=-7), *(thigh(side) for side in (1, -1)))),)
    return [
        *both_sides("iliopsoas_{side}", psoas, MUSCLE),
        *both_sides("gluteus_minimus_{side}", [minimus], MUSCLE),
        *both_sides("gluteus_medius_{side}", [medius], MUSCLE, within=under_skin),
        *both_sides("gluteus_maximus_{side}", [maximus], MUSCLE, within=under_skin),
    ]


def back_muscles() -> list[Part]:
    """The autochthonous muscles: two columns beside the spinous processes, from the sacrum to the neck."""
    path = [
        (18, -90, -78), (28, -80, -25), (37, -69, 50), (36, -70, 117), (31, -84, 178), (27, -99, 256), (25, -94, 325),
        (24, -74, 385), (22, -56, 440), (20, -48, 500), (20, -44, 530),
    ]  # fmt: skip
    column = tube(path, (11, 21, 30, 29, 23, 17, 16, 17, 17, 15, 11))
    return both_sides("autochthon_{side}", column, MUSCLE, within=(Loft(TRUNK.rows, grow=-9),))


def thigh(side: int) -> Capsule:
    """The skin of a thigh: 1 right, -1 left."""
    return Capsule((side * 94, -6, -185), (side * 88, 2, -430), (92, 76))


def limbs(pose: Pose) -> list[tuple[Capsule, Capsule]]:
    """Skin and flesh of upper arm, forearm, shoulder and thigh of the right side, as pairs (skin, flesh)."""
    elbow = elbow_of(pose)
    x, y, z = elbow
    joint = (168 + pose.shoulder[0], -22 + pose.shoulder[1], 376 + pose.shoulder[2])
    wrist = (x - 60, y + 20, z + 170) if pose.arms_up else (x + 4, y + 46, z - 200)
    slope = (60.0, -40.0, 388.0)  # from the neck to the shoulder
    bones = [(joint, elbow, 50, 44), (elbow, wrist, 44, 32), (slope, joint, 38, 48)]
    skins = [*(Capsule(a, b, (r0, r1)) for a, b, r0, r1 in bones), thigh(1)]
    return [(outer, Capsule(outer.start, outer.end, (outer.radii[0] - 9, outer.radii[1] - 9))) for outer in skins]


def flesh(pose: Pose) -> list[Part]:
    """Unnamed muscle: limbs, shoulders, chest, neck; the forearm's bones."""
    limb = [inner for _, inner in limbs(pose)]
    parts = [part for one in limb for part in both_sides(None, [one], FLESH)]
    chest: list[Solid] = [*chain([(40, 84, 320), (110, 62, 345), (165, 0, 378)], (13, 15, 17))]
    back: list[Solid] = [*chain([(30, -80, 400), (110, -60, 400), (165, -30, 385)], (13, 18, 24))]
    back += chain([(110, -92, 350), (120, -95, 290), (130, -70, 230)], (16, 15, 12))
    neck: list[Solid] = [*chain([(52, 22, 400), (50, 0, 470), (52, -18, 540)], (11, 12, 11))]
    under_skin = (Loft(TRUNK.rows, grow=-8),)
    parts += [part for solids in (chest, back, neck) for part in both_sides(None, solids, LEAN, within=under_skin)]
    forearm = limb[1]
    return [*parts, *both_sides(None, [Capsule(forearm.start, forearm.end, (10, 9))], Material(300, sd=40, cortex=700))]


def fat_between(pose: Pose) -> list[Part]:
    """Fat planes in the thigh and beside the neck vessels, so that flesh is not one even block."""
    planes: list[Solid] = [
        *chain([(60, 40, -200), (66, 46, -430)], (10, 11)),
        *chain([(92, -40, -225), (84, -36, -430)], (11, 9)),
    ]
    neck = chain([(30, 6, 410), (32, 4, 490)], 12)
    level = SPINE["T1"][0]
    axilla = chain([(118, -6, level - 14), (128 + pose.shoulder[0], -10, level - 70)], (15, 20))
    return [part for solids in (planes, neck, axilla) for part in both_sides(None, solids, FAT)]
