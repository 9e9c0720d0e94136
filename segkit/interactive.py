"""What lives in a notebook only: the progress of a training as it grows, and the slice browser."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from IPython.display import DisplayHandle, IFrame, display
from matplotlib.figure import Figure

from segkit.codes import CodeVolume
from segkit.figures import occurring, overlay, show_slice
from segkit.progress import Progress, worst_structures


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
    return IFrame(Path(os.path.relpath(page)).as_posix(), width="100%", height=height)


def slice_browser(title: str, hu: np.ndarray, volumes: Mapping[str, CodeVolume], spacing_mm: tuple) -> widgets.VBox:
    """A slider over axial slices with an opacity and the choice of structures; the volumes stand side by side.

    hu: int16 (z, y, x). volumes: for example {"ground truth": ..., "prediction": ...}, codes (z, y, x).
    spacing_mm: (z, y, x).
    """
    there = sorted({name for volume in volumes.values() for name in occurring(volume)})
    position = widgets.IntSlider(len(hu) // 2, 0, len(hu) - 1, description="slice", continuous_update=True)
    opacity = widgets.FloatSlider(0.55, min=0, max=1, step=0.05, description="opacity")
    chosen = widgets.SelectMultiple(options=there, description="structures", rows=8)
    chosen.layout.width = "340px"
    hint = widgets.HTML("<small>none chosen: all are shown; several with Ctrl or Shift</small>")
    picture = widgets.Image(format="png")

    def draw(_change: object = None) -> None:
        picture.value = render(title, hu, volumes, spacing_mm, position.value, opacity.value, chosen.value)

    for control in (position, opacity, chosen):
        control.observe(draw, "value")
    draw()
    controls = widgets.VBox([position, opacity, chosen, hint])
    return widgets.VBox([widgets.HBox([controls, picture])])


def render(
    title: str,
    hu: np.ndarray,
    volumes: Mapping[str, CodeVolume],
    spacing_mm: tuple,
    z: int,
    opacity: float,
    chosen: tuple[str, ...] = (),
) -> bytes:
    """One slice of all volumes side by side, as PNG. Without `chosen` all structures are shown."""
    figure = Figure(figsize=(4.6 * len(volumes), 4.4), layout="constrained")
    axes = figure.subplots(1, len(volumes), squeeze=False)[0]
    for axis, (name, volume) in zip(axes, volumes.items(), strict=True):
        here = volume.with_codes(volume.codes[z])
        shown = only(here, chosen) if chosen else here
        show_slice(axis, overlay(hu[z], shown, opacity), spacing_mm[1:], name)
    figure.suptitle(f"{title}, slice {z} of {len(hu)}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def only(volume: CodeVolume, chosen: tuple[str, ...]) -> CodeVolume:
    """The same codes with every structure but the chosen ones taken out of the codebook."""
    columns = np.array([name in chosen for name in volume.structures])
    return CodeVolume(volume.codes, volume.codebook & columns, volume.structures)
