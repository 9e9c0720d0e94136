"""What lives in a notebook only: the progress of a training as it grows, and viewers."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import ipywidgets as widgets
import numpy as np
from IPython.display import DisplayHandle, IFrame, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from segkit.codes import CodeVolume
from segkit.errors import SegkitError
from segkit.pictures import TEXT_BOX, WINDOWS, colors_of_codes, hang, occurring, only, window
from segkit.progress import Progress, worst_structures


class Remembered:
    """What a section of a notebook was run with, for cells that build on it long after somebody changed a setting.

    names: the notebook's `globals()`; settings: the names of those that the section read; files: what it read from.
    """

    def __init__(self, section: str, names: Mapping[str, object], settings: Sequence[str], files: Sequence[Path] = ()):
        self.section, self.files = section, files
        self.values = {name: repr(names[name]) for name in settings}
        self.times = self._times()

    def check(self, names: Mapping[str, object]) -> None:
        """Raises SegkitError that names what has changed since, and the section to run again."""
        changed = [
            f"{name} = {names[name]!r}, it was {before}"
            for name, before in self.values.items()
            if repr(names[name]) != before
        ]
        changed += [
            f"{path} was written anew"
            for path, before, now in zip(self.files, self.times, self._times(), strict=True)
            if now != before
        ]
        if changed:
            raise SegkitError(f"changed since section {self.section} was run: {'; '.join(changed)}. Run it again")

    def _times(self) -> list[int | None]:
        return [path.stat().st_mtime_ns if path.exists() else None for path in self.files]


class LiveProgress:
    """Shows what `segkit.progress.Progress` draws after each epoch, and the worst structures, always in one place.

    Give it to `segkit.training.train` as `on_epoch`.
    """

    def __init__(self, progress: Progress):
        self.progress = progress
        self._displays: list[DisplayHandle] = []

    def __call__(self, history: Sequence[Mapping]) -> None:
        curves, samples = self.progress(history)
        shown = (curves, worst_structures(history).style.format(precision=3), samples)
        if self._displays:
            for place, content in zip(self._displays, shown, strict=True):
                place.update(content)
        else:
            self._displays = [display(content, display_id=True) for content in shown]


def show_page(page: Path, height: int = 700) -> IFrame:
    """An HTML page inside the notebook, loaded from its file: the notebook stays small."""
    try:
        address = quote(Path(os.path.relpath(page)).as_posix())
    except ValueError:  # on Windows from one drive to another
        address = Path(page).resolve().as_uri()
    return IFrame(address, width="100%", height=height)


PLANES: Mapping[str, tuple[int, str]] = {"axial": (0, "RLAP"), "coronal": (1, "RLHF"), "sagittal": (2, "APHF")}
"""Per plane the axis of (z, y, x) across it, and what lies at the left, right, top and bottom of the picture."""


@dataclass(frozen=True)
class View:
    """What the slice browser shows."""

    plane: str = "axial"  # one of PLANES
    position: int = 0  # voxel along the axis across the plane, on the canonical grid
    window: str = "soft tissue"  # one of WINDOWS
    opacity: float = 0.55  # of the colours
    outlines: bool = False  # instead of filled structures
    structures: tuple[str, ...] = ()  # those that are shown; none: all


def slice_browser(title: str, hu: np.ndarray, volumes: Mapping[str, CodeVolume], spacing_mm: tuple) -> widgets.VBox:
    """Slices of all three planes with controls for each part of a View; the volumes stand side by side.

    hu: int16 (z, y, x). volumes: for example {"ground truth": ..., "prediction": ...}, codes (z, y, x).
    spacing_mm: (z, y, x).
    """
    there = sorted({name for volume in volumes.values() for name in occurring(volume)})
    controls = {
        "plane": widgets.ToggleButtons(options=list(PLANES)),
        "position": widgets.IntSlider(len(hu) // 2, 0, len(hu) - 1, description="slice"),
        "window": widgets.Dropdown(options=list(WINDOWS), description="window"),
        "opacity": widgets.FloatSlider(View.opacity, min=0, max=1, step=0.05, description="opacity"),
        "outlines": widgets.Checkbox(False, description="outlines"),
        "structures": widgets.SelectMultiple(options=there, description="structures", rows=8),
    }
    controls["plane"].style.button_width = "80px"
    controls["structures"].layout.width = "340px"
    hint = widgets.HTML("<small>none chosen: all are shown; several with Ctrl or Shift</small>")
    picture = widgets.Image(format="png")

    def draw(_change: object = None) -> None:
        view = View(**{name: control.value for name, control in controls.items()})
        picture.value = render(title, hu, volumes, spacing_mm, view)

    def turn(_change: object) -> None:
        slices = hu.shape[PLANES[controls["plane"].value][0]]
        position = controls["position"]
        position.unobserve(draw, "value")  # drawn once, not for each step of the change
        position.max, position.value = slices - 1, slices // 2
        position.observe(draw, "value")
        draw()

    controls["plane"].observe(turn, "value")
    for name, control in controls.items():
        if name != "plane":
            control.observe(draw, "value")
    draw()
    return widgets.VBox([widgets.HBox([widgets.VBox([*controls.values(), hint]), picture])])


def render(
    title: str, hu: np.ndarray, volumes: Mapping[str, CodeVolume], spacing_mm: tuple, view: View = View()
) -> bytes:
    """One slice of all volumes side by side, as PNG, with true proportions; arguments as `slice_browser`.

    Turned as radiologists hang them: axial from the feet, coronal from the front, sagittal with the front at the left.
    """
    axis, letters = PLANES[view.plane]
    rows, columns = (spacing for place, spacing in enumerate(spacing_mm) if place != axis)
    plane = np.take(hu, view.position, axis)
    tall = plane.shape[0] * rows / (plane.shape[1] * columns)
    width = min(4.4, 7 / tall)  # inches: a whole body still fits the screen
    figure = Figure(figsize=(width * len(volumes), width * tall + 0.6), layout="constrained")
    for axes, (name, volume) in zip(figure.subplots(1, len(volumes), squeeze=False)[0], volumes.items(), strict=True):
        codes = volume.with_codes(np.take(volume.codes, view.position, axis))
        axes.imshow(hang(_colored(plane, codes, view)), aspect=rows / columns, interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
        _letter_sides(axes, letters)
    figure.suptitle(f"{title}, {view.plane}, slice {view.position} of {hu.shape[axis]}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def _colored(plane: np.ndarray, volume: CodeVolume, view: View) -> np.ndarray:
    """A slice of HU, (rows, columns), in grey with its structures in colour: float (rows, columns, 3), not hung."""
    shown = only(volume, view.structures) if view.structures else volume
    color = colors_of_codes(shown)[shown.codes]
    alpha = color[..., 3:] * view.opacity
    if view.outlines:
        alpha = alpha * _edges(shown)[..., None]
    return window(plane, WINDOWS[view.window])[..., None] * (1 - alpha) + color[..., :3] * alpha


def _edges(volume: CodeVolume) -> np.ndarray:
    """Bool, the shape of the codes (rows, columns): where one of the four neighbours belongs to other structures."""
    _, sets = np.unique(volume.codebook, axis=0, return_inverse=True)  # codes of the same structures are one area
    areas = np.pad(sets[volume.codes], 1, mode="edge")
    inner = areas[1:-1, 1:-1]
    neighbours = (areas[:-2, 1:-1], areas[2:, 1:-1], areas[1:-1, :-2], areas[1:-1, 2:])
    return np.logical_or.reduce([inner != neighbour for neighbour in neighbours])


def _letter_sides(axes: Axes, letters: str) -> None:
    """Write which side of the patient lies where: left, right, top, bottom of the picture."""
    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))
    for letter, (x, y), ha, va in zip(
        letters, places, ("left", "right", "center", "center"), ("center", "center", "top", "bottom"), strict=True
    ):
        axes.text(
            x, y, letter, transform=axes.transAxes, color="white", fontsize=8, ha=ha, va=va,
            bbox=TEXT_BOX,
        )  # fmt: skip


def niivue(ct: Path, masks: Sequence[Path] = (), opacity: float = 0.5) -> widgets.DOMWidget:
    """A CT and masks, NIfTI files, in NiiVue's viewer; without the package ipyniivue a line that says how to get it."""
    try:
        from ipyniivue import NiiVue
    except ImportError:
        return widgets.HTML(
            "The 3D viewer needs ipyniivue: <code>pip install -e '.[viewer]'</code>, then a new kernel."
        )
    viewer = NiiVue()
    level, width = WINDOWS["soft tissue"]
    low, high = level - width / 2, level + width / 2
    scan = {"path": str(ct), "colormap": "gray", "cal_min": low, "cal_max": high}
    colors = itertools.cycle(("red", "green", "blue", "warm", "cool"))
    shown = [{"path": str(mask), "colormap": next(colors), "opacity": opacity} for mask in masks]
    viewer.load_volumes([scan, *shown])
    return viewer
