"""Codes and HU -> a table of the structures of one scan: volume, HU, place."""

from __future__ import annotations

import numpy as np
import pandas as pd

from segkit.codes import CodeVolume
from segkit.formats.nifti import Grid
from segkit.labels import group_of


def measure(volume: CodeVolume, hu: np.ndarray, grid: Grid) -> pd.DataFrame:
    """A row a structure, in their order; codes and hu: (z, y, x) on the canonical axes of `grid`.

    Columns: structure, group; volume_ml, voxels (0 for what was looked for and is not there); mean_hu, sd_hu (of all
    its voxels: divided by n); i_first, i_last, ... k_last (the bounding box, in voxels of the file from 0 on, both
    ends inside); touches_border (the scan ends there, and the structure perhaps goes on). All after voxels are empty
    for an absent structure. A voxel of several structures counts for each.
    """
    voxels, mean, sd = _statistics(volume, hu)
    voxel_ml = abs(np.linalg.det(grid.affine[:3, :3])) / 1000
    boxes = volume.with_codes(grid.from_canonical(volume.codes)).boxes()
    rows = []
    for column, name in enumerate(volume.structures):
        row: dict[str, object] = {"structure": name, "group": group_of(name)}
        row |= {"volume_ml": voxels[column] * voxel_ml, "voxels": int(voxels[column])}
        if name in boxes:
            row |= {"mean_hu": mean[column], "sd_hu": sd[column]} | _place(boxes[name], grid.shape)
        rows.append(row)
    columns = ["structure", "group", "volume_ml", "voxels", "mean_hu", "sd_hu"]
    columns += [f"{axis}_{end}" for axis in "ijk" for end in ("first", "last")]
    table = pd.DataFrame(rows, columns=[*columns, "touches_border"])
    whole = dict.fromkeys(columns[6:], "Int64")  # whole numbers also where some are missing
    return table.astype({**whole, "touches_border": "boolean"})


def _statistics(volume: CodeVolume, hu: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels, mean and standard deviation of HU of each structure, (S,); NaN without a voxel."""
    sums = np.zeros((3, len(volume.codebook)))
    for codes, values in zip(volume.codes, hu, strict=True):  # by slices: counting needs 8 bytes a voxel
        inside = codes != 0
        codes, values = codes[inside], values[inside].astype(float)
        for power, weights in enumerate((None, values, values**2)):
            sums[power] += np.bincount(codes, weights, len(volume.codebook))
    voxels, first, second = sums @ volume.codebook
    mean, square = (
        np.divide(part, voxels, out=np.full(len(voxels), np.nan), where=voxels > 0) for part in (first, second)
    )
    return voxels, mean, np.sqrt(np.maximum(square - mean**2, 0))


def _place(box: tuple[slice, ...], shape: tuple[int, int, int]) -> dict:
    place: dict[str, object] = {}
    for axis, side in zip("ijk", box, strict=True):
        place |= {f"{axis}_first": side.start, f"{axis}_last": side.stop - 1}
    border = any(side.start == 0 or side.stop == size for side, size in zip(box, shape, strict=True))
    return {**place, "touches_border": border}
