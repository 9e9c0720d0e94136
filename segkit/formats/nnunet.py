"""nnU-Net's raw data folders: imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, dataset.json.

Format: https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md (and nnU-Net 1, whose labels are
written the other way round). A folder imagesTs with labelsTs holds test cases; without it, scans to be segmented.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from segkit.errors import SegkitError
from segkit.formats.label_image import LabelImage, numbers_of
from segkit.formats.nifti import ENDINGS
from segkit.untrusted import read_json

_SPLITS = (("Tr", None), ("Ts", "test"))


@dataclass(frozen=True)
class Case:
    """One case: its CT and its labels, and "test" for those in imagesTs."""

    name: str
    ct: Path
    labels: LabelImage | None  # None: there is no label file
    split: str | None


def is_nnunet_folder(folder: Path) -> bool:
    """Whether a folder is nnU-Net raw data: `dataset.json` beside `imagesTr`."""
    return (folder / "dataset.json").is_file() and (folder / "imagesTr").is_dir()


def find_cases(folder: Path) -> Iterator[Case]:
    """The cases of a raw data folder. Raises SegkitError for a `dataset.json` that does not say what is needed."""
    path = folder / "dataset.json"
    content = read_json(path, "write it as nnU-Net needs it")
    try:
        ending = content.get("file_ending", ".nii.gz")
        channels = content.get("channel_names", content.get("modality"))
        labels = {**content["labels"]}
        channels = {int(number): str(name) for number, name in channels.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SegkitError(
            f"{path}: expected channel_names, labels and file_ending, as nnU-Net needs ({error!r})"
        ) from None
    if ending not in ENDINGS:
        raise SegkitError(f"{path}: file_ending {ending!r}: expected one of {', '.join(ENDINGS)}; convert the images")
    if all(isinstance(name, str) for name in labels.values()):  # nnU-Net 1: number -> name
        labels = {name: number for number, name in labels.items()}
    ignored = labels.pop("ignore", None)
    if ignored is not None and type(ignored) is not int:
        raise SegkitError(f"{path}: ignore has {str(ignored)[:60]!r}, expected a whole number")
    numbers = numbers_of(labels.items(), str(path))
    channel = _ct_channel(channels, path)
    for part, split in _SPLITS:
        if split == "test" and not (folder / f"labels{part}").is_dir():
            continue
        for image in sorted((folder / f"images{part}").glob(f"[!.]*_{channel:04d}{ending}")):
            name = image.name.removesuffix(f"_{channel:04d}{ending}")
            label = folder / f"labels{part}" / f"{name}{ending}"
            source = LabelImage(label, numbers, (path,), ignored) if label.is_file() else None
            yield Case(name, image, source, split)


def _ct_channel(channels: dict[int, str], path: Path) -> int:
    named = [number for number, name in channels.items() if name.upper() == "CT"]
    if len(channels) == 1:
        return next(iter(channels))
    if len(named) != 1:
        raise SegkitError(f"{path}: expected one channel called CT, found {channels}")
    return named[0]
