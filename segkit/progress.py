"""What a person watches while a network learns: the curves, the worst structures, predictions beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from segkit import figures, pictures
from segkit.checkpoints import Checkpoint, load_checkpoint
from segkit.dataset import Data
from segkit.inference import Predictor
from segkit.styles import save_figure


class Progress:
    """Call it with the history after each epoch of the training in `folder`; it draws two pictures there.

    training_history.png: loss and validation Dice. sample_predictions.png: `slices` slices of the first validation
    subject beside their ground truth, by the checkpoint of the epoch.
    """

    def __init__(self, data: Data, folder: str | Path, device: str | None = None, slices: int = 3):
        self.data, self.folder, self.device, self.slices = data, Path(folder), device, slices

    def __call__(self, history: Sequence[Mapping]) -> tuple[Figure, Figure]:
        curves = figures.plot_history(history)
        save_figure(self.folder / "training_history.png", curves)
        newest = load_checkpoint(self.folder / f"checkpoint_epoch{history[-1]['epoch']}.pth")
        samples = sample_predictions(self.data, [newest], self.device, self.slices)
        save_figure(self.folder / "sample_predictions.png", samples)
        for figure in (curves, samples):
            plt.close(figure)  # a shell's training may draw hundreds
        return curves, samples


def sample_predictions(
    data: Data, checkpoints: Sequence[Checkpoint], device: str | None = None, slices: int = 3
) -> Figure:
    """Slices of the first validation subject on its own grid, as `pictures.plot_predictions` shows them."""
    part = data.split.val[0]
    subject, predictor = data.staged[part.subject], Predictor.of(checkpoints, device=device)
    reference = pictures.only(subject.labels(), data.label_map)  # others are not the network's to find
    chosen = pictures.spread_slices(reference, part, slices)
    predicted = predictor.predict_slices(subject, chosen)
    samples = [pictures.sample(subject, z, reference.at(z), predicted[z]) for z in chosen]
    return pictures.plot_predictions(
        samples, f"{subject.name} (val split), {', '.join(c.path.name for c in checkpoints)}"
    )


def worst_structures(history: Sequence[Mapping], count: int = 8, epochs: int = 6) -> pd.DataFrame:
    """Validation Dice of the `count` structures that are worst after the last scored epoch, over the last epochs.

    A row a structure, the worst first, a column an epoch. At the common threshold of each epoch (`val_threshold`);
    structures that no validation subject holds have no row. Without a scored epoch: empty.
    """
    scored = [row for row in history if row["val_dice_of"]][-epochs:]
    table = pd.DataFrame({f"epoch {row['epoch']}": row["val_dice_of"] for row in scored})
    if scored:
        table = table.sort_values(table.columns[-1], kind="stable").head(count)
    return table.rename_axis("worst structures")


def history_table(histories: Sequence[Sequence[Mapping]]) -> pd.DataFrame:
    """A row a member (from 1) and epoch, the columns of `training.History` but the Dice of each structure."""
    rows = [{"member": number, **row} for number, history in enumerate(histories, 1) for row in history]
    return (
        pd.DataFrame(rows, columns=None if rows else ["member", "epoch"])
        .drop(columns="val_dice_of", errors="ignore")
        .set_index(["member", "epoch"])
    )
