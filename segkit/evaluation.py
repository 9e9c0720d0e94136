"""Predict subjects, score them on their own grids, one tidy table: a row a subject and structure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from segkit import metrics
from segkit.codes import CodeVolume, codebook_from_json, codebook_to_json
from segkit.errors import SegkitError
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
    with a Dice of at least `detected_dice`; `detection` as in `metrics.detection`. Raises SegkitError if the two have
    no structure in common.
    """
    counts = metrics.joint_counts(reference, prediction)
    if counts.empty:
        raise SegkitError(
            f"subject {subject}: none of the model's structures ({', '.join(prediction.structures[:4])} ...) is "
            f"annotated ({', '.join(reference.structures[:4])} ...): checkpoint and data are of different label maps"
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

    `split` is what `parts` are of, for the table. With `predictions_dir` the codes of each prediction are kept there
    for figures (`load_prediction`). Memory: one subject at a time.
    """
    tables = []
    for part in tqdm(parts, desc=f"evaluating {split}", unit="subject", disable=not progress):
        subject = staged[part.subject]
        prediction = predictor.predict(subject, part)
        tables.append(score_subject(subject.name, split, reference_of(subject, part), prediction, detected_dice))
        if predictions_dir is not None:
            save_prediction(Path(predictions_dir), subject, part, prediction)
    return pd.concat(tables, ignore_index=True)


def evaluate_round_trip(
    staged: Mapping[str, StagedSubject],
    parts: Sequence[Part],
    split: str,
    label_map: Mapping[str, int],
    target_shape: tuple[int, int],
    progress: bool = True,
) -> pd.DataFrame:
    """The table of `evaluate` for a network that makes no error: the reference through `target_shape` and back."""
    tables = []
    for part in tqdm(parts, desc="upper bound", unit="subject", leave=False, disable=not progress):
        subject, structures = staged[part.subject], tuple(sorted(label_map, key=label_map.get))
        back = round_trip(subject, structures, target_shape, part)
        tables.append(score_subject(subject.name, split, reference_of(subject, part), back))
    return pd.concat(tables, ignore_index=True)


def reference_of(subject: StagedSubject, part: Part) -> CodeVolume:
    """Reference codes of the slices of `part`, (slices, y, x) on the canonical grid."""
    volume = subject.labels()
    return volume if part.slabs is None else volume.with_codes(volume.codes[part.slices(subject.shape[0])])


def save_prediction(folder: Path, subject: StagedSubject, part: Part, prediction: CodeVolume) -> None:
    """Keep a prediction as `<subject>.b2nd` with `<subject>.json`, on all slices; those outside `part` stay empty."""
    make_folder(folder)
    codes = np.zeros(subject.shape, prediction.codes.dtype)
    codes[part.slices(subject.shape[0])] = prediction.codes
    write_whole(folder / f"{subject.name}.b2nd", lambda temporary: save_array(temporary, codes))
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


def summarize(scores: pd.DataFrame) -> dict[str, float | int]:
    """The headline and what stands beside it: macro_dice with its n structures, subjects, and detection counts."""
    mean, structures = metrics.macro_dice(scores)
    counts = scores["detection"].value_counts()
    return {
        "macro_dice": mean,
        "structures": structures,
        "subjects": int(scores["subject"].nunique()),
        "found": int(counts.get("found", 0)),
        "missed": int(counts.get("missed", 0)),
        "false_alarms": int(counts.get("false alarm", 0)),
        "correctly_absent": int(counts.get("correctly absent", 0)),
    }
