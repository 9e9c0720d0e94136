"""A data folder made ready in one call: found, chosen, staged, with label map and split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from segkit.errors import Finding, SegkitError, SubjectError
from segkit.labels import group_of, load_label_map, make_label_map
from segkit.locks import alone
from segkit.phantom import write_phantoms
from segkit.runs import discard, left_behind, lock_of, make_folder, write_whole_folder
from segkit.seen import Learned, RunSplit, learned_by, read_split, without_copies, without_seen, without_seen_by_name
from segkit.splits import SPLITS, Part, Split, make_split
from segkit.staging import StagedSubject, stage, structures_in
from segkit.subjects import find_subjects, select_subjects


@dataclass(frozen=True)
class Data:
    """Staged subjects by name, which parts train, validate and test, structure -> channel, and what was left out."""

    folder: Path
    staged: dict[str, StagedSubject]
    split: Split
    label_map: dict[str, int]
    problems: list[Finding]

    def overview(self) -> pd.DataFrame:
        """A row a subject: its splits, slices, spacing, orientation of the files, structures, and notes of staging."""
        rows = {}
        for name, subject in self.staged.items():
            splits = [split for split in SPLITS if name in {part.subject for part in getattr(self.split, split)}]
            rows[name] = {
                "split": " + ".join(splits),
                "slices": subject.shape[0],
                "spacing_mm": " x ".join(f"{size:.3g}" for size in subject.spacing_mm[::-1]),
                "orientation": subject.grid.orientation,
                "annotated": len(subject.structures),
                "present": sum(count > 0 for count in subject.voxels.values()),
                "notes": "; ".join(subject.info["notes"]),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("subject")

    def structures(self) -> pd.DataFrame:
        """A row a structure in the order of the channels: in how many subjects of each split it is, and in how many
        training slices.

        Columns: channel, group, and for train, val and test `<split>_annotated` (subjects with a mask, empty or not)
        and `<split>_present` (subjects that hold it in the split's slices); train_slices. Counted are staged subjects:
        of `open_run` those of the test.
        """
        table = pd.DataFrame({"channel": self.label_map, "group": {name: group_of(name) for name in self.label_map}})
        for split in SPLITS:
            slices = {name: self._slices_with(name, split) for name in self.label_map}
            table[f"{split}_annotated"] = {name: len(counts) for name, counts in slices.items()}
            table[f"{split}_present"] = {name: sum(n > 0 for n in counts) for name, counts in slices.items()}
            if split == "train":
                table["train_slices"] = {name: sum(counts) for name, counts in slices.items()}
        return table.rename_axis("structure")

    def _slices_with(self, structure: str, split: str) -> list[int]:
        """Of each subject of a split that annotates a structure, the number of the split's slices that hold it."""
        counts = []
        for part in getattr(self.split, split):
            subject = self.staged.get(part.subject)
            runs = None if subject is None else subject.info["slices"].get(structure)
            if subject is not None and runs is not None:
                inside = np.zeros(subject.shape[0], bool)
                for start, stop in runs:
                    inside[start:stop] = True
                counts.append(int(inside[part.slices(len(inside))].sum()))
        return counts

    def learned(self) -> Learned:
        """What is to be known later of a training on these data."""
        used = dict.fromkeys(part.subject for part in (*self.split.train, *self.split.val))
        return Learned(
            {name: subject.info["ct_bytes"] for name, subject in self.staged.items()},
            self.split,
            {name: self.staged[name].checksums for name in used},
        )

    def test_part(self, subject: str | None = None) -> Part:
        """What the test takes of `subject`, of the first test subject by default. SegkitError if it is not one."""
        parts = {part.subject: part for part in self.split.test}
        if subject is not None and subject not in parts:
            raise SegkitError(f"SHOW_SUBJECT = {subject!r} is no test subject; those are {', '.join(list(parts)[:8])}")
        return self.split.test[0] if subject is None else parts[subject]


def phantoms_in(
    output_dir: str | Path, subjects: int = 16, seed: int = 0, detail: float = 1.0, jobs: int = 1, progress: bool = True
) -> Path:
    """A phantom data set under `output_dir`, made if it is not there: the data of a run with DATA_DIR = None.

    The folder's name says what is in it, so that another number, seed or detail makes another one. It appears complete
    or not at all.
    """
    folder = Path(output_dir) / f"phantoms_{subjects}_seed{seed}{'' if detail == 1 else f'_detail{detail:g}'}"
    if folder.is_dir():
        return folder
    taken = f"{folder.parent}: another process makes these phantoms, waiting until it is done"
    make_folder(folder.parent)
    with alone(lock_of(folder), taken, wait=True):
        for path, name in left_behind(folder.parent):
            if name == folder.name:
                discard(path)
        if not folder.is_dir():
            with tqdm(total=subjects, desc="phantoms", unit="subject", disable=not progress) as bar:
                write_whole_folder(
                    folder,
                    lambda draft: write_phantoms(
                        draft, subjects, seed, detail=detail, progress=lambda *_: bar.update(), jobs=jobs
                    ),
                )
    return folder


def open_data(
    data_dir: str | Path,
    stage_dir: str | Path,
    max_subjects: int | None = None,
    exclude: Sequence[str] = (),
    structures: Sequence[str] | None = None,
    seed: int = 0,
    jobs: int | None = 1,
    progress: bool = True,
    strict: bool = False,
) -> Data:
    """Find, choose and stage the subjects of `data_dir`, discover the label map and make the split.

    max_subjects, exclude, structures: as MAX_SUBJECTS, EXCLUDE and STRUCTURES of the notebook limit what is used.
    jobs: as in `staging.stage`. Raises SegkitError where the folder, a setting or every subject is unusable; single
    unusable subjects are named in `Data.problems`, or raised as SubjectError with `strict`, unless they are excluded.
    """
    subjects, found = find_subjects(data_dir)
    problems = [problem for problem in found if problem.subject not in exclude]
    errors = [problem for problem in problems if problem.severity == "error"]
    if strict and errors:
        raise SubjectError(errors[0])
    unusable = {problem.subject for problem in found} - {subject.name for subject in subjects}
    chosen = select_subjects(subjects, [name for name in exclude if name not in unusable], max_subjects, seed)
    staged, left_out = stage(chosen, stage_dir, jobs, progress, strict)
    by_name = {subject.name: subject for subject in staged}
    given = {subject.name: subject.split for subject in chosen if subject.split}
    split = make_split({subject.name: subject.shape[0] for subject in staged}, given, seed)
    split, twice = without_copies(split, {subject.name: subject.checksums for subject in staged})
    learnable = structures_in([by_name[part.subject] for part in split.train])
    not_learnable = sorted(set(structures_in(staged)) - set(learnable))
    if not_learnable:
        text = f"no training subject annotates {', '.join(not_learnable)}: they cannot be learned"
        left_out.append(Finding("", "warning", "not learnable", text))
    return Data(Path(data_dir), by_name, split, make_label_map(learnable, structures), problems + left_out + twice)


class Judged(Protocol):
    """What `open_run` asks of a model, such as a `checkpoints.Checkpoint`."""

    @property
    def path(self) -> Path:
        """Its file; in a run's folder split.json lies beside it."""

    @property
    def label_map(self) -> dict[str, int]:
        """Structure -> channel."""


def open_run(
    output_dir: str | Path,
    stage_dir: str | Path,
    data_dir: str | Path | None = None,
    max_subjects: int | None = None,
    jobs: int | None = 1,
    progress: bool = True,
    model: Judged | None = None,
) -> Data:
    """The data of the training run in `output_dir`, with its own label map and split; what the analysis opens.

    `data_dir` may be where these data lie now, or another data set: then the test subjects that it names are taken,
    or all of its subjects. `max_subjects` keeps the first test subjects.

    model: what is to be judged; by default the run's own. The label map is the model's, and test subjects that it was
    trained on or chosen by are left out, with a finding that names them: its own run's split.json lies beside it. Of a
    model without one, as of a shared one, a finding says that this is not known. With a model and `data_dir` there need
    be no run in `output_dir`.

    Raises SegkitError where there is no run, its data are gone, or the model has seen all of its test subjects.
    """
    if max_subjects is not None and max_subjects < 1:
        raise SegkitError(f"MAX_SUBJECTS = {max_subjects}: expected 1 or more, or None for all")
    run = Path(output_dir)
    if model is not None and data_dir is not None and not (run / "split.json").exists():
        of_run = RunSplit(Path(data_dir), Learned({}, Split((), (), (), "")))
    else:
        of_run = read_split(_there(run / "split.json"))
    label_map = load_label_map(_there(run / "label_map.json")) if model is None else model.label_map
    folder = of_run.data_dir if data_dir is None else Path(data_dir)
    subjects, problems = find_subjects(folder)
    ct_bytes, split = {subject.name: subject.ct.stat().st_size for subject in subjects}, of_run.own.split
    # by name and size of the scan, not by folder: training subjects stay training subjects when data move
    if not any(of_run.own.is_same(name, ct_bytes) for name in ct_bytes):
        test = [s.name for s in subjects if s.split == "test"] or [s.name for s in subjects]
        split = Split((), (), tuple(Part(name) for name in test), f"another data set than trained on: {folder}")
    source = (run if model is None else model.path.parent) / "split.json"
    learned = of_run.learned if model is None else learned_by(source)
    split, seen = without_seen_by_name(split, ct_bytes, learned, source)
    gone = sorted({part.subject for part in split.test[:max_subjects]} - {subject.name for subject in subjects})
    if gone:
        raise SegkitError(f"{folder}: test subjects of {run / 'split.json'} are missing: {', '.join(gone[:5])}")
    by_name: dict[str, StagedSubject] = {}
    looked_at: tuple[Part, ...] = ()
    left_out: list[Finding] = []
    seen_content: list[Finding] = []
    unseen = replace(split, test=())
    wanted = len(split.test) if max_subjects is None else max_subjects
    while len(unseen.test) < wanted and len(looked_at) < len(split.test):  # again where the model has seen some
        more = split.test[len(looked_at) :][: wanted - len(unseen.test)]
        names = {part.subject for part in more}
        staged, lost = stage([subject for subject in subjects if subject.name in names], stage_dir, jobs, progress)
        by_name |= {subject.name: subject for subject in staged}
        looked_at, left_out = looked_at + more, left_out + lost
        usable = replace(split, test=tuple(part for part in looked_at if part.subject in by_name))
        checksums = {name: subject.checksums for name, subject in by_name.items()}
        try:
            unseen, seen_content = without_seen(usable, checksums, learned, source)
        except SegkitError:  # all of them; others may follow
            if len(looked_at) == len(split.test):
                raise
    by_name = {part.subject: by_name[part.subject] for part in unseen.test}
    return Data(folder, by_name, unseen, label_map, problems + seen + left_out + seen_content)


def _there(path: Path) -> Path:
    """The path of a run's file. Raises SegkitError where it is not there."""
    if not path.exists():
        raise SegkitError(
            f"{path} is missing: no training run there; train first (train_unet.ipynb, or segkit train), give the "
            "OUTPUT_DIR of a training, or to judge another model its CHECKPOINT and the DATA_DIR of labelled scans"
        )
    return path
