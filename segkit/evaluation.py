"""Predict subjects, score them on their own grids, one tidy table: a row a subject and structure."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from segkit import metrics
from segkit.codes import CodeVolume, codebook_from_json, codebook_to_json
from segkit.errors import SegkitError, SubjectError
from segkit.inference import Predictor, round_trip
from segkit.labels import GROUPS, group_of
from segkit.runs import make_folder, write_json, write_whole
from segkit.staging import StagedSubject, open_array, save_array
from segkit.subjects import Part

COLUMNS = (
    "subject", "split", "structure", "group", "dice", "iou", "tp", "fp", "fn",
    "reference_voxels", "predicted_voxels", "present", "detected", "detection",
)  # fmt: skip


def score_subject(
    subject: str,
    split: str,
    reference: CodeVolume,
    prediction: CodeVolume,
    detected_dice: float = metrics.DETECTED_DICE,
) -> pd.DataFrame:
    """Rows of one subject, a structure each: those that the reference annotates and the prediction looks for.

    Columns as in COLUMNS: counts in voxels; `present` whether the reference holds it; `detected` whether it is present
    with a Dice of at least `detected_dice`; `detection` as in `metrics.detection`. Raises SubjectError if the two
    have no structure in common, SegkitError for a `detected_dice` that is not above 0.
    """
    if not 0 < detected_dice <= 1:
        raise SegkitError(f"DETECTED_DICE = {detected_dice!r}: expected a Dice above 0, at most 1")
    counts = metrics.joint_counts(reference, prediction)
    if counts.empty:
        raise SubjectError(
            f"subject {subject}: none of the model's structures ({', '.join(prediction.structures[:4])} ...) is "
            f"annotated ({', '.join(reference.structures[:4])} ...): nothing to compare"
        )
    tp, fp, fn = (counts[name].to_numpy() for name in ("tp", "fp", "fn"))
    table = counts.rename_axis("structure").reset_index()
    table["subject"], table["split"] = subject, split
    table["group"] = [group_of(name) for name in table["structure"]]
    table["dice"], table["iou"] = metrics.dice(tp, fp, fn), metrics.iou(tp, fp, fn)
    table["reference_voxels"], table["predicted_voxels"] = tp + fn, tp + fp
    table["present"] = tp + fn > 0
    table["detection"] = metrics.detection(tp + fn > 0, tp + fp > 0, table["dice"].to_numpy(), detected_dice)
    table["detected"] = table["detection"] == "found"
    return table[list(COLUMNS)]


def evaluate(
    predictor: Predictor,
    staged: Mapping[str, StagedSubject],
    parts: Sequence[Part],
    split: str,
    predictions_dir: str | Path | None = None,
    detected_dice: float = metrics.DETECTED_DICE,
    progress: bool = True,
) -> pd.DataFrame:
    """Predict `parts` volume by volume and score them on the scans' own grids.

    `split` is what `parts` are of, for the table. Whole volumes are predicted, the slices of a part are scored. With
    `predictions_dir` each prediction is kept there for figures (`load_prediction`). A subject that annotates none of
    the model's structures is left out with a warning. Memory: one subject at a time. Inside a
    `joblib.parallel_config`, of a dask cluster for example, its workers predict and score the subjects.
    """

    predict = partial(
        _predict_and_keep, predictor, None if predictions_dir is None else Path(predictions_dir).absolute()
    )
    return _score_all(predict, staged, parts, split, detected_dice, f"evaluating {split}", progress)


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
    progress: bool = True,
) -> pd.DataFrame:
    """The table of `evaluate` for the reference itself, sent through `target_shape` and back to the scan's grid."""
    structures = tuple(sorted(label_map, key=label_map.get))
    return _score_all(
        partial(round_trip, structures=structures, target_shape=target_shape),
        staged,
        parts,
        split,
        metrics.DETECTED_DICE,
        "reference through TARGET_SHAPE",
        progress,
    )


def _score_all(
    predict: Callable[[StagedSubject], CodeVolume],
    staged: Mapping[str, StagedSubject],
    parts: Sequence[Part],
    split: str,
    detected_dice: float,
    title: str,
    progress: bool,
) -> pd.DataFrame:
    work = (joblib.delayed(_score_part)(predict, staged[part.subject], part, split, detected_dice) for part in parts)
    # one after the other here, unless a surrounding joblib.parallel_config says otherwise
    results = joblib.Parallel(return_as="generator")(work)
    tables = []
    for result in tqdm(results, total=len(parts), desc=title, unit="subject", disable=not progress):
        if isinstance(result, str):
            warnings.warn(f"left out: {result}", stacklevel=3)
        else:
            tables.append(result)
    if not tables:
        raise SegkitError(f"no subject of the {split} split annotates a structure of the model: nothing to score")
    return pd.concat(tables, ignore_index=True)


def _score_part(
    predict: Callable[[StagedSubject], CodeVolume], subject: StagedSubject, part: Part, split: str, detected_dice: float
) -> pd.DataFrame | str:
    """The rows of one subject, or why there are none."""
    volumes = subject.labels(), predict(subject)
    if part.slabs is not None:
        inside = part.slices(subject.shape[0])
        volumes = tuple(volume.with_codes(volume.codes[inside]) for volume in volumes)
    try:
        return score_subject(subject.name, split, *volumes, detected_dice)
    except SubjectError as error:
        return str(error)


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


def per_structure(scores: pd.DataFrame) -> pd.DataFrame:
    """A row a structure, best first: mean Dice and IoU over the subjects that hold it, and the four detection counts.

    Columns: structure, group, dice, iou, n (subjects that hold it), found, missed, false_alarms, correctly_absent.
    Structures that no subject holds come last, with NaN.
    """
    held = scores[scores["present"]].groupby("structure")
    words = scores.groupby(["structure", "detection"]).size().unstack(fill_value=0)
    table = pd.DataFrame(index=pd.Index(scores["structure"].unique(), name="structure"))
    table["group"] = [group_of(name) for name in table.index]
    table["dice"], table["iou"] = held["dice"].mean(), held["iou"].mean()
    table["n"] = held.size()
    for word, column in {
        "found": "found", "missed": "missed", "false alarm": "false_alarms", "correctly absent": "correctly_absent"
    }.items():  # fmt: skip
        table[column] = words.get(word, 0)
    table["n"] = table["n"].fillna(0).astype(int)
    return table.sort_values("dice", ascending=False, na_position="last").reset_index()


def success_rates(scores: pd.DataFrame, thresholds: Iterable[float] = metrics.SUCCESS_THRESHOLDS) -> pd.DataFrame:
    """Share of the cases (subject, structure it holds) with a Dice of at least each threshold, per group and in all.

    A row a group and a last row "all"; columns: one a threshold ("0.5", ...), and n, the number of cases.
    """
    held = scores[scores["present"]]
    rows = {}
    for group in [*[g for g in GROUPS if (held["group"] == g).any()], "all"]:
        values = (held if group == "all" else held[held["group"] == group])["dice"].to_numpy()
        rates = {f"{threshold:g}": metrics.success_rate(values, threshold) for threshold in thresholds}
        rows[group] = {**rates, "n": len(values)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("group")


def summarize(scores: pd.DataFrame) -> dict[str, float | int | None]:
    """The headline and what stands beside it: macro_dice with its n structures, subjects, and detection counts.

    macro_dice is None where no reference holds any structure.
    """
    mean, structures = metrics.macro_dice(scores)
    counts = scores["detection"].value_counts()
    return {
        "macro_dice": None if np.isnan(mean) else mean,
        "structures": structures,
        "subjects": int(scores["subject"].nunique()),
        "found": int(counts.get("found", 0)),
        "missed": int(counts.get("missed", 0)),
        "false_alarms": int(counts.get("false alarm", 0)),
        "correctly_absent": int(counts.get("correctly absent", 0)),
    }
