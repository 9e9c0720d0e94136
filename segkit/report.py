"""The files of an evaluation, each made by one call that a notebook shows and a verb just writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from segkit import cases, evaluation, figures, meshes, pages, pictures, rankings, summaries
from segkit.calibration import Reliability
from segkit.codes import CodeVolume
from segkit.confusion import worst_pairs
from segkit.dataset import Data
from segkit.evaluation import Evaluation
from segkit.metrics import MEASURES, SUCCESS_THRESHOLDS
from segkit.record import data_fingerprint
from segkit.report_page import Section, write_report_page
from segkit.runs import make_folder, time_stamp, write_csv, write_json
from segkit.splits import Part
from segkit.styles import counted, save_figure

CAPTIONS = {
    "metrics_distribution": "The cases (a subject and a structure that it holds), and a box a group.",
    "distance_distribution": "The distance in mm that 95 % of the surface stays within, where there is one.",
    "structure_ranking": "Mean Dice over the subjects that hold a structure, with a 95 % interval over subjects.",
    "success_rates": "The share of the cases that reach a Dice threshold.",
    "dice_by_volume": "Small structures lose more Dice to the same error at their surface.",
    "subject_overview": "Each subject's structures; missed ones and false alarms beside them.",
    "confusion": "Whose voxels were called what, in per cent of the structure's volume in the reference.",
    "reliability": "How often a pixel is inside where the model says with which probability it is.",
    "best_median_worst": "The lowest, the middle and the highest Dice of all cases.",
    "segmentation_visualization": "Ground truth, prediction and where they differ.",
}
"""What stands below the heading of each figure of the report."""


@dataclass
class Report:
    """An evaluation of the test split of `data` and where its files go; all of them carry the same stamp."""

    evaluated: Evaluation
    data: Data
    output_dir: Path
    predictions_dir: Path  # where `evaluation.evaluate` kept the predictions
    stamp: str = field(default_factory=time_stamp)
    files: list[Path] = field(default_factory=list)
    outcome: dict = field(default_factory=dict)  # of `summary`
    _sections: dict[str, Section] = field(default_factory=dict)  # by figure: one that is drawn again takes its place

    @property
    def split(self) -> str:
        """The split that was scored: "test", or "val" where validation subjects stand in."""
        return self.data.split.test_name

    def table(self) -> Path:
        """`evaluation_results_<stamp>.csv`: a row a subject and structure; NaN is an empty cell."""
        return self._write_csv("evaluation_results", self.evaluated.scores)

    def confusion_table(self) -> Path:
        """`evaluation_confusion_<stamp>.csv`: a row a pair of structures that were confused, over all subjects."""
        return self._write_csv("evaluation_confusion", worst_pairs(self.evaluated.confusion, self.evaluated.scores))

    def summary(self, round_trip: Evaluation, checkpoints: Sequence[Path], threshold: float | None = None) -> dict:
        """`evaluation_summary_<stamp>.json`: the headline, the same for the reference through TARGET_SHAPE, all means.

        `means`: of each protocol of `summaries.aggregate` its rows; None where there is no value. threshold: what the
        predictor was told, None for the checkpoints' own. `data`: the fingerprint of what was scored; `own_data`:
        whether that is of the data set that the model was trained on.
        """
        scores = self.evaluated.scores
        self.outcome = {
            "split": self.split,
            "data": data_fingerprint(self.data),
            "own_data": bool(self.data.split.train),  # `open_run` knows no training part in another data set
            "checkpoints": [str(path) for path in checkpoints],
            "threshold": threshold,
            "found_at_dice": float(scores["found_at_dice"].iloc[0]),
            "nsd_tolerance_mm": float(scores["nsd_tolerance_mm"].iloc[0]),
            "prediction": summaries.summarize(scores),
            "reference_through_target_shape": summaries.summarize(round_trip.scores),
            "means": {
                protocol: _records(summaries.aggregate(scores, protocol=protocol)) for protocol in summaries.PROTOCOLS
            },
        }
        self._keep(write_json(Path(self.output_dir) / f"evaluation_summary_{self.stamp}.json", self.outcome))
        return self.outcome

    def distribution(self) -> Figure:
        """`metrics_distribution_<stamp>.png`, of Dice."""
        return self._save("metrics_distribution", figures.plot_distribution(self.evaluated.scores, self.split))

    def distances(self) -> Figure:
        """`distance_distribution_<stamp>.png`."""
        figure = figures.plot_distribution(self.evaluated.scores, self.split, "hd95_mm")
        return self._save("distance_distribution", figure)

    def ranking(self) -> Figure:
        """`structure_ranking_<stamp>.png`."""
        table = summaries.per_structure(self.evaluated.scores)
        return self._save("structure_ranking", rankings.plot_ranking(table, self.split))

    def success(self, thresholds: Sequence[float] = SUCCESS_THRESHOLDS) -> Figure:
        """`success_rates_<stamp>.png`."""
        return self._save("success_rates", figures.plot_success_rates(self.evaluated.scores, self.split, thresholds))

    def volume(self) -> Figure:
        """`dice_by_volume_<stamp>.png`."""
        return self._save("dice_by_volume", figures.plot_volume(self.evaluated.scores, self.split))

    def subjects(self) -> Figure:
        """`subject_overview_<stamp>.png`."""
        return self._save("subject_overview", figures.plot_subjects(self.evaluated.scores, self.split))

    def confusion(self) -> Figure:
        """`confusion_<stamp>.png`."""
        pairs = worst_pairs(self.evaluated.confusion, self.evaluated.scores)
        return self._save("confusion", rankings.plot_confusion(pairs, self.split))

    def reliability(self, reliability: Mapping[str, Reliability]) -> Figure:
        """`reliability_<stamp>.png`, of `reliability.measure_reliability`."""
        return self._save("reliability", figures.plot_reliability(reliability, self.split))

    def cases(self) -> Figure:
        """`best_median_worst_<stamp>.png`: of all cases the worst, the median and the best, at their largest slice."""
        samples = []
        for row in cases.pick_cases(self.evaluated.scores).to_dict("records"):
            subject, prediction = self._subject(row["subject"])
            samples.append(cases.case_sample(row, subject, self.data.test_part(row["subject"]), prediction))
        return self._save(
            "best_median_worst",
            cases.plot_cases(samples, f"The worst, the median and the best case, {self.split} split"),
        )

    def visualization(self, subject_name: str | None = None, slices: int = 4) -> Figure:
        """`segmentation_visualization_<stamp>.png`: some slices of a subject, of the first one by default."""
        part = self.data.test_part(subject_name)
        subject, (reference, prediction) = self.data.staged[part.subject], self.layers(part.subject).values()
        chosen = pictures.spread_slices(reference, part, slices)
        samples = [pictures.sample(subject, z, reference.at(z), prediction.at(z)) for z in chosen]
        title = f"{subject.name} ({self.split} split)"
        return self._save("segmentation_visualization", pictures.plot_predictions(samples, title))

    def page(self, subject_name: str | None = None) -> Path:
        """`3d_<subject>_<stamp>.html`: ground truth and prediction as meshes, and how far apart they are."""
        part = self.data.test_part(subject_name)
        grid, layers = self.data.staged[part.subject].grid, self.layers(part.subject)
        layers_3d = {layer: meshes.make_meshes(volume, grid) for layer, volume in layers.items()}
        path = Path(self.output_dir) / f"3d_{part.subject}_{self.stamp}.html"
        return self._keep(pages.write_page(path, pages.mesh_figure(part.subject, layers_3d, self.whole(part))))

    def layers(self, subject_name: str) -> dict[str, CodeVolume]:
        """What is shown of a subject: "ground truth" and "prediction", codes (z, y, x).

        Of the ground truth no more than the structures that the model knows: others are not missed by it.
        """
        subject, prediction = self._subject(subject_name)
        return {"ground truth": pictures.only(subject.labels(), self.data.label_map), "prediction": prediction}

    def whole(self, part: Part) -> str:
        """What follows a subject's name where all of its slices are shown: the split, and whether some trained."""
        return f" ({self.split} split{'' if part.slabs is None else ' and the slices between, which trained'})"

    def report(self, thresholds: Sequence[float] = SUCCESS_THRESHOLDS, protocol: str = "segkit") -> Path:
        """`report_<stamp>.html`: the summary, the figures made so far and the tables on one page; after `summary`.

        thresholds: of the success rates; protocol: of the means, as in `summaries.aggregate`.
        """
        scores = self.evaluated.scores
        pairs = worst_pairs(self.evaluated.confusion, scores).head(60)
        rates = summaries.success_rates(scores, thresholds)
        tables = [
            Section(f"Means, protocol {protocol}", MEANS_TEXT, table=means_table(scores, protocol)),
            Section("Success at thresholds", "Of all cases.", table=rates.reset_index()),
            *self._sections.values(),
            Section("All structures", "Best first; n: subjects that hold it.", table=summaries.per_structure(scores)),
            Section("All subjects", "Best first; n: structures that it holds.", table=summaries.per_subject(scores)),
            Section("What was called what", "The pairs with the largest shares.", table=pairs),
        ]
        lead = [
            headline(self.outcome),
            f"Found means a Dice of {self.outcome['found_at_dice']:g} or more; surface Dice at "
            f"{self.outcome['nsd_tolerance_mm']:g} mm. "
            f"Model: {', '.join(map(self._name, self.outcome['checkpoints']))}. "
            "For education and research, not for diagnosis.",
        ]
        path = Path(self.output_dir) / f"report_{self.stamp}.html"
        return self._keep(write_report_page(path, f"Evaluation {self.stamp}, {self.split} split", lead, tables))

    def everything(
        self,
        round_trip: Evaluation,
        checkpoints: Sequence[Path],
        reliability: Mapping[str, Reliability],
        threshold: float | None = None,
    ) -> list[Path]:
        """All files, the report last; arguments as those of `summary` and `reliability`."""
        self.table()
        self.confusion_table()
        self.summary(round_trip, checkpoints, threshold)
        self.reliability(reliability)
        for draw in (
            self.ranking, self.distribution, self.distances, self.success, self.volume, self.subjects, self.confusion,
            self.cases, self.visualization, self.page, self.report,
        ):  # fmt: skip
            draw()
        return self.files

    def _subject(self, name: str) -> tuple:
        subject = self.data.staged[name]
        return subject, evaluation.load_prediction(self.predictions_dir, subject)

    def _name(self, checkpoint: str) -> str:
        """A checkpoint as the page, which may be mailed, names it: without the folders of this machine."""
        path, own = Path(checkpoint).absolute(), Path(self.output_dir).absolute()
        return (path.relative_to(own) if path.is_relative_to(own) else Path(path.parent.name, path.name)).as_posix()

    def _save(self, name: str, figure: Figure) -> Figure:
        path = self._keep(save_figure(Path(self.output_dir) / f"{name}_{self.stamp}.png", figure))
        self._sections[name] = Section(name.replace("_", " ").capitalize(), CAPTIONS[name], path)
        return figure

    def _write_csv(self, name: str, table: pd.DataFrame) -> Path:
        path = Path(self.output_dir) / f"{name}_{self.stamp}.csv"
        return self._keep(write_csv(path, table))

    def _keep(self, path: Path) -> Path:
        if path not in self.files:  # cells of a notebook run more than once
            self.files.append(path)
        return path


def write_comparison(table: pd.DataFrame, first: str, measure: str, output_dir: str | Path) -> list[Path]:
    """`comparison_<stamp>.csv`, the table of `comparison.compare`, and a figure of each further model.

    `first`: what the model is called that the others are compared with.
    """
    stamp, folder = time_stamp(), make_folder(Path(output_dir))
    path = folder / f"comparison_{stamp}.csv"
    files = [write_csv(path, table)]
    for number, (name, rows) in enumerate(table.groupby("model", sort=False), start=2):
        figure = rankings.plot_comparison(rows, (first, name), measure)
        files.append(save_figure(folder / f"comparison_{number}_{stamp}.png", figure))
    return files


MEANS_TEXT = (
    "Over structures: per structure the mean over the subjects that hold it, then over structures. Over cases: all "
    "pairs of subject and structure alike, false alarms with 0. Over subjects: per subject, then over subjects. "
    "In brackets: 95 % interval over subjects. n and cases are those of Dice; distances are of the cases in "
    "which both reference and prediction hold the structure."
)


def means_table(scores: pd.DataFrame, protocol: str = "segkit") -> pd.DataFrame:
    """The means of `summaries.aggregate` in words: a row what they are over, a column a measure, then n and cases."""
    means = summaries.aggregate(scores, protocol=protocol)
    means["words"] = [
        "-"
        if np.isnan(row.mean)
        else _short(row.mean) + ("" if np.isnan(row.low) else f" ({_short(row.low)} to {_short(row.high)})")
        for row in means.itertuples()
    ]
    table = means.pivot(index="over", columns="measure", values="words").reindex(
        index=means["over"].unique(), columns=means["measure"].unique()
    )
    numbers = means[means["measure"] == "dice"].set_index("over")[["n", "cases"]]
    return table.rename(columns={name: measure.title for name, measure in MEASURES.items()}).join(numbers).reset_index()


def _short(value: float) -> str:
    """Three decimals of a score, one of tens of mm or ml."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _records(table: pd.DataFrame) -> list[dict]:
    """The rows as plain types, None for NaN."""
    return [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in table.to_dict("records")
    ]


def headline(summary: Mapping) -> str:
    """The headline score in one sentence, from `Report.summary`."""
    scores, through = summary["prediction"], summary["reference_through_target_shape"]
    of_scores, of_reference = (
        "no score" if each["macro_dice"] is None else f"{each['macro_dice']:.3f}" for each in (scores, through)
    )
    low, high = scores["macro_dice_low"], scores["macro_dice_high"]
    sure = "" if low is None else f" (95 % interval {low:.3f} to {high:.3f})"
    return (
        f"macro Dice {of_scores}{sure} over {counted(scores['structures'], 'structure')} of "
        f"{counted(scores['subjects'], 'subject')} ({summary['split']} split); the reference itself, resampled "
        f"to TARGET_SHAPE and back: {of_reference}. "
        f"{scores['found']} cases found, {scores['missed']} missed, {scores['false_alarms']} false alarms, "
        f"{scores['correctly_absent']} correctly absent."
    )
