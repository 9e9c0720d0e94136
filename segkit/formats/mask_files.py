"""A mask file a structure, as in the TotalSegmentator data sets: `segmentations/<structure>.nii.gz`, > 0 is inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segkit.codes import CodeVolume, encode_places, places_inside
from segkit.errors import Findings, SegkitError, SubjectError
from segkit.formats.gunzip import payload
from segkit.formats.nifti import Grid, nifti_files, read_file, read_volume, same_grid, stem
from segkit.labels import check_name

NOTHING = np.zeros(0, np.intp)


@dataclass(frozen=True)
class MaskFiles:
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
        empty = None  # what an empty mask on the CT's very grid looks like: most files are such, and the same
        for name, path in self.masks.items():
            found_before = len(findings)
            try:
                content = read_file(path, findings.subject)
                if empty is not None and path.name.endswith(".gz") and payload(content) == empty:
                    yield name, NOTHING
                    continue
                mask, mask_grid = read_volume(path, findings.subject, content)
            except SubjectError as error:
                findings.add("error", "unreadable", error, name)
                continue
            if not same_grid(mask_grid, grid, path, findings, name):
                continue
            if mask.dtype.kind == "f" and not np.isfinite(mask).all():
                findings.add("error", "NaN", f"{path}: holds NaN or infinite values, expected a mask", name)
                continue
            inside = places_inside(mask, order="F")
            _look_at_values(mask, inside, path, findings, name)
            if not inside.size and len(findings) == found_before and path.name.endswith(".gz"):
                empty = payload(content)
            yield name, inside


def _look_at_values(mask: np.ndarray, inside: np.ndarray, path: Path, findings: Findings, name: str) -> None:
    """Report values other than 0 and 1. Looks only at the voxels inside, unless there may be some below 0."""
    values = mask.ravel(order="F")[inside]
    below = mask.dtype.kind in "if" and mask.min() < 0
    if (values == 1).all() and not below:
        return
    shown = [f"{value:g}" for value in np.unique(values)[:5].tolist()] + ["some below 0"] * bool(below)
    findings.add(
        "warning", "not binary", f"{path}: inside it holds {', '.join(shown)}; everything above 0 is taken as 1", name
    )


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
