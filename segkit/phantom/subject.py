"""One subject: what varies between people and scans, drawn from a seed, and the volume that results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import find_objects

from segkit.labels import official_names

from .anatomy import Build, parts_of
from .parts import Part
from .rendering import Canvas, Grid, smooth_field
from .shapes import Vector
from .skeleton import Pose

NAMES = official_names("v2")
SMALLEST = 30  # voxels at detail 1: what the field of view leaves of a structure below that is emptied

# What the field of view covers in the body's frame, mm: kind -> lowest and highest z.
VIEWS: Mapping[str, tuple[float, float]] = {
    "whole": (-300.0, 715.0),
    "no head": (-300.0, 440.0),
    "no legs": (-95.0, 715.0),
    "trunk": (-235.0, 425.0),
}
_VIEW_CYCLE = ("whole", "no head", "whole", "whole", "no legs", "whole", "trunk", "whole")
_ORIENTATION_CYCLE = ("RAS", "RAS", "LPS", "RAS", "RAS", "RAS", "LAS", "RAS", "RAS", "PIR", "RAS")

# Organs that lie a little differently in everybody: group -> shift (mm) and size (share), one standard deviation.
LOOSE: Mapping[str, tuple[float, float]] = {
    "heart": (3.5, 0.05),
    "liver": (3.0, 0.05),
    "spleen": (4.0, 0.08),
    "stomach": (4.0, 0.07),
    "pancreas": (3.0, 0.04),
    "gallbladder": (3.0, 0.08),
    "kidney_right": (4.0, 0.05),
    "kidney_left": (4.0, 0.05),
    "urinary_bladder": (2.0, 0.08),
    "prostate": (1.5, 0.06),
    "thyroid_gland": (1.5, 0.06),
    "duodenum": (2.5, 0.04),
    "small_bowel": (4.0, 0.04),
    "colon": (4.0, 0.03),
    "brain": (0.0, 0.01),
}

# HU that contrast agent adds: (arterial phase, portal venous phase).
_ARTERY, _VEIN = (230.0, 105.0), (15.0, 95.0)
CONTRAST: Mapping[str, tuple[float, float]] = {
    **{name: _ARTERY for name in NAMES if "artery" in name or name in ("aorta", "brachiocephalic_trunk")},
    **{name: _VEIN for name in NAMES if "vein" in name or "vena" in name},
    "pulmonary_vein": (200.0, 90.0),
    "heart": (130.0, 70.0),
    "atrial_appendage_left": (200.0, 90.0),
    "kidney_right": (110.0, 130.0),
    "kidney_left": (110.0, 130.0),
    "spleen": (60.0, 65.0),
    "liver": (12.0, 50.0),
    "pancreas": (50.0, 45.0),
    "thyroid_gland": (50.0, 50.0),
    "adrenal_gland_right": (25.0, 30.0),
    "adrenal_gland_left": (25.0, 30.0),
    "stomach": (10.0, 15.0),
    "small_bowel": (20.0, 25.0),
    "duodenum": (20.0, 25.0),
    "prostate": (10.0, 20.0),
}


@dataclass(frozen=True)
class Traits:
    """What makes a subject and its scan differ from others."""

    build: Build
    view: str
    orientation: str  # axis codes of the stored array, such as "LPS"
    phase: int | None  # 0 arterial, 1 portal venous, None without contrast agent
    age: int
    spacing: float  # in-plane, mm
    noise: float  # HU
    overlaps: bool
    oblique: float  # degrees by which the stored grid is turned in the world


@dataclass(frozen=True)
class Phantom:
    """A subject in memory: `ct` int16 HU and `masks`, both with the axes x, y, z of a right-anterior-superior grid.

    `masks` gives the non-empty structures as (box of three slices, bool array of that box). `affine` maps voxel
    indices to mm.
    """

    ct: np.ndarray
    masks: Mapping[str, tuple[tuple[slice, slice, slice], np.ndarray]]
    affine: np.ndarray
    traits: Traits


def traits_of(seed: int, number: int) -> Traits:
    """The traits of a subject, from the seed and its number alone. Kinds take turns, so that few subjects hold all."""
    rng = np.random.default_rng([seed, number, 1])
    turn = number + 5 * seed
    shoulder = tuple(float(v) for v in rng.normal(0, (4, 6, 6)))
    build = Build(
        male=turn % 2 == 0,
        cysts=(turn % 3 == 0, turn % 5 in (1, 2)),
        fat_mm=float(rng.uniform(8, 28)),
        pose=Pose(arms_up=turn % 3 != 2, shoulder=shoulder),
    )
    return Traits(
        build=build,
        view=_VIEW_CYCLE[turn % len(_VIEW_CYCLE)],
        orientation=_ORIENTATION_CYCLE[turn % len(_ORIENTATION_CYCLE)],
        phase=(None, 0, 1, 1)[turn // 2 % 4],
        age=int(rng.integers(21, 90)),
        spacing=float(rng.choice([2.8, 2.9, 3.0])),
        noise=float(rng.uniform(11, 20)),
        overlaps=bool(rng.random() < 0.85),
        oblique=2.5 if turn % 13 == 12 else 0.0,
    )


def make_phantom(seed: int, number: int, detail: float = 1.0) -> Phantom:
    """Paint subject `number` of a seed. `detail` below 1 divides the voxel sizes by it; nothing else changes."""
    traits = traits_of(seed, number)
    rng = np.random.default_rng([seed, number, 2])
    grid = _posed_grid(traits, rng, detail)
    parts = _loosened(parts_of(traits.build, rng), rng)
    shape = grid.points[0].shape
    textures = tuple(_texture(shape, grid.spacing, rng) for _ in range(2))
    codes = {name: code for code, name in enumerate(NAMES, 1)}
    canvas = Canvas(grid, textures, codes, _brightening(traits.phase, rng), traits.overlaps)
    canvas.paint(parts)
    _lay_on_table(canvas.hu, grid.spacing)
    ct = _with_noise(canvas.hu, traits.noise, rng)
    origin = np.round(rng.uniform(-200, 200, 3), 3)
    affine = np.diag([*grid.spacing, 1.0])
    affine[:3, 3] = origin
    return Phantom(ct.T, _masks(canvas, SMALLEST * detail**3), _turned(affine, traits.oblique), traits)


def _posed_grid(traits: Traits, rng: np.random.Generator, detail: float) -> Grid:
    """The voxel grid of the scan, each voxel knowing its point in the body's frame: size, posture, deformation."""
    height = rng.normal(1.0 if traits.build.male else 0.955, 0.025)
    regions = np.clip(height * rng.normal(1, 0.02, 5), 0.9, 1.06)  # legs, pelvis, trunk, neck, head
    knots = np.array([-420.0, -150.0, 0.0, 410.0, 540.0, 720.0])
    heights = np.concatenate([[0], np.cumsum(np.diff(knots) * regions)])
    low, high = np.interp(VIEWS[traits.view], knots, heights)
    girth = np.clip(rng.normal(1, (0.05, 0.05), 2), 0.9, 1.1)
    wide = min(2 * (girth[0] * 200 + 28), 480)
    deep = girth[1] * 250 + 62
    spacing = (
        traits.spacing / detail,
        traits.spacing / detail,
        _slice_mm(*np.interp(VIEWS["whole"], knots, heights)) / detail,
    )
    shape = tuple(round(size / step) for size, step in zip((high - low, deep, wide), spacing[::-1], strict=True))
    z, y, x = (np.arange(n) * step for n, step in zip(shape, spacing[::-1], strict=True))
    z, y, x = z + low, y - deep / 2, x - wide / 2
    level = np.interp(z, heights, knots)
    turns = np.deg2rad(rng.normal(0, (1.2, 0.8, 2.5)))
    swing = [_sway(level, rng, size) for size in (3.0, 5.0, 0.025, 0.025)]
    bend = _deformation(shape, spacing, rng)
    up, depth, across = np.ix_(*(axis.astype(np.float32) for axis in (level, y, x)))
    a, b, c = (float(turn) for turn in turns)
    frame = (
        (across - c * depth + b * (up - 150)) / _column(girth[0] * (1 + swing[2])) + _column(swing[0]),
        (depth + c * across - a * (up - 150)) / _column(girth[1] * (1 + swing[3])) + _column(swing[1]),
        up - b * across + a * depth,
    )
    return Grid(tuple(axis + extra for axis, extra in zip(frame, bend, strict=True)), spacing)


def _slice_mm(low: float, high: float) -> float:
    """The thickest usual slice that still cuts a whole body into more than 200."""
    return next((step for step in (5.0, 4.75, 4.5, 4.25) if (high - low) / step >= 205), 4.0)


def _column(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)[:, None, None]


def _sway(level: np.ndarray, rng: np.random.Generator, size: float) -> np.ndarray:
    """A smooth random curve along the body, by height in mm."""
    knots = np.linspace(-420, 720, 8)
    values = rng.normal(0, size, len(knots))
    t = np.clip((level - knots[0]) / (knots[1] - knots[0]), 0, len(knots) - 1.001)
    base = t.astype(int)
    share = t - base
    share = share * share * (3 - 2 * share)
    return values[base] * (1 - share) + values[base + 1] * share


def _deformation(shape: tuple[int, ...], spacing: Vector, rng: np.random.Generator) -> list[np.ndarray]:
    """A smooth shift of every point along x, y and z in mm: large and slow, with a little that is small and quick."""
    fields = []
    for _ in range(3):
        slow = rng.normal(0, 8.0, _controls(shape, spacing, 170))
        quick = rng.normal(0, 2.6, _controls(shape, spacing, 55))
        fields.append(smooth_field(slow, shape) + smooth_field(quick, shape))
    return fields


def _controls(shape: tuple[int, ...], spacing: Vector, every: float) -> tuple[int, ...]:
    """How many control values along z, y, x put one every so many mm."""
    return tuple(max(1, round(n * step / every)) + 3 for n, step in zip(shape, spacing[::-1], strict=True))


def _texture(shape: tuple[int, ...], spacing: Vector, rng: np.random.Generator) -> np.ndarray:
    return smooth_field(rng.normal(0, 2.1, _controls(shape, spacing, 15)), shape)


def _loosened(parts: list[Part], rng: np.random.Generator) -> list[Part]:
    """Shift and scale each loose organ about its middle."""
    moves: dict[str | None, tuple[Vector, float]] = {}
    for group, (shift, size) in LOOSE.items():
        offset = tuple(float(v) for v in np.clip(rng.normal(0, shift, 3), -2 * shift, 2 * shift))
        moves[group] = offset, float(np.clip(rng.normal(1, size), 1 - 2 * size, 1 + 2 * size))
    middles: dict[str | None, Vector] = {}
    for part in parts:
        low, high = part.bounds
        middles.setdefault(part.group or part.name, tuple((a + b) / 2 for a, b in zip(low, high, strict=True)))
    return [
        part.moved(middles[part.group or part.name], *moves[part.group or part.name])
        if (part.group or part.name) in moves
        else part
        for part in parts
    ]


def _brightening(phase: int | None, rng: np.random.Generator) -> dict[str | None, float]:
    """HU that contrast agent adds to each structure, a little different in everybody."""
    dose = float(rng.uniform(0.8, 1.2))
    return {} if phase is None else {name: dose * added[phase] for name, added in CONTRAST.items()}


def _lay_on_table(hu: np.ndarray, spacing: Vector) -> None:
    """Draw the table, a curved shell under the back, where there is only air."""
    _, height, width = hu.shape
    x = (np.arange(width) - width / 2) * spacing[0]
    y = np.arange(height) * spacing[1]
    surface = 6 + 16 * (x / 220) ** 2
    shell = np.abs(y[:, None] - surface) < 3.5 + 0.5 * spacing[1] / 3
    hu[np.broadcast_to(shell, hu.shape) & (hu < -900)] = -260


def _with_noise(hu: np.ndarray, sd: float, rng: np.random.Generator) -> np.ndarray:
    """int16 HU with noise that neighbours in a slice partly have in common."""
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    noise[:, :, 1:] += np.float32(0.5) * noise[:, :, :-1]
    noise[:, 1:] += np.float32(0.5) * noise[:, :-1]
    return np.clip(np.rint(hu + np.float32(sd / 1.25) * noise), -1024, 3071).astype(np.int16)


def _masks(canvas: Canvas, smallest: float) -> dict:
    """Structure -> (box along x, y, z, mask of the box) of what is large enough to be seen."""
    boxes = find_objects(canvas.owner, max_label=len(NAMES))
    masks = {}
    for name, code in canvas.codes.items():
        box = boxes[code - 1]
        if box is None:
            continue
        extra = [np.unravel_index(where, canvas.owner.shape) for where in canvas.shared.get(name, [])]
        for place in extra:
            box = tuple(
                slice(min(b.start, int(p.min())), max(b.stop, int(p.max()) + 1))
                for b, p in zip(box, place, strict=True)
            )
        mask = canvas.owner[box] == code
        for place in extra:
            mask[tuple(p - b.start for p, b in zip(place, box, strict=True))] = True
        if mask.sum() >= max(smallest, 1):
            masks[name] = box[::-1], mask.T
    return masks


def _turned(affine: np.ndarray, degrees: float) -> np.ndarray:
    """The affine after turning the world about x by a small angle."""
    if not degrees:
        return affine
    angle = np.deg2rad(degrees)
    about_x = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    turned = affine.copy()
    turned[:3] = np.round(about_x @ affine[:3], 6)
    return turned
