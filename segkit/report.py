"""The files of an evaluation, each made by one call that a notebook shows and a verb just writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from segkit import evaluation, figures, meshes
from segkit.codes import CodeVolume
from segkit.runs import time_stamp, write_json, write_whole
from segkit.staging import StagedSubject
from segkit.subjects import Part


@dataclass
class Report:
    """Scores of one evaluation and where its files go; all of them carry the same stamp."""

    scores: pd.DataFrame  # the table of evaluation.evaluate
    split: str
    output_dir: Path
    stamp: str = field(default_factory=time_stamp)
    files: list[Path] = field(default_factory=list)

    def table(self) -> Path:
        """`evaluation_results_<stamp>.csv`: a row a subject and structure; NaN is an empty cell."""
        path = Path(self.output_dir) / f"evaluation_results_{self.stamp}.csv"
        return self._keep(write_whole(path, lambda temporary: self.scores.to_csv(temporary, index=False)))

    def summary(self, upper_bound: pd.DataFrame, checkpoints: Sequence[Path]) -> dict:
        """`evaluation_summary_<stamp>.json`: the headline of the scores, and of the reference through TARGET_SHAPE."""
        content = {
            "split": self.split,
            "checkpoints": [str(path) for path in checkpoints],
            "prediction": evaluation.summarize(self.scores),
            "reference_through_target_shape": evaluation.summarize(upper_bound),
        }
        self._keep(write_json(Path(self.output_dir) / f"evaluation_summary_{self.stamp}.json", content))
        return content

    def distribution(self) -> Figure:
        """`metrics_distribution_<stamp>.png`."""
        return self._save("metrics_distribution", figures.plot_distribution(self.scores, self.split))

    def ranking(self) -> Figure:
        """`structure_ranking_<stamp>.png`."""
        table = evaluation.per_structure(self.scores)
        return self._save("structure_ranking", figures.plot_ranking(table, self.split))

    def success(self) -> Figure:
        """`success_rates_<stamp>.png`."""
        return self._save("success_rates", figures.plot_success_rates(self.scores, self.split))

    def visualization(self, subject: StagedSubject, part: Part, prediction: CodeVolume, slices: int = 4) -> Figure:
        """`segmentation_visualization_<stamp>.png`: CT, ground truth, prediction, difference of some slices."""
        reference = subject.labels()
        samples = [
            (
                f"{subject.name}, slice {z}",
                subject.hu(z),
                reference.with_codes(reference.codes[z]),
                prediction.with_codes(prediction.codes[z]),
                subject.spacing_mm[1:],
            )
            for z in spread_slices(reference, part, slices)
        ]
        title = f"{subject.name} ({self.split} split)"
        return self._save("segmentation_visualization", figures.plot_predictions(samples, title))

    def page(self, subject: StagedSubject, prediction: CodeVolume) -> Path:
        """`3d_<subject>_<stamp>.html`: ground truth and prediction as meshes, opens without a network."""
        layers = {
            "ground truth": meshes.make_meshes(subject.labels(), subject.grid),
            "prediction": meshes.make_meshes(prediction, subject.grid),
        }
        path = Path(self.output_dir) / f"3d_{subject.name}_{self.stamp}.html"
        return self._keep(meshes.write_page(path, meshes.mesh_figure(subject.name, layers)))

    def _save(self, name: str, figure: Figure) -> Figure:
        self._keep(figures.save_figure(Path(self.output_dir) / f"{name}_{self.stamp}.png", figure))
        return figure

    def _keep(self, path: Path) -> Path:
        self.files.append(path)
        return path


def spread_slices(reference: CodeVolume, part: Part, number: int) -> list[int]:
    """Slices of `part` evenly spread, from the head down, over those that hold a structure; codes are (z, y, x)."""
    slices = part.slices(len(reference.codes))
    held = [z for z in slices if reference.codes[z].any()] or slices
    places = (np.arange(number) + 0.5) / number * len(held)
    return sorted({held[int(place)] for place in places}, reverse=True)


def headline(summary: dict) -> str:
    """The headline score in one sentence, from `Report.summary`."""
    scores, bound = summary["prediction"], summary["reference_through_target_shape"]
    of_scores, of_bound = (
        "no score" if each["macro_dice"] is None else f"{each['macro_dice']:.3f}" for each in (scores, bound)
    )
    return (
        f"macro Dice {of_scores} over {scores['structures']} structures of "
        f"{scores['subjects']} subjects ({summary['split']} split); the reference itself, through TARGET_SHAPE and "
        f"back: {of_bound}. "
        f"{scores['found']} cases found, {scores['missed']} missed, {scores['false_alarms']} false alarms, "
        f"{scores['correctly_absent']} correctly absent."
    )
