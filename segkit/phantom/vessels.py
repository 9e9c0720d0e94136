"""Arteries and veins as tubes, in the body's frame (mm)."""

from __future__ import annotations

from collections.abc import Sequence

from .parts import Material, Part
from .shapes import Capsule, Vector, tube

BLOOD = Material(42, sd=5)


def _mirror(points: Sequence[Vector]) -> list[Vector]:
    return [(-x, y, z) for x, y, z in points]


def vessels() -> list[Part]:
    """Every named artery and vein outside the heart, veins first: arteries lie in front of them."""
    paths = {**_veins(), **_arteries()}
    shares = {
        "iliac_artery_right": ("aorta",),
        "iliac_artery_left": ("aorta",),
        "iliac_vena_right": ("inferior_vena_cava",),
        "iliac_vena_left": ("inferior_vena_cava",),
        "aorta": ("heart",),
        "superior_vena_cava": ("heart",),
        "inferior_vena_cava": ("heart", "liver"),
        "portal_vein_and_splenic_vein": ("pancreas", "liver"),
    }
    return [Part(name, tuple(solids), BLOOD, shares=shares.get(name, ())) for name, solids in paths.items()]


def _veins() -> dict[str, list[Capsule]]:
    iliac = [(16, 16, 10), (34, 6, -28), (46, 4, -66), (58, 28, -120), (66, 46, -156)]
    portal = tube(
        [(52, 40, 146), (30, 42, 126), (12, 44, 112), (-20, 44, 114), (-56, 28, 122), (-90, 2, 130)],
        (7, 7.5, 7, 6, 5.5, 5),
    )
    portal += tube([(8, 46, 112), (10, 52, 88), (8, 56, 62)], (6, 6, 5))
    cava = tube(
        [(17, 16, 8), (22, 24, 45), (23, 24, 90), (26, 20, 140), (24, 18, 190), (20, 22, 226)], (10, 11, 11, 11, 12, 12)
    )
    return {
        "inferior_vena_cava": cava,
        "iliac_vena_left": tube([(14, 15, 14), *_mirror(iliac)[1:]], (8, 7.5, 7, 7, 7)),
        "iliac_vena_right": tube(iliac, (8, 7.5, 7, 7, 7)),
        "portal_vein_and_splenic_vein": portal,
        "superior_vena_cava": tube([(24, 22, 350), (25, 22, 320), (22, 22, 290)], (10, 10, 11)),
        "brachiocephalic_vein_right": tube([(44, 20, 402), (36, 24, 380), (26, 23, 350)], (7, 8, 9)),
        "brachiocephalic_vein_left": tube([(-42, 22, 400), (-28, 32, 380), (0, 34, 364), (24, 24, 350)], (7, 8, 8, 8)),
    }


def _arteries() -> dict[str, list[Capsule]]:
    root = [(-6, 30, 282), (6, 34, 308), (8, 28, 340), (-2, 10, 356), (-14, -12, 352), (-22, -30, 334)]
    down = [(-22, -38, 300), (-21, -36, 260), (-19, -26, 215), (-15, -8, 168), (-14, 10, 128), (-13, 22, 90)]
    low = [(-10, 28, 50), (-5, 30, 18)]
    iliac = [(-2, 30, 22), (24, 26, -14), (40, 18, -50), (54, 36, -110), (64, 56, -156)]
    carotid = [(20, 6, 404), (30, 2, 430), (31, 4, 460), (29, 4, 492)]
    return {
        "aorta": tube([*root, *down, *low], (15, 15, 14, 13, 12.5, 12, 12, 12, 11.5, 11, 10.5, 10, 9.5, 9)),
        "iliac_artery_left": tube([(-8, 30, 22), *_mirror(iliac)[1:]], (6.5, 6, 5.5, 5.5, 5.5)),
        "iliac_artery_right": tube(iliac, (6.5, 6, 5.5, 5.5, 5.5)),
        "brachiocephalic_trunk": tube([(4, 20, 358), (12, 14, 380), (19, 8, 402)], (8, 7.5, 7)),
        "subclavian_artery_right": tube([(19, 8, 402), (42, 0, 412), (78, 4, 406), (118, -8, 392)], (6.5, 6.5, 6, 5.5)),
        "subclavian_artery_left": tube(
            [(-14, -10, 360), (-24, -10, 392), (-46, -4, 410), (-80, 2, 406), (-118, -8, 392)], (6.5, 6.5, 6.5, 6, 5.5)
        ),
        "common_carotid_artery_right": tube(carotid, (5.2, 5.2, 5, 5)),
        "common_carotid_artery_left": tube([(-8, 8, 360), (-18, 4, 390), *_mirror(carotid)[1:]], (5.2, 5.2, 5.2, 5, 5)),
    }
