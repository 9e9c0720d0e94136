"""Pictures: slices of scans with their masks, outlines and errors.

Slices are shown as radiologists hang them: seen from the feet, the patient's right on the left of the picture, the
spine at the bottom, with true proportions in mm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from skimage.measure import find_contours

from segkit.codes import CodeVolume
from segkit.labels import OFFICIAL, color_of, rgb_of
from segkit.scans import Scan
from segkit.splits import Part
from segkit.staging import StagedSubject
from segkit.styles import GREEN, SKY, VERMILION, YELLOW, sentence

WINDOWS = {
    "soft tissue": (40.0, 400.0), "lung": (-600.0, 1500.0), "bone": (400.0, 1800.0), "brain": (40.0, 80.0),
    "mediastinum": (50.0, 350.0), "liver": (60.0, 160.0),
}  # fmt: skip
"""Usual CT windows: name -> level and width in HU."""

DIFFERENCE_LOOKS = {1: ("agrees", GREEN, 0.25), 2: ("missed", VERMILION, 0.9), 3: ("false alarm", SKY, 0.9),
                    4: ("other structure", YELLOW, 0.9)}  # fmt: skip
"""The kinds of `difference`: label, colour, opacity. What is right is a tint; errors hide the grey below them, which
would make one colour look like another one."""

OUTLINES = {"ground truth": (YELLOW, "-"), "prediction": (SKY, (0, (3, 1.5)))}
"""Colour and line of the outlines."""

OPACITY = 0.55  # of structures over the grey of a CT

WIDTH = 11.0  # inches, of a figure at its widest: a notebook shows it without shrinking its letters

TEXT_BOX = {"facecolor": "black", "alpha": 0.4, "pad": 1, "edgecolor": "none"}  # white text on any slice


def hang(plane: np.ndarray) -> np.ndarray:
    """An axial slice (y, x, ...) of the canonical grid turned as it is shown: front at the top, right on the left."""
    return plane[::-1, ::-1]


def window(hu: np.ndarray, level_width: tuple[float, float] = WINDOWS["soft tissue"]) -> np.ndarray:
    """HU -> grey 0..1 for a window given as (level, width) in HU."""
    level, width = level_width
    return np.clip((hu - level) / width + 0.5, 0, 1)


def colors_of_codes(volume: CodeVolume) -> np.ndarray:
    """Colour of each code, float (K, 4), RGBA 0..1: the mean over the structures of an overlap, background clear."""
    rgb = np.array([rgb_of(name) for name in volume.structures]) / 255
    number = volume.codebook.sum(1)
    mean = volume.codebook.astype(float) @ rgb / np.maximum(number, 1)[:, None]
    return np.concatenate([mean, (number > 0)[:, None]], 1)


def overlay(
    hu: np.ndarray,
    volume: CodeVolume,
    opacity: float = OPACITY,
    level_width: tuple[float, float] = WINDOWS["soft tissue"],
) -> np.ndarray:
    """A slice in grey with its structures in colour, float (y, x, 3), hung. `hu` and the codes are (y, x)."""
    color = colors_of_codes(volume)[volume.codes]
    alpha = color[..., 3:] * opacity
    return hang(window(hu, level_width)[..., None] * (1 - alpha) + color[..., :3] * alpha)


def outlines(volume: CodeVolume) -> list[np.ndarray]:
    """The closed outlines of each structure of a slice, codes (y, x): per outline float (points, 2), (column, row).

    In pixels of the hung slice, halfway between the last pixel inside and the first outside.
    """
    hung = volume.with_codes(hang(volume.codes))
    found = []
    for name, box in hung.boxes().items():
        inside = hung.at(box).mask(name)
        corner = [side.start - 1 for side in box]  # a rim of air closes the outline at the border of the slice
        found += [(line + corner)[:, ::-1] for line in find_contours(np.pad(inside, 1).astype(float), 0.5)]
    return found


def difference(reference: CodeVolume, prediction: CodeVolume) -> np.ndarray:
    """Per pixel, int (y, x): 0 background in both, 1 the same structures, else what is wrong with them.

    2: some were missed; 3: some are false alarms; 4: both, it was called another structure. Of a lesion inside an organ
    that was labelled as the organ alone the lesion was missed. Compared on the structures that the reference annotates;
    what was not annotated is neither right nor wrong.
    """
    names = [name for name in reference.structures if name in prediction.structures]
    ref, pred = (
        volume.codebook[:, [volume.structures.index(name) for name in names]] for volume in (reference, prediction)
    )
    missed, extra = (ref[:, None] & ~pred).any(axis=2), (~ref[:, None] & pred).any(axis=2)
    held = ref.any(1, keepdims=True).astype(int)
    kinds: np.ndarray = np.where(missed, np.where(extra, 4, 2), np.where(extra, 3, held))
    return kinds[reference.codes, prediction.codes]


def difference_picture(
    hu: np.ndarray,
    reference: CodeVolume,
    prediction: CodeVolume,
    level_width: tuple[float, float] = WINDOWS["soft tissue"],
) -> np.ndarray:
    """A slice in grey with the kinds of `difference` in their colours, float (y, x, 3), hung."""
    picture = np.repeat(window(hu, level_width)[..., None], 3, axis=2)
    kinds = difference(reference, prediction)
    for kind, (_, color, opacity) in DIFFERENCE_LOOKS.items():
        picture[kinds == kind] = (1 - opacity) * picture[kinds == kind] + opacity * np.array(to_rgb(color))
    return hang(picture)


def only(volume: CodeVolume, chosen: Collection[str]) -> CodeVolume:
    """The same codes with every structure but the chosen ones taken out of the codebook."""
    columns = np.array([name in chosen for name in volume.structures])
    return CodeVolume(volume.codes, volume.codebook & columns, volume.structures)


def occurring(volume: CodeVolume) -> list[str]:
    """The structures with at least one voxel in these codes."""
    members = volume.codebook[np.unique(volume.codes)].any(0)
    return [name for name, there in zip(volume.structures, members, strict=True) if there]


def show_slice(
    axes: Axes, picture: np.ndarray, spacing_mm: Sequence[float], title: str = "", cmap: str | None = None
) -> None:
    """Draw a hung slice with true proportions and R / L at its sides. `spacing_mm` is (y, x)."""
    axes.imshow(picture, aspect=spacing_mm[0] / spacing_mm[1], cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
    for x, letter in ((0.02, "R"), (0.98, "L")):
        axes.text(
            x, 0.5, letter, transform=axes.transAxes, color="white", fontsize=8, ha="left" if x < 0.5 else "right",
            bbox=TEXT_BOX,
        )  # fmt: skip


def show_outlines(axes: Axes, reference: CodeVolume, prediction: CodeVolume, width: float = 0.8) -> None:
    """Draw the outlines of both over a hung slice: the truth solid, the prediction dashed, in OUTLINES' colours."""
    for volume, (color, line) in zip((reference, prediction), OUTLINES.values(), strict=True):
        dark = withStroke(linewidth=width + 0.8, foreground="black", alpha=0.5)  # to be seen on bright bone
        axes.add_collection(
            LineCollection(outlines(volume), colors=color, linestyles=[line], linewidths=width, path_effects=[dark])
        )


def structure_legend(figure: Figure, volumes: Sequence[CodeVolume], most: int = 27) -> None:
    """A legend under the figure with the colours of the structures that are shown, at most the `most` largest."""
    pixels = sum((Counter(volume.voxels()) for volume in volumes), Counter())
    shown = {name for name, number in pixels.most_common(most) if number}
    order = [*(name for name in OFFICIAL if name in shown), *sorted(shown - set(OFFICIAL))]
    handles = [Patch(color=_over_grey(color_of(name), OPACITY), label=name) for name in order]
    left_out = len(+pixels) - len(shown)
    if left_out:
        handles.append(Patch(color="none", label=f"and {left_out} smaller ones"))
    if handles:
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, fontsize=7, frameon=False)


def _over_grey(color: str, opacity: float) -> tuple[float, float, float]:
    """A colour as it looks over a slice, for its legend: over a dark grey, between lung and soft tissue."""
    red, green, blue = (opacity * part + (1 - opacity) * 0.3 for part in to_rgb(color))
    return red, green, blue


def outline_handles() -> list[Line2D]:
    """What a legend says about the outlines."""
    return [Line2D([], [], color=color, ls=line, label=label) for label, (color, line) in OUTLINES.items()]


def difference_handles() -> list[Patch]:
    """What a legend says about the kinds of `difference`."""
    return [Patch(color=_over_grey(color, opacity), label=label) for label, color, opacity in DIFFERENCE_LOOKS.values()]


def _tallest(samples: Sequence[tuple]) -> float:
    """The largest height of a slice relative to its width, in mm, so that panels leave no gaps."""
    return max(hu.shape[0] * spacing[0] / (hu.shape[1] * spacing[1]) for _, hu, *_, spacing in samples)


def spread_slices(volume: CodeVolume, part: Part, number: int) -> list[int]:
    """Slices of `part` evenly spread, from the head down, over those that hold a structure; codes are (z, y, x)."""
    slices = part.slices(len(volume.codes))
    holds = volume.codebook.sum(1) > 0
    held = [z for z in slices if holds[volume.codes[z]].any()] or slices
    places = (np.arange(number) + 0.5) / number * len(held)
    return sorted({held[int(place)] for place in places}, reverse=True)


def sample(scan: StagedSubject | Scan, z: int, *layers: CodeVolume, title: str = "") -> tuple:
    """What figures show of a slice: title, by default where it is, HU (y, x), the codes (y, x) given, spacing in mm."""
    return (title or f"{scan.name}, slice {z}", scan.hu(z), *layers, scan.spacing_mm[1:])


def plot_slices(
    samples: Sequence[tuple[str, np.ndarray, CodeVolume, Sequence[float]]], unsure: Sequence[np.ndarray] = ()
) -> Figure:
    """Slices above their masks: per sample a title, HU (y, x), codes (y, x), spacing in mm (y, x).

    unsure: per sample how unsure a model is, 0 to 1 bit (y, x); a third row shows it.
    """
    if not samples:
        return sentence("no slices to show")
    rows = 3 if len(unsure) else 2
    width = min(3.2, WIDTH / len(samples))
    size = (width * len(samples), rows * (width * _tallest(samples) + 0.2))
    figure, axes = plt.subplots(rows, len(samples), figsize=size, squeeze=False, layout="constrained")
    for column, (title, hu, volume, spacing_mm) in zip(axes.T, samples, strict=True):
        show_slice(column[0], hang(window(hu)), spacing_mm, title, cmap="gray")
        show_slice(column[1], overlay(hu, volume), spacing_mm)
    for axis, bits, (*_, spacing_mm) in zip(axes[-1], unsure, samples, strict=False):
        show_slice(axis, hang(np.asarray(bits, np.float32)), spacing_mm, cmap="inferno")
    if len(unsure):
        figure.colorbar(axes[-1, -1].images[0], ax=axes[-1], label="uncertainty, bits", fraction=0.02)
    structure_legend(figure, [volume for _, _, volume, _ in samples])
    return figure


def plot_predictions(
    samples: Sequence[tuple[str, np.ndarray, CodeVolume, CodeVolume, Sequence[float]]], title: str = ""
) -> Figure:
    """A row a slice: CT with the outlines of both, ground truth, prediction, difference.

    Per sample a title, HU (y, x), the codes of both (y, x), spacing in mm (y, x).
    """
    if not samples:
        return sentence("no slices to show")
    size = (WIDTH, len(samples) * (WIDTH / 4 * _tallest(samples) + 0.3))
    figure, axes = plt.subplots(len(samples), 4, figsize=size, squeeze=False, layout="constrained")
    for row, (name, hu, reference, prediction, spacing_mm) in zip(axes, samples, strict=True):
        show_slice(row[0], hang(window(hu)), spacing_mm, name, cmap="gray")
        show_outlines(row[0], reference, prediction)
        show_slice(row[1], overlay(hu, reference), spacing_mm, "ground truth")
        show_slice(row[2], overlay(hu, prediction), spacing_mm, "prediction")
        show_slice(row[3], difference_picture(hu, reference, prediction), spacing_mm, "difference")
    for axis, handles in ((axes[-1, 0], outline_handles()), (axes[-1, 3], difference_handles())):
        axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=7, frameon=False)
    structure_legend(figure, [volume for _, _, *both, _ in samples for volume in both])
    if title:
        figure.suptitle(title)
    return figure
