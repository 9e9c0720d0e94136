"""Predict subjects, score them on their own grids, one tidy table: a row a subject and structure."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from segkit.labels import check_name, group_of
from segkit.locks import alone
from segkit.runs import PREDICTIONS_LOCK, RUN_LOCK, make_folder, sweep, write_json, write_whole
from segkit.settings import SCORING, Scoring
from segkit.splits import Part
from segkit.staging import StagedSubject
from segkit.stores import StoredArray, checksums, is_whole, save_array, sealed
from segkit.untrusted import read_file, read_json

COLUMNS = (
    "subject", "split", "structure", "group", *metrics.MEASURES, "reference_ml", "predicted_ml", "tp", "fp", "fn",
    "reference_voxels", "predicted_voxels", "present", "detected", "detection", "found_at_dice", "nsd_tolerance_mm",
)  # fmt: skip

_TEXTS = ("subject", "split", "structure", "group", "detection")
_FLAGS = ("present", "detected")


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
    slices: Sequence[int] | None = None,
) -> Evaluation:
    """One subject's rows, a structure each: those that the reference annotates and the prediction looks for.

    Codes (z, y, x) with `spacing_mm` in the same order. Only what lies in `slices` (all by default) is scored; that a
    structure goes on beyond them is seen by distances. Columns as in COLUMNS: counts in voxels, volumes in ml,
    distances in mm, the rest of the measures as in `metrics.MEASURES`; `present` whether the reference holds it;
    `detection` as in `metrics.detection` at `found_at_dice`, `detected` whether it was found.
    Raises SubjectError if the two have no structure in common.
    """
    whole = reference, prediction
    if slices is not None:
        reference, prediction = (volume.within(slices) for volume in whole)
    pairs = metrics.code_pairs(reference, prediction)
    if not pairs.structures:
        raise SubjectError(
            f"subject {subject}: none of the model's structures ({', '.join(prediction.structures[:4])} ...) is "
            f"annotated ({', '.join(reference.structures[:4])} ...): nothing to compare"
        )
    counts = pairs.counts()
    tp, fp, fn = (counts[name].to_numpy() for name in ("tp", "fp", "fn"))
    voxel_ml = math.prod(spacing_mm) / 1000
    table = counts.join(surface.surface_scores(*whole, spacing_mm, scoring.tolerance_mm, scoring.jobs, slices))
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
    `joblib.parallel_config`, of a dask cluster for example, its workers predict and score the subjects. Raises
    SegkitError where another process evaluates into the same folder.
    """
    folder = None if predictions_dir is None else Path(predictions_dir).absolute()
    predict = partial(_predict_and_keep, predictor, folder)
    with nullcontext() if folder is None else _no_other_evaluation(folder):
        return _score_all(predict, staged, parts, split, scoring, f"evaluating {split}", progress)


@contextmanager
def _no_other_evaluation(predictions_dir: Path) -> Iterator[None]:
    run = predictions_dir.parent
    taken = f"{run}: another process is evaluating the run in it; wait until it ends"
    with alone(make_folder(run) / PREDICTIONS_LOCK, taken):
        sweep(predictions_dir)
        sweep(run, run / RUN_LOCK)  # of reports; a training that runs may be writing
        yield


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
    reference, prediction = subject.labels(), predict(subject)
    slices = None if part.slabs is None else part.slices(subject.shape[0])
    try:
        return score_subject(subject.name, split, reference, prediction, subject.spacing_mm, scoring, slices)
    except SubjectError as error:
        return str(error)


def load_scores(path: str | Path) -> pd.DataFrame:
    """A table of scores that `Report.table` wrote. Raises SegkitError for a file that is no such table.

    Names are safe (`segkit.labels.check_name`), no number is infinite, and what follows from the counts is as they say.
    """
    try:
        # opened here: pandas would take a name for an address to fetch, or for an archive to unpack
        content = io.BytesIO(read_file(Path(path)))
        table = pd.read_csv(content, dtype=dict.fromkeys(_TEXTS, str), keep_default_na=False, na_values=[""])
    except (OSError, ValueError, OverflowError) as error:
        raise SegkitError(f"{path}: expected a table of scores as CSV ({error}); run `segkit evaluate`") from error
    lacking = [column for column in COLUMNS if column not in table.columns]
    if lacking:
        raise SegkitError(
            f"{path}: expected the columns of evaluation_results_<stamp>.csv, found none called "
            f"{', '.join(lacking[:4])}; run `segkit evaluate` again"
        )
    wrong = _what_is_wrong(table)
    if wrong:
        raise SegkitError(f"{path}: damaged table: {wrong}; run `segkit evaluate` again")
    twice = table[table.duplicated(["subject", "structure"])]
    if len(twice):
        raise SegkitError(f"{path}: {twice.iloc[0]['subject']}, {twice.iloc[0]['structure']} comes twice")
    return table


def _what_is_wrong(table: pd.DataFrame) -> str | None:
    """What in a table of scores from a file cannot be; None where all can."""
    for column in COLUMNS:
        kinds = "b" if column in _FLAGS else "iuf"
        if column not in _TEXTS and len(table) and table[column].dtype.kind not in kinds:
            return f"{column} holds {table[column].dtype}"
        if column not in (*_TEXTS, *_FLAGS) and np.isinf(table[column].to_numpy(float)).any():
            return f"{column} holds a number without end"
    try:
        for name in dict.fromkeys([*table["subject"], *table["structure"]]):
            check_name(name)
    except SegkitError as error:
        return str(error)
    if table["tp"].isna().any() or (table[["tp", "fp", "fn"]].to_numpy(float) < 0).any():
        return "counts below 0, or none"
    for column, values in _follows(table).items():
        numbers = column not in _TEXTS
        same = np.isclose(table[column], values, equal_nan=True) if numbers else table[column].to_numpy() == values
        if not same.all():
            case = table.iloc[int(np.argmin(same))]
            return f"{column} of {case['structure']} in {case['subject']} does not follow from its counts"
    return None


def _follows(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """The columns of a table of scores that follow from its others."""
    tp, fp, fn = (table[name].to_numpy() for name in ("tp", "fp", "fn"))
    dice = metrics.dice(tp, fp, fn)
    detection = metrics.detection(tp + fn > 0, tp + fp > 0, dice, table["found_at_dice"].to_numpy())
    return {
        "group": np.array([group_of(name) for name in table["structure"]], object),
        "dice": dice,
        "iou": metrics.iou(tp, fp, fn),
        "precision": metrics.precision(tp, fp),
        "recall": metrics.recall(tp, fn),
        "reference_voxels": tp + fn,
        "predicted_voxels": tp + fp,
        "present": tp + fn > 0,
        "detection": detection,
        "detected": detection == "found",
    }


def save_prediction(folder: Path, subject: StagedSubject, prediction: CodeVolume) -> None:
    """Keep a prediction of the whole volume as `<subject>.b2nd` with `<subject>.json`."""
    make_folder(folder)
    write_whole(folder / f"{subject.name}.b2nd", lambda temporary: save_array(temporary, prediction.codes))
    content = {"subject": subject.name, "shape": list(subject.shape), **codebook_to_json(prediction)}
    write_json(folder / f"{subject.name}.json", sealed({**content, "crc32": checksums(prediction.codes)}))


def load_prediction(folder: str | Path, subject: StagedSubject) -> CodeVolume:
    """A kept prediction, (z, y, x) on the canonical grid. Raises SegkitError where there is none for the subject."""
    path = Path(folder) / f"{subject.name}.json"
    remedy = f"no prediction of {subject.name}: run the evaluation again"
    content = read_json(path, remedy)
    if not is_whole(content) or content.get("subject") != subject.name:
        raise SegkitError(f"{path}: damaged, or of another version or subject; {remedy}")
    codes = StoredArray(path.with_name(f"{subject.name}.b2nd"), subject.shape, "u", content["crc32"])[:]
    return codebook_from_json(content, codes, str(path))
