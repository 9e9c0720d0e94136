"""The whole body: every part in the order in which it is painted, later parts over earlier ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import muscles, organs, skeleton, spine, vessels
from .muscles import TRUNK
from .parts import Material, Part
from .shapes import AnyOf, Ellipsoid, Loft, Shape
from .skeleton import Pose


@dataclass(frozen=True)
class Build:
    """What anatomy a subject has; how it is bent, sized and seen is the subject's affair."""

    male: bool = True
    cysts: tuple[bool, bool] = (False, False)  # right, left
    fat_mm: float = 15.0  # thickness of the fat under the skin
    pose: Pose = field(default_factory=Pose)


def skin(build: Build) -> list[Shape]:
    """The outline of the body: trunk, head, arms and thighs."""
    limbs = [outer for outer, _ in muscles.limbs(build.pose)]
    grown = Loft(TRUNK.rows[:15], grow=build.fat_mm - 15)
    bumps = limbs if build.male else [*limbs, Ellipsoid((72, 110, 270), (50, 30, 50))]
    return [Loft(TRUNK.rows[13:]), grown, *bumps, *(bump.mirrored() for bump in bumps)]


def _envelope() -> list[Part]:
    """Muscle wall under the fat, and the fat that fills chest and belly around the organs."""
    wall = Loft(TRUNK.rows[:15], grow=-15)
    neck = Loft(TRUNK.rows[13:], grow=-7)
    everywhere = Ellipsoid((0, 0, 200), (400, 300, 800))
    return [
        Part(None, (everywhere,), muscles.LEAN, within=(AnyOf((wall, neck)),)),
        Part(None, (everywhere,), muscles.FAT, within=(organs.FATTY,)),
    ]


def parts_of(build: Build, rng: np.random.Generator) -> list[Part]:
    """Every part of a body in painting order; `rng` places bowel loops and cysts. Distances in mm, HU in HU."""
    body = Part(None, tuple(skin(build)), Material(-102, sd=8, cortex=5))
    return [
        body,
        *_envelope(),
        *muscles.flesh(build.pose),
        *muscles.fat_between(build.pose),
        *muscles.back_muscles(),
        *muscles.hip_muscles(),
        *organs.lungs(),
        *organs.bowel(rng),
        *organs.upper_belly(),
        *organs.kidneys(build.cysts, rng),
        *organs.adrenals(),
        *organs.pelvic_organs(build.male),
        *skeleton.shoulders(build.pose),
        *skeleton.rib_cage(),
        *skeleton.pelvis(),
        *spine.spine(),
        *organs.lower_jaw_glands(),
        *skeleton.head(),
        *organs.heart(),
        *vessels.vessels(),
        *organs.airways_and_neck(),
    ]
