"""The bones around the spine: rib cage, shoulder girdle, pelvis, limbs and skull, in the body's frame (mm)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .parts import Material, Part, both_sides
from .shapes import Capsule, Cylinder, Ellipsoid, Loft, Slab, Solid, Vector, chain, tilted, tube
from .spine import BONE, SPINE

RIB = Material(130, sd=40, cortex=520, cortex_mm=2.5)
LONG_BONE = Material(90, sd=40, cortex=650, cortex_mm=5)
SKULL = Material(420, sd=60, cortex=950, cortex_mm=3)
CARTILAGE = Material(98, sd=14)


# The inside of the rib cage; the ribs lie on it.
CAGE = Loft(
    (
        (60, 10, 142, 94),
        (120, 8, 141, 94),
        (200, 5, 137, 93),
        (260, 2, 130, 89),
        (310, -4, 117, 80),
        (350, -12, 99, 68),
        (380, -18, 78, 54),
        (405, -21, 52, 37),
        (418, -22, 30, 22),
    )
)

# Rib: angle around the cage where it starts and ends (degrees from the back), how far it drops towards the front (mm).
RIBS = {
    1: (26, 150, 45),
    2: (20, 152, 65),
    3: (17, 152, 85),
    4: (15, 150, 100),
    5: (14, 147, 112),
    6: (14, 143, 122),
    7: (14, 138, 132),
    8: (14, 128, 132),
    9: (14, 118, 126),
    10: (14, 106, 118),
    11: (15, 86, 105),
    12: (17, 46, 95),
}


@dataclass(frozen=True)
class Pose:
    """How the shoulders and arms are held."""

    arms_up: bool = False
    shoulder: Vector = (0.0, 0.0, 0.0)  # mm by which the right shoulder lies outwards, forwards, upwards


def _rib_path(number: int, steps: int = 12) -> list[Vector]:
    start, end, drop = RIBS[number]
    head = SPINE[f"T{number}"][0]
    path: list[Vector] = []
    for degrees in np.linspace(start, end, steps):
        angle = math.radians(degrees)
        z = head + 2 - drop * (1 - math.cos(angle - math.radians(start))) / 2
        middle, wide, deep = CAGE.at(z)
        spread = (wide + 6) * math.sin(angle), middle - (deep + 6) * math.cos(angle)
        path.append((round(spread[0], 6), round(spread[1], 6), round(z, 6)))
    return path


def _rib_radius(number: int) -> float:
    return {1: 5.2, 2: 5.2, 11: 4.6, 12: 4.0}.get(number, 5.6)


def rib_cage() -> list[Part]:
    """24 ribs as bars around the cage, the cartilages from their ends to the breastbone, the breastbone."""
    parts = []
    for number in RIBS:
        bar = chain(_rib_path(number), _rib_radius(number))
        parts += both_sides(f"rib_{{side}}_{number}", bar, RIB, shares=("costal_cartilages",))
    bars: list[Solid] = []
    previous: Vector = ()
    for number in range(1, 11):
        x, y, z = _rib_path(number)[-1]
        if number <= 7:
            height = max(z + (6 if number < 3 else 16 if number < 6 else 26), 212)
            target: Vector = (16, _front(height), height)
        else:
            target = previous
        middle = ((x + target[0]) / 2 + 4, (y + target[1]) / 2 + 5, (z + target[2]) / 2 - (8 if number > 3 else 0))
        bars += tube([(x, y, z), middle, target], 5.5, 2)
        previous = middle
    both = [*bars, *(bar.mirrored() for bar in bars)]
    return [Part("costal_cartilages", tuple(both), CARTILAGE), *parts, _sternum()]


def _front(z: float) -> float:
    """y of the breastbone at a height: on the front of the cage."""
    middle, _, deep = CAGE.at(z)
    return middle + deep + 7


def _sternum() -> Part:
    def plate(top: float, bottom: float, wide: float) -> Slab:
        y0, y1 = _front(bottom), _front(top)
        lean = math.degrees(math.atan2(y1 - y0, top - bottom))
        return Slab((0, (y0 + y1) / 2, (top + bottom) / 2), (wide, 6, (top - bottom) / 2 + 4), tilted(-lean))

    plates = [plate(386, 346, 24), plate(346, 290, 15), plate(290, 232, 17)]
    return Part("sternum", (*plates, *chain([(0, _front(232), 232), (0, _front(232), 210)], (9, 5))), RIB)


def shoulders(pose: Pose) -> list[Part]:
    """Shoulder blades, collar bones and the upper part of the humeri, on a shoulder that the pose puts."""
    out, forward, up = pose.shoulder

    def at(x: float, y: float, z: float, share: float = 1.0) -> Vector:
        return (x + share * out, y + share * forward, z + share * up)

    joint = at(172, -22, 378)
    socket = at(150, -28, 376)
    border = [(92, -66, 392), (86, -76, 370), (86, -82, 345), (88, -84, 320), (92, -84, 298), (97, -82, 280)]
    blade: list[Solid] = [Capsule(socket, at(*point, 0.6), (9, 5)) for point in border]
    blade += chain([at(*point, 0.6) for point in border], 5)
    blade += tube([at(90, -80, 372, 0.6), at(124, -60, 388), at(158, -42, 400), at(170, -18, 404)], (4, 6, 7, 6))
    collar = tube([(20, 42, 388), at(55, 42, 393, 0.3), at(105, 12, 400, 0.7), at(156, -14, 402)], (9, 7, 6.5, 7))
    elbow = elbow_of(pose)
    shaft = [Ellipsoid(joint, (24, 24, 24)), *chain([joint, elbow], (14, 12))]
    return [
        *both_sides("scapula_{side}", blade, Material(150, sd=40, cortex=420)),
        *both_sides("clavicula_{side}", collar, Material(200, sd=40, cortex=560)),
        *both_sides("humerus_{side}", shaft, LONG_BONE),
    ]


def elbow_of(pose: Pose) -> Vector:
    """Where the right humerus ends: beside the head with the arms up, beside the chest with the arms down (mm)."""
    x, y, z = (172 + pose.shoulder[0], -22 + pose.shoulder[1], 378 + pose.shoulder[2])
    return (x - 8, y + 40, z + 190) if pose.arms_up else (x + 26, y - 4, z - 190)


CREST = (
    (42, -82, -52),
    (52, -80, -32),
    (68, -70, -15),
    (86, -52, -2),
    (102, -32, 3),
    (115, -10, 3),
    (123, 10, -4),
    (127, 28, -18),
    (124, 42, -36),
    (116, 46, -54),
)
HIP_JOINT: Vector = (92, -4, -146)


def pelvis() -> list[Part]:
    """Hip bones (wing, socket, ischium, pubis) and the upper part of the femora."""
    # The wing fans out from the socket to the crest, in bars close enough to make one plate.
    share = np.linspace(0, len(CREST) - 1, 37)
    crest = np.column_stack([np.interp(share, range(len(CREST)), column) for column in zip(*CREST, strict=True)])
    root = np.column_stack(
        [
            np.interp(share, (0, 3, 6, 9), column)
            for column in ((62, 66, 88, 96), (-52, -46, -18, 6), (-88, -94, -106, -108))
        ]
    )
    wing: list[Solid] = [
        Capsule(tuple(low), tuple(high), (8, 6)) for low, high in zip(root.tolist(), crest.tolist(), strict=True)
    ]
    wing += chain(CREST, 6.5)
    x, y, z = HIP_JOINT
    wing += [Ellipsoid((x - 2, y, z + 4), (34, 34, 34)), *chain([(62, -52, -88), (x - 10, y - 4, z + 26)], (12, 20))]
    wing += tube(
        [(78, -24, -160), (66, -44, -190), (58, -44, -212), (42, -18, -205), (14, 28, -180)], (16, 16, 15, 8, 8)
    )
    wing += tube([(78, 12, -148), (45, 38, -150), (12, 42, -160), (8, 34, -178)], (14, 9, 10, 8))
    femur = [Ellipsoid(HIP_JOINT, (25, 25, 25)), *chain([HIP_JOINT, (128, -16, -172), (138, -20, -190)], (16, 16, 19))]
    femur += chain([(142, -24, -162), (138, -20, -190), (126, -6, -250), (112, 0, -420)], (15, 19, 16, 15))
    socket = Ellipsoid(HIP_JOINT, (28, 28, 28))
    return [
        *both_sides("hip_{side}", wing, BONE, without=(socket, socket.mirrored())),
        *both_sides("femur_{side}", femur, LONG_BONE),
    ]


BRAIN = Ellipsoid((0, 6, 618), (66, 82, 60))


def head() -> list[Part]:
    """The skull as a shell with base, face and lower jaw, air in the sinuses (no mask), the brain inside."""
    vault = Ellipsoid((0, 6, 617), (74, 90, 68))
    face: list[Solid] = [vault]
    for side in (-1, 1):
        face += tube([(side * 52, 12, 556), (side * 48, 22, 512), (side * 30, 58, 492), (0, 74, 486)], (8, 8, 8, 9))
        face += tube(
            [(side * 62, 10, 562), (side * 60, 48, 565), (side * 40, 74, 556), (side * 12, 84, 536)], (7, 7, 10, 9)
        )
        face += chain([(side * 40, 80, 590), (side * 12, 84, 575), (side * 10, 80, 530)], (7, 8, 8))
        face += chain([(side * 45, -25, 566), (side * 30, 0, 556)], (17, 12))
    face += [Slab((0, 62, 528), (26, 22, 5)), *chain([(0, -10, 552), (0, 30, 556)], (13, 12))]
    neck = Cylinder((0, -28, 550), (14, 17, 20))
    sinus = [Ellipsoid((24, 62, 550), (13, 15, 15)), Ellipsoid((9, 50, 566), (6, 16, 10))]
    eye = [Ellipsoid((33, 74, 574), (13, 13, 13))]
    throat = tube([(0, 52, 548), (0, 32, 528), (0, 26, 490), (0, 27, 462)], (13, 9, 8, 8))
    cerebellum = Ellipsoid((0, -36, 574), (46, 36, 28))
    inner = Ellipsoid((0, 6, 618), (67, 83, 61))
    return [
        Part("skull", tuple(face), SKULL, without=(inner, neck)),
        *both_sides(None, sinus, Material(-930, sd=3)),
        *both_sides(None, eye, Material(12, sd=3)),
        Part(None, tuple(throat), Material(-950, sd=3)),
        Part("brain", (BRAIN, cerebellum, *chain([(0, -12, 580), (0, -26, 548)], (16, 9))), Material(34, sd=4)),
    ]
