"""Predict subjects, score them on their own grids, one tidy table: a row a subject and structure."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from segkit import metrics, surface
from segkit.codes import CodeVolume, codebook_from_json, codebook_to_json
from segkit.confusion import confused
from segkit.errors import SegkitError, SubjectError
from segkit.inference import Predictor, round_trip
from segkit.labels import group_of
from segkit.runs import make_folder, write_json, write_whole
from segkit.settings import SCORING, Scoring
from segkit.staging import StagedSubject, open_array, save_array
from segkit.subjects import Part

COLUMNS = (
    "subject", "split", "structure", "group", *metrics.MEASURES, "reference_ml", "predicted_ml", "tp", "fp", "fn",
    "reference_voxels", "predicted_voxels", "present", "detected", "detection", "found_at_dice", "nsd_tolerance_mm",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """scores: a row a subject and structure, columns as in COLUMNS. confusion: the table of `confusion.confused`."""

    scores: pd.DataFrame
    confusion: pd.DataFrame


def score_subject(
    subject: str,
    split: str,
    reference: CodeVolume,
    prediction: CodeVolume,
    spacing_mm: Sequence[float],
    scoring: Scoring = SCORING,
) -> Evaluation:
    """One subject's rows, a structure each: those that the reference annotates and the prediction looks for.

    Codes (z, y, x) with `spacing_mm` in the same order. Columns as in COLUMNS: counts in voxels, volumes in ml,
    distances in mm, the rest of the measures as in `metrics.MEASURES`; `present` whether the reference holds it;
    `detection` as in `metrics.detection` at `found_at_dice`, `detected` whether it was found.
    Raises SubjectError if the two have no structure in common.
    """
    pairs = metrics.code_pairs(reference, prediction)
    if not pairs.structures:
        raise SubjectError(
            f"subject {subject}: none of the model's structures ({', '.join(prediction.structures[:4])} ...) is "
            f"annotated ({', '.join(reference.structures[:4])} ...): nothing to compare"
        )
    counts = pairs.counts()
    tp, fp, fn = (counts[name].to_numpy() for name in ("tp", "fp", "fn"))
    voxel_ml = math.prod(spacing_mm) / 1000
    table = counts.join(surface.surface_scores(reference, prediction, spacing_mm, scoring.tolerance_mm, scoring.jobs))
    table = table.rename_axis("structure").reset_index()
    table["subject"], table["split"] = subject, split
    table["group"] = [group_of(name) for name in table["structure"]]
    table["reference_voxels"], table["predicted_voxels"] = tp + fn, tp + fp
    table["reference_ml"], table["predicted_ml"] = (tp + fn) * voxel_ml, (tp + fp) * voxel_ml
    for name, measure in metrics.MEASURES.items():
        if measure.of is not None:
            table[name] = measure.of(table)
    table["present"] = tp + fn > 0
    table["detection"] = metrics.detection(tp + fn > 0, tp + fp > 0, table["dice"].to_numpy(), scoring.detected_dice)
    table["detected"] = table["detection"] == "found"
    table["found_at_dice"], table["nsd_tolerance_mm"] = scoring.detected_dice, scoring.tolerance_mm
    return Evaluation(table[list(COLUMNS)], confused(subject, pairs, voxel_ml))


def evaluate(
    predictor: Predictor,
    staged: Mapping[str, StagedSubject],
    parts: Sequence[Part],
    split: str,
    predictions_dir: str | Path | None = None,
    scoring: Scoring = SCORING,
    progress: bool = True,
) -> Evaluation:
    """Predict `parts` volume by volume and score them on the scans' own grids.

    `split` is what `parts` are of, for the table. Whole volumes are predicted, the slices of a part are scored. With
    `predictions_dir` each prediction is kept there for figures (`load_prediction`). A subject that annotates none of
    the model's structures is left out with a warning. Memory: one subject at a time. Inside a
    `joblib.parallel_config`, of a dask cluster for example, its workers predict and score the subjects.
    """

    predict = partial(
        _predict_and_keep, predictor, None if predictions_dir is None else Path(predictions_dir).absolute()
    )
    return _score_all(predict, staged, parts, split, scoring, f"evaluating {split}", progress)


def _predict_and_keep(predictor: Predictor, predictions_dir: Path | None, subject: StagedSubject) -> CodeVolume:
    prediction = predictor.predict(subject)
    if predictions_dir is not None:
        save_prediction(predictions_dir, subject, prediction)
    return prediction


def evaluate_round_trip(
    staged: Mapping[str, StagedSubject],
    parts: Sequence[Part],
    split: str,
    label_map: Mapping[str, int],
    target_shape: tuple[int, int],
    scoring: Scoring = SCORING,
    progress: bool = True,
) -> Evaluation:
    """The tables of `evaluate` for the reference itself, sent through `target_shape` and back to the scan's grid."""
    structures = tuple(sorted(label_map, key=label_map.__getitem__))
    return _score_all(
        partial(round_trip, structures=structures, target_shape=target_shape),
        staged,
        parts,
        split,
        scoring,
        "reference through TARGET_SHAPE",
        progress,
    )


def _score_all(
    predict: Callable[[StagedSubject], CodeVolume],
    staged: Mapping[str, StagedSubject],
    parts: Sequence[Part],
    split: str,
    scoring: Scoring,
    title: str,
    progress: bool,
) -> Evaluation:
    scoring = scoring.checked()
    work = (joblib.delayed(_score_part)(predict, staged[part.subject], part, split, scoring) for part in parts)
    # one after the other here, unless a surrounding joblib.parallel_config says otherwise
    results = joblib.Parallel(return_as="generator")(work)
    scored = []
    for result in tqdm(results, total=len(parts), desc=title, unit="subject", disable=not progress):
        if isinstance(result, str):
            warnings.warn(f"left out: {result}", stacklevel=3)
        else:
            scored.append(result)
    if not scored:
        raise SegkitError(f"no subject of the {split} split annotates a structure of the model: nothing to score")
    return Evaluation(
        pd.concat([each.scores for each in scored], ignore_index=True),
        pd.concat([each.confusion for each in scored], ignore_index=True),
    )


def _score_part(
    predict: Callable[[StagedSubject], CodeVolume], subject: StagedSubject, part: Part, split: str, scoring: Scoring
) -> Evaluation | str:
    """The rows of one subject, or why there are none."""
    volumes = [subject.labels(), predict(subject)]
    if part.slabs is not None:
        volumes = [_within(volume, part.slices(subject.shape[0])) for volume in volumes]
    reference, prediction = volumes
    try:
        return score_subject(subject.name, split, reference, prediction, subject.spacing_mm, scoring)
    except SubjectError as error:
        return str(error)


def _within(volume: CodeVolume, slices: Sequence[int]) -> CodeVolume:
    """The volume with background outside of `slices`, so that what is left stays at its place in mm."""
    codes = np.zeros_like(volume.codes)
    codes[slices] = volume.codes[slices]
    return volume.with_codes(codes)


def load_scores(path: str | Path) -> pd.DataFrame:
    """A table of scores that `Report.table` wrote. Raises SegkitError for a file that is no such table."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise SegkitError(f"{path}: expected a table of scores as CSV ({error}); run `segkit evaluate`") from error
    lacking = [column for column in COLUMNS if column not in table.columns]
    if lacking:
        raise SegkitError(
            f"{path}: expected the columns of evaluation_results_<stamp>.csv, found none called "
            f"{', '.join(lacking[:4])}; run `segkit evaluate` again"
        )
    twice = table[table.duplicated(["subject", "structure"])]
    if len(twice):
        raise SegkitError(f"{path}: {twice.iloc[0]['subject']}, {twice.iloc[0]['structure']} comes twice")
    return table


def save_prediction(folder: Path, subject: StagedSubject, prediction: CodeVolume) -> None:
    """Keep a prediction of the whole volume as `<subject>.b2nd` with `<subject>.json`."""
    make_folder(folder)
    write_whole(folder / f"{subject.name}.b2nd", lambda temporary: save_array(temporary, prediction.codes))
    content = {"subject": subject.name, "shape": list(subject.shape), **codebook_to_json(prediction)}
    write_json(folder / f"{subject.name}.json", content)


def load_prediction(folder: str | Path, subject: StagedSubject) -> CodeVolume:
    """A kept prediction, (z, y, x) on the canonical grid. Raises SegkitError where there is none for the subject."""
    path = Path(folder) / f"{subject.name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SegkitError(f"{path}: no prediction of {subject.name} ({error}); run the evaluation first") from error
    codes = open_array(path.with_suffix(".b2nd"), subject.shape)[:]
    return codebook_from_json(content, codes, str(path))
