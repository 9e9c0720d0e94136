"""Of each structure its largest piece: what lies apart from it is most often a mistake.

Not of every structure, see IN_PIECES, and not a piece that touches the border of the scan: outside of the field of view
it may hang together with the largest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from segkit.codes import CodeVolume, CodeWriter, smallest_dtype
from segkit.labels import OFFICIAL

_OF_ONE_PIECE = ("heart", "heart_myocardium", "heart_atrium_left", "heart_ventricle_left", "heart_atrium_right",
                 "heart_ventricle_right", "atrial_appendage_left", "trachea")  # fmt: skip

IN_PIECES: Mapping[str, str] = {
    "kidney_cyst_left": "as many as there are",
    "kidney_cyst_right": "as many as there are",
    "costal_cartilages": "ten on each side",
    "skull": "many bones, thin ones between them",
    "sternum": "three bones with cartilage between them",
    "thyroid_gland": "two lobes, the bridge between them is thin or missing",
    "adrenal_gland_left": "limbs of a voxel or two",
    "adrenal_gland_right": "limbs of a voxel or two",
    "esophagus": "collapsed in places to less than a voxel",
    "duodenum": "collapsed in places to less than a voxel",
    "small_bowel": "loops; collapsed in places to less than a voxel",
    "colon": "loops; collapsed in places to less than a voxel",
    **{
        name: reason
        for group, reason in {
            "ribs": "thin, and steep against the slices: gaps of a voxel are common",
            "lungs and airways": "lobes that fluid or collapsed tissue divides",
            "heart and vessels": "vessels with branches, in places narrower than a voxel",
        }.items()
        for name, structure in OFFICIAL.items()
        if structure.group == group and name not in _OF_ONE_PIECE
    },
}
"""The official structures that come in pieces also inside of the field of view, and why: they are left as they are."""


@dataclass(frozen=True)
class _Runs:
    """Voxels of one code in a row along x, R of them in the order of the volume; background is left out.

    first: int64 (R,), place of the first in the flat volume. start, stop: int64 (R,), first and behind the last in a
    volume with an empty voxel behind each row and an empty row behind each slice, so that nothing touches across them.
    codes: int64 (R,). border: bool (R,), whether it touches the border of the scan.
    """

    first: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    codes: np.ndarray
    border: np.ndarray
    steps: tuple[int, ...]  # from a run to the four rows before its own that are beside it

    def of(self, those: np.ndarray) -> _Runs:
        """Some of them, given by their places, rising."""
        first, start, stop, codes, border = (
            values[those] for values in (self.first, self.start, self.stop, self.codes, self.border)
        )
        return _Runs(first, start, stop, codes, border, self.steps)


def keep_largest(volume: CodeVolume, best: np.ndarray) -> tuple[CodeVolume, np.ndarray]:
    """Codes and best structures (`inference.Segmentation`) (z, y, x) without what is not of the largest piece.

    Only official structures that are not IN_PIECES. Pieces touch by faces, edges or corners (26 neighbours); the
    largest has the most voxels, the first in the volume of equal ones; pieces at the border of the scan stay too.
    Structures that overlap keep their own voxels. Where the best structure was taken away, the first of those that are
    left becomes the best.
    """
    runs = _find_runs(volume.codes)
    writer = CodeWriter(volume.structures)
    for row in volume.codebook[1:]:
        writer.code(row)
    codes = runs.codes.copy()
    for column, name in enumerate(volume.structures):
        if name in OFFICIAL and name not in IN_PIECES:
            those = np.flatnonzero(volume.codebook[runs.codes, column])
            apart = those[_apart(runs.of(those))] if len(those) else those
            without = np.zeros(len(writer.rows), np.int64)
            for code in np.unique(codes[apart]).tolist():
                row = writer.rows[code].copy()
                row[column] = False
                without[code] = writer.code(row)
            codes[apart] = without[codes[apart]]
    return _rewritten(volume, best, runs, codes, writer)


def _rewritten(
    volume: CodeVolume, best: np.ndarray, runs: _Runs, codes: np.ndarray, writer: CodeWriter
) -> tuple[CodeVolume, np.ndarray]:
    """The volume and the best structures with new codes for the runs, in arrays of their own."""
    length = runs.stop - runs.start
    voxels = np.bincount(codes, length, len(writer.rows)).astype(np.int64)
    voxels[0] += volume.codes.size - length.sum()
    changed = np.flatnonzero(codes != runs.codes)
    inside = np.repeat(runs.first[changed] - np.cumsum(length[changed]) + length[changed], length[changed])
    inside += np.arange(len(inside))
    now = np.repeat(codes[changed], length[changed])
    written = volume.codes.astype(smallest_dtype(len(writer.rows)))
    written.reshape(-1)[inside] = now
    table = np.array(writer.rows)
    first_left = np.where(table.any(1), table.argmax(1) + 1, 0)
    new_best = best.copy()
    before = best.reshape(-1)[inside].astype(np.int64)
    stays = (before > 0) & table[now, before - 1]
    new_best.reshape(-1)[inside] = np.where(stays, before, first_left[now])
    return writer.finish(written, voxels), new_best


def _find_runs(codes: np.ndarray) -> _Runs:
    depth, height, width = codes.shape
    firsts, lengths, values = [], [], []
    for z, plane in enumerate(codes):  # a slice at a time: what is looked through stays near the processor
        breaks = np.ones((height, width), bool)
        np.not_equal(plane[:, 1:], plane[:, :-1], out=breaks[:, 1:])
        at = np.flatnonzero(breaks)
        code = plane.reshape(-1)[at]
        inside = code != 0
        firsts.append(at[inside] + z * plane.size)
        lengths.append(np.diff(at, append=plane.size)[inside])
        values.append(code[inside].astype(np.int64))
    first, length = np.concatenate(firsts), np.concatenate(lengths)
    row, x = np.divmod(first, width)
    layer_of, y = np.divmod(row, height)
    at_ends = (layer_of == 0) | (layer_of == depth - 1)
    border = (x == 0) | (x + length == width) | (y == 0) | (y == height - 1) | at_ends
    line, layer = width + 1, (height + 1) * (width + 1)
    start = layer_of * layer + y * line + x
    steps = (-line, -layer - line, -layer, -layer + line)
    return _Runs(first, start, start + length, np.concatenate(values), border, steps)


def _apart(runs: _Runs) -> np.ndarray:
    """Which of a structure's runs, bool (R,), are neither of its largest piece nor of one at the border."""
    # runs that follow each other in a row, with different codes, are one
    first = np.append(True, runs.stop[:-1] != runs.start[1:])
    start, stop = runs.start[first], runs.stop[np.append(first[1:], True)]
    number, pairs = np.arange(len(start)), []
    for step in runs.steps:
        # runs [a, b) and [c, d) of rows beside each other touch, corners included, where c <= b and a <= d
        low = np.searchsorted(stop, start + step, side="left")
        count = np.searchsorted(start, stop + step, side="right") - low
        offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        pairs.append((np.repeat(number, count), np.repeat(low, count) + offset))
    one, other = (np.concatenate(side) for side in zip(*pairs, strict=True))
    links = coo_array((np.ones(len(one), bool), (one, other)), (len(number), len(number)))
    _, piece = connected_components(links, directed=False)
    size, piece = np.bincount(piece, stop - start), piece[np.cumsum(first) - 1]
    stays = np.bincount(piece, runs.border) > 0
    stays[size.argmax()] = True
    return ~stays[piece]
