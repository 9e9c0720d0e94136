"""Masks <-> one volume of small integers with its codebook, without loss.

Code k stands for the set of structures `codebook[k]`: single structures and every overlap that occurs each get a code,
0 is background. One or two bytes a voxel hold what 117 masks say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from segkit.errors import SegkitError
from segkit.labels import check_name

MOST_IN_CODEBOOK = 1 << 28
"""Codes times structures: beyond, a file is damaged. 117 structures of a body have some hundred codes."""

COUNTED_TOGETHER = 1 << 20

Order = Literal["C", "F"]
"""How arrays lie in memory: last axis together, or first, as NIfTI stores them."""


@dataclass(frozen=True)
class CodeVolume:
    """Which structures each voxel belongs to.

    codes: unsigned integers, any shape, each below K. codebook: bool (K, S), row 0 all False. structures: the S names
    that were looked for, in the order of the columns; one without a voxel is absent, one not named was not annotated.
    """

    codes: np.ndarray
    codebook: np.ndarray
    structures: tuple[str, ...]

    def mask(self, structure: str) -> np.ndarray:
        """The mask of one structure: bool, the shape of `codes`. Raises SegkitError for a structure not annotated."""
        return self.codebook[:, self._column(structure)][self.codes]

    def counts(self) -> np.ndarray:
        """Number of voxels of each code, int64 (K,)."""
        return _counts(self.codes, len(self.codebook))

    def voxels(self) -> dict[str, int]:
        """Number of voxels of each structure."""
        counts = self.counts()
        return dict(zip(self.structures, (counts @ self.codebook.astype(np.int64)).tolist(), strict=True))

    def boxes(self) -> dict[str, tuple[slice, ...]]:
        """The bounding box of each structure that has a voxel, a slice an axis."""
        of_codes = ndimage.find_objects(self.codes, max_label=len(self.codebook) - 1)
        found = {}
        for name, members in zip(self.structures, self.codebook[1:].T, strict=True):
            those = [of_codes[code] for code in np.flatnonzero(members) if of_codes[code] is not None]
            if those:
                found[name] = tuple(
                    slice(min(side.start for side in sides), max(side.stop for side in sides))
                    for sides in zip(*those, strict=True)
                )
        return found

    def on_channels(self, label_map: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """The codebook on a model's channels, bool (K, C), and which channels are annotated, bool (C,)."""
        table = np.zeros((len(self.codebook), len(label_map)), bool)
        annotated = np.zeros(len(label_map), bool)
        for column, name in enumerate(self.structures):
            if name in label_map:
                table[:, label_map[name]] = self.codebook[:, column]
                annotated[label_map[name]] = True
        return table, annotated

    def layers(self) -> list[tuple[str, ...]]:
        """The structures in as few groups as come easily, none of which holds two that overlap; in their order."""
        members = self.codebook.astype(np.int64)
        overlap = members.T @ members > 0
        layers: list[list[int]] = []
        for column in range(len(self.structures)):
            free = (layer for layer in layers if not overlap[column, layer].any())
            layer = next(free, None)
            if layer is None:
                layers.append(layer := [])
            layer.append(column)
        return [tuple(self.structures[column] for column in layer) for layer in layers]

    def lookup(self, numbers: Mapping[str, int]) -> np.ndarray:
        """Code -> the number of the one structure of its set that `numbers` names, 0 where there is none: (K,)."""
        table = np.zeros(len(self.codebook), smallest_dtype(max(numbers.values(), default=0) + 1))
        for name, number in numbers.items():
            table[self.codebook[:, self._column(name)]] = number
        return table

    def with_codes(self, codes: np.ndarray) -> CodeVolume:
        """The same codebook over other codes, of any shape: another orientation, others in their place."""
        return CodeVolume(codes, self.codebook, self.structures)

    def at(self, place: int | slice | np.ndarray | Sequence[int] | tuple[slice, ...]) -> CodeVolume:
        """The part of the codes at an index of numpy: a slice, some slices, a box."""
        return self.with_codes(self.codes[place])

    def within(self, slices: Sequence[int]) -> CodeVolume:
        """The volume with background outside of `slices` of the first axis: what is left stays at its place."""
        codes, rows = np.zeros_like(self.codes), list(slices)
        codes[rows] = self.codes[rows]
        return self.with_codes(codes)

    def _column(self, structure: str) -> int:
        try:
            return self.structures.index(structure)
        except ValueError:
            raise SegkitError(
                f"{structure!r} is not annotated here; annotated are {', '.join(self.structures[:8])} ..."
            ) from None


class CodeWriter:
    """Collects sets of structures, from a whole volume or piece by piece, and hands out their codes."""

    def __init__(self, structures: Sequence[str]):
        self.structures = tuple(structures)
        self.rows = [np.zeros(len(self.structures), bool)]
        self._code_of = {self.rows[0].tobytes(): 0}

    def code(self, members: np.ndarray) -> int:
        """The code of a set, given as bool (S,)."""
        key = members.tobytes()
        if key not in self._code_of:
            self._code_of[key] = len(self.rows)
            self.rows.append(members.copy())
        return self._code_of[key]

    def add(self, volume: CodeVolume) -> np.ndarray:
        """The codes of a volume (its structures among these) in this writer's numbering: uint32, its shape."""
        columns = [self.structures.index(name) for name in volume.structures]
        rows = np.zeros((len(volume.codebook), len(self.structures)), bool)
        rows[:, columns] = volume.codebook
        return np.array([self.code(row) for row in rows], np.uint32)[volume.codes]

    def finish(self, codes: np.ndarray, voxels: np.ndarray | None = None) -> CodeVolume:
        """A CodeVolume with the codes renumbered: only sets that occur, small sets first, in the smallest dtype.

        codes: this writer's, of any shape. `voxels`, the number of voxels of each code where it is known, saves
        counting them.
        """
        voxels = _counts(codes, len(self.rows)) if voxels is None else voxels
        occurring = np.union1d([0], np.flatnonzero(voxels))
        table = np.array(self.rows)[occurring]
        # single structures first, in column order, then the overlaps: the same masks always give the same codes
        order = np.array(sorted(range(len(table)), key=lambda k: (table[k].sum(), table[k].nonzero()[0].tolist())))
        renumbered = np.zeros(len(self.rows), smallest_dtype(len(table)))
        renumbered[occurring[order]] = np.arange(len(table))
        if np.array_equal(renumbered, np.arange(len(renumbered))) and codes.dtype == renumbered.dtype:
            return CodeVolume(codes, table[order], self.structures)
        return CodeVolume(renumbered[codes], table[order], self.structures)


def _counts(codes: np.ndarray, length: int) -> np.ndarray:
    """How often each of `length` codes occurs, int64: in pieces, since numpy takes 8 bytes a voxel to count."""
    flat, total = codes.ravel(order="K"), np.zeros(length, np.int64)
    for start in range(0, flat.size, COUNTED_TOGETHER):
        total += np.bincount(flat[start : start + COUNTED_TOGETHER], minlength=length)
    return total


def smallest_dtype(codes: int) -> np.dtype:
    """uint8, uint16 or uint32: the smallest that holds `codes` different codes."""
    return np.dtype(np.uint8 if codes <= 256 else np.uint16 if codes <= 65536 else np.uint32)


def encode(masks: Iterable[tuple[str, np.ndarray]], shape: tuple[int, ...], order: Order = "C") -> CodeVolume:
    """One CodeVolume of `shape` from (name, mask) pairs, each mask bool or number of that shape; > 0 is inside.

    Masks are taken one at a time, so that a generator keeps the memory at one mask. `order` is the memory layout of
    the result. Raises SegkitError for a mask of another shape or a name that comes twice.
    """

    def places() -> Iterator[tuple[str, np.ndarray]]:
        for name, mask in masks:
            if mask.shape != tuple(shape):
                raise SegkitError(f"mask {name!r}: expected the shape {tuple(shape)}, found {mask.shape}")
            yield name, places_inside(mask, order)

    return encode_places(places(), shape, order)


def encode_places(places: Iterable[tuple[str, np.ndarray]], shape: tuple[int, ...], order: Order = "C") -> CodeVolume:
    """As `encode`, from (name, where the mask is above 0 in a flat volume of memory layout `order`) pairs.

    Raises SegkitError for a name that comes twice.
    """
    flat = np.zeros(math.prod(shape), np.uint8)
    names: list[str] = []
    sets: list[tuple[int, ...]] = [()]  # columns of the members of each code
    code_of: dict[tuple[int, ...], int] = {(): 0}
    voxels = [flat.size]  # of each code
    for column, (name, inside) in enumerate(places):
        if name in names:
            raise SegkitError(f"mask {name!r}: comes twice")
        names.append(name)
        before = flat[inside]
        seen = np.bincount(before, minlength=len(sets))
        after = np.zeros(len(sets), np.uint32)
        for old in np.flatnonzero(seen).tolist():
            joined = (*sets[old], column)
            after[old] = code_of.setdefault(joined, len(sets))
            if after[old] == len(sets):
                sets.append(joined)
                voxels.append(0)
            voxels[old] -= int(seen[old])
            voxels[after[old]] += int(seen[old])
        flat = flat.astype(np.promote_types(flat.dtype, smallest_dtype(len(sets))), copy=False)
        flat[inside] = after[before]
    writer = CodeWriter(names)
    for members in sets[1:]:
        row = np.zeros(len(names), bool)
        row[list(members)] = True
        writer.code(row)
    return writer.finish(flat.reshape(shape, order=order), np.array(voxels))


def places_inside(mask: np.ndarray, order: Order = "C") -> np.ndarray:
    """Where a mask is above 0, rising: places in its flat memory of layout `order` ("F": NIfTI's), int64 (n,)."""
    flat = mask.ravel(order=order)
    if flat.dtype not in (np.uint8, np.bool_):
        flat = flat > 0
    content = flat.view(np.uint8)
    whole = content.size // 8 * 8
    # most of what is read holds nothing: seen eight bytes at a time, at the speed of memory
    if not np.bitwise_or.reduce(content[:whole].view(np.uint64)) and not content[whole:].any():
        return np.zeros(0, np.intp)
    return np.flatnonzero(content != 0)


def codebook_to_json(volume: CodeVolume) -> dict:
    """What a readable file keeps beside the codes: the structures and, per code, the columns of its members."""
    members = [row.nonzero()[0].tolist() for row in volume.codebook]
    return {"structures": list(volume.structures), "codebook": members}


def codebook_from_json(content: Mapping, codes: np.ndarray, source: str) -> CodeVolume:
    """The reverse of `codebook_to_json`, for codes of any shape.

    The names are safe (`segkit.labels.check_name`), and every one of `codes` is in the codebook. Raises SegkitError
    that names `source` for content that does not fit.
    """
    try:
        structures, members = content["structures"], content["codebook"]
        if not isinstance(structures, list) or not isinstance(members, list) or not members or members[0] != []:
            raise TypeError("expected a list of structures and a list of codes, of which the first is background")
        if len(set(map(check_name, structures))) < len(structures):
            raise ValueError("a structure comes twice")
        if len(structures) * len(members) > MOST_IN_CODEBOOK:
            raise ValueError(f"{len(members)} codes of {len(structures)} structures")
        codebook = np.zeros((len(members), len(structures)), bool)
        for row, columns in zip(codebook, members, strict=True):
            fits = all(type(column) is int and 0 <= column < len(structures) for column in columns)
            if not isinstance(columns, list) or not fits:
                raise ValueError(f"{str(columns)[:60]} are no columns of {len(structures)} structures")
            row[columns] = True
        if codes.size and codes.max() >= len(codebook):
            raise ValueError(f"{len(codebook)} codes, but a voxel has {codes.max()}")
    except (KeyError, TypeError, ValueError) as error:
        raise SegkitError(
            f"{source}: no usable codebook ({error!r}); delete the folder to have it made again"
        ) from error
    return CodeVolume(codes, codebook, tuple(structures))
