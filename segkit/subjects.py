"""Find the subjects of a data set, and choose among them."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from segkit.errors import Finding, SegkitError, SubjectError, printable
from segkit.formats import LabelSource
from segkit.formats.label_image import find_label_image
from segkit.formats.mask_files import MaskFiles, find_mask_files
from segkit.formats.nifti import ENDINGS
from segkit.formats.nnunet import Case, find_cases, is_nnunet_folder
from segkit.labels import check_name
from segkit.splits import SPLITS
from segkit.untrusted import read_file

_LAYOUT = (
    "expected folders like s0000/ with ct.nii.gz and segmentations/<structure>.nii.gz inside, or nnU-Net's imagesTr, "
    "labelsTr and dataset.json"
)


@dataclass(frozen=True)
class Subject:
    """One subject on disk: its CT, its labels, and the split that the data set gives it, if any."""

    name: str
    data_dir: Path  # the folder of the whole data set
    ct: Path
    labels: LabelSource
    split: str | None = None  # one of SPLITS

    @property
    def structures(self) -> tuple[str, ...]:
        """The annotated structures, sorted."""
        return self.labels.structures

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that is read for this subject."""
        return (self.ct, *self.labels.files)


def find_subjects(data_dir: str | Path) -> tuple[list[Subject], list[Finding]]:
    """The usable subjects of a data set, sorted by name, and what keeps others from being usable.

    A data set is a folder of subject folders (`sXXXX/ct.nii.gz` with `segmentations/<structure>.nii.gz`, or with one
    label image, see `segkit.formats.label_image`) or an nnU-Net raw folder. Raises SegkitError if the path is no folder
    or holds no subject at all, and for an unreadable `meta.csv` or `dataset.json`.
    """
    if not Path(data_dir).is_dir():
        what = "is a file" if Path(data_dir).exists() else "no such folder"
        raise SegkitError(f"{data_dir}: {what}; set DATA_DIR to the folder that holds the subjects")
    data_dir = Path(data_dir).absolute()  # workers may have another working directory
    try:
        return _find(data_dir)
    except OSError as error:
        raise SegkitError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _find(data_dir: Path) -> tuple[list[Subject], list[Finding]]:
    """`find_subjects` of a folder that is there. OSError for one that cannot be looked into."""
    candidates = _nnunet_cases(data_dir) if is_nnunet_folder(data_dir) else _subject_folders(data_dir)
    subjects: dict[str, Subject] = {}
    problems: list[Finding] = []
    for name, open_subject in candidates:
        try:
            if check_name(name) in subjects:
                raise SubjectError(f"{subjects[name].ct} and {data_dir / 'imagesTs'} have the same name")
            subjects[name] = open_subject()
            problems += _unread_files(subjects[name])
        except SegkitError as error:
            problems.append(_layout(name, error))
        except OSError as error:
            problems.append(_layout(name, f"{error.filename}: cannot be read ({error.strerror})"))
    if not subjects:
        found = "; ".join(map(str, problems[:3])) or _what_is_there(data_dir)
        raise SegkitError(f"{data_dir}: no subjects: {_LAYOUT}; found {found}")
    return [subjects[name] for name in sorted(subjects)], problems


def _layout(name: str, message: object) -> Finding:
    text = str(message)
    return Finding(name, "error", "layout", text if text.startswith("subject ") else f"subject {name}: {text}")


def _subject_folders(data_dir: Path) -> Iterator[tuple[str, Callable[[], Subject]]]:
    meta_split = read_meta_split(data_dir)
    for folder in sorted(path for path in data_dir.iterdir() if not path.name.startswith(".")):
        if _may_be_subject(folder):
            yield folder.name, partial(_open_folder, folder, meta_split.get(folder.name))


def _may_be_subject(folder: Path) -> bool:
    try:
        names = {path.name for path in folder.iterdir()}
    except PermissionError:
        return True  # opening it says why that is not known
    except OSError:  # no folder
        return False
    return not names.isdisjoint(["segmentations", *(f"ct{ending}" for ending in ENDINGS)])


def _cts(folder: Path) -> list[Path]:
    return [folder / f"ct{ending}" for ending in ENDINGS if (folder / f"ct{ending}").is_file()]


def _open_folder(folder: Path, split: str | None) -> Subject:
    cts = _cts(folder)
    if len(cts) != 1:
        found = "ct.nii.gz is missing" if not cts else "ct.nii.gz and ct.nii are both there: keep one"
        raise SubjectError(f"subject {folder.name}: {folder}: {found}")
    labels: LabelSource
    if (folder / "segmentations").is_dir():
        labels = find_mask_files(folder / "segmentations", folder.name)
    else:
        labels = find_label_image(folder, cts[0], folder.name, folder.parent / "labels.json")
    return Subject(folder.name, folder.parent, cts[0], labels, split)


def _nnunet_cases(data_dir: Path) -> Iterator[tuple[str, Callable[[], Subject]]]:
    for case in find_cases(data_dir):
        yield case.name, partial(_open_case, data_dir, case)


def _open_case(data_dir: Path, case: Case) -> Subject:
    if case.labels is None:
        raise SubjectError(f"subject {case.name}: {case.ct}: has no label file")
    return Subject(case.name, data_dir, case.ct, case.labels, case.split)


def _unread_files(subject: Subject) -> list[Finding]:
    """What else lies among the masks: its structure is not annotated then."""
    folder = subject.ct.parent / "segmentations"
    if not isinstance(subject.labels, MaskFiles):
        return []
    others = sorted({path for path in folder.glob("[!.]*") if path.is_file()} - set(subject.labels.files))
    text = "is no NIfTI file by its name; a structure of that name counts as not annotated"
    return [
        Finding(subject.name, "warning", "layout", f"subject {subject.name}: {path}: {text}", path.name)
        for path in others
    ]


def _what_is_there(data_dir: Path) -> str:
    if (data_dir / "ct.nii.gz").is_file():
        return f"one subject itself: give its parent folder, {data_dir.parent}"
    inside = [path for path in sorted(data_dir.iterdir()) if path.is_dir()]
    for folder in inside:
        if any((sub / "ct.nii.gz").is_file() for sub in folder.iterdir() if sub.is_dir()):
            return f"subjects one level down: give {folder}"
    return f"{len(inside)} folders, none of them with a ct.nii.gz"


def read_meta_split(data_dir: str | Path) -> dict[str, str]:
    """Subject -> "train", "val" or "test" from the data set's `meta.csv`; empty where there is none.

    The file is separated by `;` and starts with a byte-order mark. Raises SegkitError if it lacks the two columns,
    names another split or gives a subject two, and if it cannot be read.
    """
    path = Path(data_dir) / "meta.csv"
    if not path.exists() and not path.is_symlink():  # a link to nothing is no data set without a table
        return {}
    try:
        lines = io.StringIO(read_file(path).decode("utf-8-sig"), newline="")
        reader = csv.DictReader(lines, delimiter=";")
        if not {"image_id", "split"} <= set(reader.fieldnames or ()):
            found = str(reader.fieldnames)[:200]
            raise SegkitError(f"{path}: expected columns image_id and split, separated by ';', found {found}")
        rows = [((row["image_id"] or "").strip(), (row["split"] or "").strip().lower()) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SegkitError(f"{path}: not readable as CSV ({error})") from error
    unknown = sorted({split for _, split in rows} - {*SPLITS, ""})
    if unknown:
        found = printable(", ".join(unknown[:5]))[:200]
        raise SegkitError(f"{path}: expected the splits {', '.join(SPLITS)} or none, found {found}")
    given: dict[str, str] = {}
    for name, split in rows:
        if split and given.setdefault(name, split) != split:
            raise SegkitError(f"{path}: {name[:60]!r} is in two splits, {given[name]} and {split}; keep one of them")
    return given


def select_subjects(
    subjects: Sequence[Subject],
    exclude: Sequence[str] = (),
    max_subjects: int | None = None,
    seed: int = 0,
) -> list[Subject]:
    """Leave out `exclude`, then keep at most `max_subjects`: a seeded draw that keeps each split's share.

    From three subjects on, every split that the data set names keeps at least one. Raises SegkitError for a name in
    `exclude` that does not exist, for a maximum below one and if nothing is left.
    """
    unknown = sorted(set(exclude) - {subject.name for subject in subjects})
    if unknown:
        raise SegkitError(f"EXCLUDE names {', '.join(unknown[:5])}, which the data set does not have")
    kept = [subject for subject in subjects if subject.name not in set(exclude)]
    if not kept:
        raise SegkitError("EXCLUDE leaves no subject")
    if max_subjects is None or max_subjects >= len(kept):
        return kept
    if max_subjects < 1:
        raise SegkitError(f"MAX_SUBJECTS = {max_subjects}: expected 1 or more, or None for all")
    drawn = kept[:]
    random.Random(f"{seed} select").shuffle(drawn)
    groups = {split: [s for s in drawn if (s.split or "train") == split] for split in SPLITS}
    # taking the least served split first gives each its share and its first subject early
    taken: list[Subject] = []
    shares = {split: 0 for split in SPLITS if groups[split]}
    while len(taken) < max_subjects:
        split = min(shares, key=lambda name: (shares[name] + 0.5 if shares[name] else 0) / len(groups[name]))
        if shares[split] < len(groups[split]):
            taken.append(groups[split][shares[split]])
            shares[split] += 1
        else:
            del shares[split]
    return sorted(taken, key=lambda subject: subject.name)
