"""A mask file a structure, as in the TotalSegmentator data sets: `segmentations/<structure>.nii.gz`, > 0 is inside."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np

from segkit.codes import CodeVolume, encode_places, places_inside
from segkit.errors import Findings, SegkitError, SubjectError
from segkit.formats import LabelSource
from segkit.formats.gunzip import payload
from segkit.formats.nifti import Grid, Volume, nifti_files, offset_mm, open_volume, read_file, stem
from segkit.formats.nifti_writing import file_planes, write_nifti
from segkit.labels import check_name

NOTHING = np.zeros(0, np.intp)


@dataclass(frozen=True)
class MaskFiles(LabelSource):
    """Structure -> file, sorted by name. An empty mask was looked for and is not there."""

    masks: Mapping[str, Path]

    @property
    def structures(self) -> tuple[str, ...]:
        return tuple(self.masks)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.masks.values())

    def read(self, grid: Grid, findings: Findings) -> CodeVolume:
        return encode_places(self._usable_masks(grid, findings), grid.shape, order="F")

    def _usable_masks(self, grid: Grid, findings: Findings) -> Iterator[tuple[str, np.ndarray]]:
        """Each mask with its places inside; what cannot be used is left out and goes into `findings`."""
        offsets: dict[str, float] = {}
        empty = None  # what an empty mask on the CT's very grid looks like: most files are such, and the same
        for name, path in self.masks.items():
            found_before = len(findings)
            try:
                content = read_file(path, findings.subject)
                if empty is not None and payload(content) == empty:
                    yield name, NOTHING
                    continue
                volume = open_volume(path, findings.subject, content)
                offset = offset_mm(volume.grid, grid, path, findings, name)
                inside = None if offset is None else _places(volume, path, findings, name)
            except SubjectError as error:
                findings.add("error", "unreadable", error, name)
                continue
            if inside is None:
                continue
            if offset:
                offsets[name] = offset
            elif not inside.size and len(findings) == found_before:
                empty = payload(content)
            yield name, inside
        _report_offsets(offsets, self.masks, findings)


def _report_offsets(offsets: Mapping[str, float], masks: Mapping[str, Path], findings: Findings) -> None:
    """One finding for all masks that lie a little beside the CT: it is mostly all of a subject."""
    if offsets:
        worst = max(offsets, key=offsets.__getitem__)
        others = f" ({len(offsets) - 1} other masks up to as far)" if len(offsets) > 1 else ""
        text = f"{masks[worst]}: lies {offsets[worst]:.3f} mm beside the CT's grid{others}; taken as the same grid"
        findings.add("warning", "offset", text, "" if others else worst, offsets[worst])


def _places(volume: Volume, path: Path, findings: Findings, name: str) -> np.ndarray | None:
    """Where a mask is above 0, in the order of the file; None for one with NaN. Reports that, and unusual values."""
    places, unusual, wrong, below, start = [], set(), 0, False, 0
    for piece in volume.pieces():
        inside = places_inside(piece)
        if inside.size:
            values = piece[inside]
            if not (values == 1).all():
                unusual.update(np.unique(values).tolist())
            places.append(inside + start)
        if piece.dtype.kind == "f":
            wrong += int(np.count_nonzero(~np.isfinite(piece)))
        below = below or (piece.dtype.kind in "if" and bool((piece < 0).any()))
        start += piece.size
    if wrong:
        findings.add("error", "NaN", f"{path}: {wrong} voxels are NaN or infinite, expected a mask", name, wrong)
        return None
    if unusual or below:
        shown = [f"{value:g}" for value in sorted(unusual)[:5]] + ["values below 0"] * below
        text = f"{path}: expected 0 and 1, found {', '.join(shown)}; everything above 0 is taken as inside"
        findings.add("warning", "not binary", text, name)
    return np.concatenate(places) if places else NOTHING


def find_mask_files(folder: Path, subject: str) -> MaskFiles:
    """The masks in a `segmentations` folder. Raises SubjectError for a name that cannot be used or comes twice."""
    masks: dict[str, Path] = {}
    for path in nifti_files(folder):
        try:
            name = check_name(stem(path))
        except SegkitError as error:
            raise SubjectError(f"subject {subject}: {path}: {error}") from error
        if name in masks:
            raise SubjectError(f"subject {subject}: {masks[name]} and {path.name} are masks of the same structure")
        masks[name] = path
    if not masks:
        raise SubjectError(f"subject {subject}: {folder} holds no <structure>.nii.gz")
    return MaskFiles(dict(sorted(masks.items())))


def write_mask_files(folder: Path, volume: CodeVolume, grid: Grid) -> None:
    """Write a mask a structure into `folder`, uint8 0 and 1, from codes (z, y, x) on the canonical axes of `grid`.

    Each structure that was looked for gets its file: an empty one says that it is not there. Raises SegkitError for a
    name that cannot be a file's.
    """
    names = [check_name(name) for name in volume.structures]
    codes = file_planes(volume.codes, grid)
    boxes = volume.with_codes(codes).boxes()

    def write(name: str) -> None:
        planes = _mask_planes(codes, volume.lookup({name: 1}), boxes[name])
        write_nifti(folder / f"{name}.nii.gz", planes, grid, np.dtype(np.uint8))

    with ThreadPoolExecutor() as threads:  # most of the time is compression, which holds no lock
        list(threads.map(write, boxes))
    nothing = [name for name in names if name not in boxes]
    for name in nothing[:1]:
        planes = repeat(np.zeros(codes.shape[1:], np.uint8), len(codes))
        write_nifti(folder / f"{name}.nii.gz", planes, grid, np.dtype(np.uint8))
    for name in nothing[1:]:
        shutil.copyfile(folder / f"{nothing[0]}.nii.gz", folder / f"{name}.nii.gz")


def _mask_planes(codes: np.ndarray, inside: np.ndarray, box: tuple[slice, ...]) -> Iterator[np.ndarray]:
    """The planes of one mask from codes (k, j, i); only its box is looked at. inside: code -> 0 or 1."""
    nothing = np.zeros(codes.shape[1:], np.uint8)
    for k, plane in enumerate(codes):
        if not box[0].start <= k < box[0].stop:
            yield nothing
        else:
            mask = nothing.copy()
            mask[box[1:]] = inside[plane[box[1:]]]
            yield mask
