"""One file a subject in which every structure has a number, with names from inside it or from a JSON file beside it.

Names inside are TotalSegmentator's way (https://github.com/wasserth/TotalSegmentator): the first extension of the
NIfTI header holds XML with a LabelTable, of which each Label has the number as its Key and the name as its text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from segkit.codes import CodeVolume, CodeWriter, smallest_dtype
from segkit.errors import Findings, SegkitError, SubjectError
from segkit.formats import LabelSource
from segkit.formats.nifti import Grid, nifti_files, offset_mm, read_header, read_volume, stem
from segkit.labels import safe_name
from segkit.untrusted import read_json

BACKGROUND = "background"
MOST_NUMBERS = 1 << 20  # between the lowest and the highest: beyond, it is no label image
LARGEST_NUMBER = 1 << 31  # of either sign


@dataclass(frozen=True)
class LabelImage(LabelSource):
    """A file of numbers, and the numbers of each structure; 0 is background.

    A structure may have several numbers and a number several structures (nnU-Net's regions). Voxels of `ignored`
    numbers were not annotated for any structure: a subject that holds one cannot be used.
    """

    path: Path
    numbers: Mapping[str, tuple[int, ...]]  # structure -> its numbers, sorted by name
    named_by: tuple[Path, ...] = ()  # other files from which the names come
    ignored: int | None = None

    @property
    def structures(self) -> tuple[str, ...]:
        return tuple(self.numbers)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path, *self.named_by)

    def read(self, grid: Grid, findings: Findings) -> CodeVolume:
        nothing = CodeVolume(np.zeros(grid.shape, np.uint8), np.zeros((1, len(self.numbers)), bool), self.structures)
        try:
            volume, own_grid = read_volume(self.path, findings.subject)
        except SubjectError as error:
            findings.add("error", "unreadable", error)
            return nothing
        offset = offset_mm(own_grid, grid, self.path, findings)
        if offset is None:
            return nothing
        if offset:
            text = f"{self.path}: lies {offset:.3f} mm beside the CT's grid; taken as the same grid"
            findings.add("warning", "offset", text, value=offset)
        if volume.dtype.kind == "f":
            whole = np.rint(volume)
            if not np.isfinite(whole).all() or not np.array_equal(whole, volume):
                findings.add("error", "no label image", f"{self.path}: expected a whole number a voxel")
                return nothing
            volume = whole
        lowest, highest = int(volume.min()), int(volume.max())
        if highest - lowest >= MOST_NUMBERS or max(-lowest, highest) > LARGEST_NUMBER:
            findings.add("error", "no label image", f"{self.path}: holds numbers from {lowest} to {highest}")
            return nothing
        return self._encode(volume, lowest, highest, findings)

    def _encode(self, volume: np.ndarray, lowest: int, highest: int, findings: Findings) -> CodeVolume:
        writer = CodeWriter(self.structures)
        voxels = np.zeros(highest - lowest + 1, np.int64)
        for piece in np.moveaxis(volume, -1, 0):  # by slices: counting needs 8 bytes a voxel
            voxels += np.bincount((piece.astype(np.int64) - lowest).ravel(), minlength=len(voxels))
        code_of = np.zeros(len(voxels), np.uint32)
        for value in (np.flatnonzero(voxels) + lowest).tolist():
            count = voxels[value - lowest]
            members = np.array([value in numbers for numbers in self.numbers.values()])
            if value == self.ignored:
                findings.add(
                    "error", "ignored voxels",
                    f"{self.path}: {count} voxels hold {value}, which means that nobody annotated them: a structure is "
                    "annotated in the whole scan or not at all",
                )  # fmt: skip
            elif members.any():
                code_of[value - lowest] = writer.code(members)
            elif value != 0:
                findings.add(
                    "error", "unnamed label",
                    f"{self.path}: {count} voxels hold {value}, which no name stands for; named are "
                    f"{sorted({n for numbers in self.numbers.values() for n in numbers})[:12]}: complete the names",
                )  # fmt: skip
        codes = np.empty(volume.shape, smallest_dtype(len(writer.rows)), order="F")
        for k in range(volume.shape[-1]):
            codes[..., k] = code_of[volume[..., k].astype(np.int64) - lowest]
        return writer.finish(codes)


def find_label_image(folder: Path, ct: Path, subject: str, shared_names: Path) -> LabelImage:
    """The label image beside `ct`: the one other NIfTI file of the folder.

    Names come from the file itself, else from a JSON file of its name beside it, else from `shared_names`, a JSON file
    for the whole data set. Raises SubjectError where there is no label image, more than one, or no names.
    """
    others = [path for path in nifti_files(folder) if path != ct]
    if len(others) != 1:
        found = ", ".join(path.name for path in others) or "none"
        raise SubjectError(
            f"subject {subject}: {folder}: expected segmentations/<structure>.nii.gz or one label image beside the CT, "
            f"found {found}"
        )
    [path] = others
    where = f"subject {subject}: {path}"
    inside = embedded_names(path, subject)
    if inside:
        return LabelImage(path, numbers_of(inside.items(), where))
    for names in (path.with_name(f"{stem(path)}.json"), shared_names):
        if names.is_file():
            return LabelImage(path, read_names(names), (names,))
    raise SubjectError(
        f"{where}: nothing names its numbers: expected a label table in its header, or {stem(path)}.json beside it or "
        f'{shared_names} with {{"1": "liver", ...}}'
    )


def embedded_names(path: Path, subject: str) -> dict[str, int]:
    """Structure -> number from the label table in a NIfTI header; empty where there is none.

    Raises SubjectError for a file that cannot be read and for a table that is damaged.
    """
    for extension in read_header(path, subject).extensions:
        content = bytes(extension.get_content() if isinstance(extension.get_content(), bytes) else b"").strip(b"\0 \n")
        if b"<LabelTable" not in content:
            continue
        try:
            if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
                raise ElementTree.ParseError("declares entities, which a label table never needs")
            labels = ElementTree.fromstring(content).iter("Label")
            names = {(label.text or "").strip(): int(label.attrib["Key"]) for label in labels}
        except (ElementTree.ParseError, KeyError, ValueError) as error:
            raise SubjectError(f"subject {subject}: {path}: damaged label table ({error})") from error
        return names
    return {}


def read_names(path: Path) -> dict[str, tuple[int, ...]]:
    """Structure -> numbers from a JSON file: {"1": "liver"}, {"liver": 1} or {"liver": [1, 2]}, or these as "labels".

    Raises SegkitError that names the file for anything else.
    """
    content = read_json(path, "write the names again")
    table = content.get("labels", content) if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise SegkitError(f'{path}: expected names and numbers like {{"liver": 1}}, found {str(content)[:60]}')
    if all(isinstance(value, str) for value in table.values()):
        table = {name: key for key, name in table.items()}
        if len(table) < len(content.get("labels", content)):
            raise SegkitError(f"{path}: two numbers have the same name")
    return numbers_of(table.items(), str(path))


def numbers_of(table: Iterable[tuple[str, Any]], source: str) -> dict[str, tuple[int, ...]]:
    """Structure -> numbers, sorted by name, without background, with names that can be used.

    Spaces and other characters that a file name should not hold become `_`. Raises SegkitError that names `source` for
    a number that is none, a name that cannot be used, and for two names that become one.
    """
    numbers: dict[str, tuple[int, ...]] = {}
    for name, value in table:
        try:
            values = tuple(sorted({_whole(v) for v in (value if isinstance(value, list) else [value])}))
        except (TypeError, ValueError, OverflowError):
            raise SegkitError(
                f"{source}: {str(name)[:60]!r} has {str(value)[:60]!r}, expected a whole number"
            ) from None
        if not values:
            raise SegkitError(f"{source}: {str(name)[:60]!r} has no number")
        if values == (0,) or name.lower() == BACKGROUND:
            continue
        try:
            safe = safe_name(name)
        except SegkitError as error:
            raise SegkitError(f"{source}: {error}") from error
        if safe in numbers or 0 in values:
            raise SegkitError(f"{source}: {safe!r} comes twice" if safe in numbers else f"{source}: {safe!r} has 0")
        numbers[safe] = values
    if not numbers:
        raise SegkitError(f"{source}: names no structure")
    return dict(sorted(numbers.items()))


def _whole(value: Any) -> int:
    """A number or its digits. ValueError, TypeError or OverflowError for what would have to be rounded to be one."""
    number = int(value)
    if isinstance(value, bool) or (isinstance(value, float) and number != value):
        raise ValueError(value)
    return number
