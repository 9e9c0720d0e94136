"""What a shared model says of itself: README.md as model hubs read it, YAML in front and Markdown below.

Layout: https://huggingface.co/docs/hub/model-cards. What comes from files is a checked number or name, or stands in
a block of JSON, so that it cannot turn into markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from segkit.checkpoints import Checkpoint
from segkit.choices import MODELS
from segkit.errors import SegkitError
from segkit.labels import GROUPS
from segkit.metrics import MEASURES
from segkit.report import headline
from segkit.splits import SPLITS, Split

TAGS = ("segkit", "ct", "medical-imaging", "segmentation", "not-for-diagnosis")
HUB_LICENCES = (
    "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "apache-2.0", "mit",
)  # fmt: skip
"""Those of https://huggingface.co/docs/hub/repositories-licenses that data come under; others are "other"."""

_LICENCE = re.compile(r"[\w .,:;()/+-]*[^\W_][\w .,:;()/+-]*")


@dataclass(frozen=True)
class Provenance:
    """What a model's card says beside what its checkpoints hold."""

    data_licence: str  # under which its training data are, and so its weights, see `check_licence`
    description: str = ""  # Markdown of the person who shares it
    split: Split | None = None  # of its run; the card only counts the subjects, it does not name them
    scores: str = ""  # of `score_section`


def check_licence(data_licence: str) -> str:
    """One line that names a licence, or SegkitError: no markup, at most 200 characters."""
    if not isinstance(data_licence, str) or len(data_licence) > 200 or not _LICENCE.fullmatch(data_licence):
        raise SegkitError(
            f"DATA_LICENCE = {str(data_licence)[:80]!r}: expected one line that names the licence of the training "
            "data, like 'CC BY 4.0'; letters, digits and '. , : ; ( ) / + -'"
        )
    return data_licence.strip()


def model_card(checkpoints: Sequence[Checkpoint], provenance: Provenance) -> str:
    """The text of README.md for the networks that predict together."""
    sections = (
        _front_matter(provenance.data_licence),
        f"# CT segmentation, {_count(len(checkpoints[0].label_map), 'structure')}",
        provenance.description.strip(),
        _what_it_is(checkpoints),
        "## Intended use",
        "Education and research. **Not for diagnosis**, nor for any decision about a patient: nobody has tested it as "
        "a medical device.",
        "## Data",
        _data(checkpoints, provenance),
        "## Scores",
        provenance.scores
        or "No evaluation came with this model. Measure it on labelled scans of your own before you rely on it.",
        _validation(checkpoints),
        "## Limits",
        _limits(checkpoints[0]),
        "## How to use",
        _usage(checkpoints[0]),
        "## Structures",
        ", ".join(f"`{name}`" for name in checkpoints[0].label_map),
        "## Settings and versions",
        "\n\n".join(_settings(one) for one in checkpoints),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(licence: str) -> str:
    """YAML; its strings are written as JSON, which YAML 1.2 reads alike."""
    identifier = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-.") or "other"
    if identifier in HUB_LICENCES:
        lines = [f"license: {json.dumps(identifier)}"]
    else:
        lines = ['license: "other"', f"license_name: {json.dumps(identifier)}"]
    lines += ['library_name: "segkit"', 'pipeline_tag: "image-segmentation"', "tags:"]
    return "\n".join(["---", *lines, *(f"- {json.dumps(tag)}" for tag in TAGS), "---"])


def _what_it_is(checkpoints: Sequence[Checkpoint]) -> str:
    first = checkpoints[0]
    rows, columns = first.target_shape
    several = f"{len(checkpoints)} networks, whose logits are averaged: each a " if len(checkpoints) > 1 else "A "
    kind = MODELS[first.network.get("model", "unet")].title
    widths = ", ".join(str(int(width)) for width in first.network["features"])
    depth = getattr(first.model, "depth", 1)
    sees = f"slabs of {depth} slices" if depth > 1 else _count(first.network["in_channels"], "slice")
    return (
        f"{several}{kind} (channels of its levels: {widths}) with one output a structure, trained with segkit. It sees "
        f"{sees} at a time, axial, at {rows} x {columns} pixels, and labels CT scans in HU on their own grid."
    )


def _data(checkpoints: Sequence[Checkpoint], provenance: Provenance) -> str:
    licence = provenance.data_licence
    lines = [f"- Licence of the training data: {licence}. The weights are shared under the same terms."]
    lines += [
        f"- Fingerprint (SHA-256 over split, grids and voxels of each structure): `{print_of_data}`"
        for print_of_data in dict.fromkeys(str(one.record.get("data")) for one in checkpoints)
        if re.fullmatch(r"[0-9a-f]{64}", print_of_data)
    ]
    if provenance.split:
        lines.append(f"- {_subjects(provenance.split)}")
    if any(one.record.get("other_weights") for one in checkpoints):
        lines.append("- Training started from the weights of another model, whose data are not in this fingerprint.")
    return "\n".join(lines)


def _subjects(split: Split) -> str:
    train, val, test = (len({part.subject for part in getattr(split, name)}) for name in SPLITS)
    slabs = any(part.slabs for part in split.train)
    tested = " and to test" if split.test_name == "val" else f", {test} to test"
    return f"Subjects: {train} to train, {val} to validate{tested}{', slabs of the same scan' if slabs else ''}."


def _validation(checkpoints: Sequence[Checkpoint]) -> str:
    lines = ["During training (validation subjects; they chose epoch and thresholds):", ""]
    for number, one in enumerate(checkpoints, start=1):
        dice, over = one.scores.get("val_dice"), one.scores.get("val_structures")
        if _is_number(dice) and isinstance(over, int):
            name = f"network {number}, " if len(checkpoints) > 1 else ""
            lines.append(f"- {name}epoch {one.epoch}: mean Dice {dice:.3f} over {_count(over, 'structure')}")
    return "\n".join(lines) if len(lines) > 2 else ""


def _limits(first: Checkpoint) -> str:
    rows, columns = first.target_shape
    return "\n".join(
        (
            "- It finds the structures below and no others. What is not labelled may still be there.",
            "- Scans unlike its training data (scanner, protocol, contrast, age, disease, field of view) may be "
            "labelled worse, and nothing in its output says so.",
            f"- A slice is fitted into {rows} x {columns} pixels before the network sees it: finer detail is lost.",
            "- Left and right depend on the orientation in the scan's file. Where that is wrong, so are the sides.",
        )
    )


def _usage(first: Checkpoint) -> str:
    extras = "share" if first.network.get("model", "unet") == "unet" else "share,monai"
    return f"""```bash
pip install -e '.[{extras}]'     # in a clone of segkit
python -m segkit predict scan.nii.gz --checkpoint FOLDER --out result
```

or in Python, `FOLDER` being the one that holds this file:

```python
from segkit.checkpoints import load_checkpoints
from segkit.inference import Predictor

predictor = Predictor.of(load_checkpoints("FOLDER"))
```"""


def _settings(one: Checkpoint) -> str:
    # no line of this JSON begins with a character of its content, so nothing in it can end the block
    shown = {"network": one.network, "settings": one.settings, "record": one.record}
    return f"```json\n{json.dumps(shown, indent=1)}\n```"


def score_section(path: Path, summary: Mapping) -> str:
    """The scores in an `evaluation_summary_<stamp>.json`, read from `path`, as Markdown.

    Of scores on another data set it is said that they are. Raises SegkitError that names the file where it is no
    summary.
    """
    try:
        for part in (summary["prediction"], summary["reference_through_target_shape"]):
            if not all(value is None or _is_number(value) for value in part.values()):
                raise ValueError("a score that is no number")
        if summary["split"] not in SPLITS:
            raise ValueError(f"split {str(summary['split'])[:40]!r}")
        said = headline(summary)
        rows = [_row(row) for row in summary["means"]["segkit"] if _is_shown(row)]
        found, tolerance = float(summary["found_at_dice"]), float(summary["nsd_tolerance_mm"])
        threshold = None if summary["threshold"] is None else float(summary["threshold"])
        own_data = bool(summary.get("own_data", True))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SegkitError(f"{path}: no summary of an evaluation ({error!r}); evaluate again") from error
    return "\n".join(
        (
            f"On the scans' own grids: {said}",
            "",
            f"Means on the {summary['split']} split, with 95 % intervals over subjects; found means a Dice "
            f"of {found:g} or more, surface Dice is at {tolerance:g} mm.{_circumstances(threshold, own_data)}",
            "",
            "| score | over | mean | 95 % interval | structures | cases |",
            "|---|---|---|---|---|---|",
            *rows,
        )
    )


def _circumstances(threshold: float | None, own_data: bool) -> str:
    """What a reader would otherwise take for granted about scores."""
    said = "" if own_data else " The scans are of another data set than the fingerprint above."
    return said + ("" if threshold is None else f" All structures at a probability of {threshold:g}, not their own.")


def _is_shown(row: Mapping) -> bool:
    """The means over all structures, and of Dice those of each group."""
    return row["mean"] is not None and (
        row["over"] == "structures" or (row["measure"] == "dice" and row["over"] in GROUPS)
    )


def _row(row: Mapping) -> str:
    low, high = row["low"], row["high"]
    sure = "one subject" if low is None or high is None else f"{low:.3f} to {high:.3f}"
    over = "all" if row["over"] == "structures" else row["over"]
    score, n, cases = MEASURES[row["measure"]].title, int(row["n"]), int(row["cases"])
    return f"| {score} | {over} | {row['mean']:.3f} | {sure} | {n} | {cases} |"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
