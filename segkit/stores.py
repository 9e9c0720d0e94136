"""Volumes on disk that are read a slice at a time, with checksums: what comes back is what was written, or an error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from isal import isal_zlib

from segkit.errors import SegkitError

REMEDY = "delete it to have it made again"


def save_array(path: Path, volume: np.ndarray) -> None:
    """Write (z, y, x) as `.b2nd`, compressed without loss, a block a slice so that one slice can be read alone."""
    # noise in HU compresses better bit by bit; codes as they are. Level 3 would gain 0.2 % and take twice as long
    filters = [blosc2.Filter.NOFILTER if volume.dtype.itemsize == 1 else blosc2.Filter.BITSHUFFLE]
    packed = blosc2.asarray(
        np.ascontiguousarray(volume),
        # a file of few chunks is written many times faster; reading a slice touches its block alone all the same
        chunks=(min(16, len(volume)), *volume.shape[1:]),
        blocks=(1, *volume.shape[1:]),
        cparams=blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, filters=filters, nthreads=1),
    )
    path.write_bytes(packed.to_cframe())  # at once, not chunk by chunk


def checksums(volume: np.ndarray) -> list[int]:
    """CRC-32 of each slice of (z, y, x): blosc2 keeps none, and a bit that flips on a disk would be another HU.

    They cost 0.01 ms a slice of 512 x 512 (measured), a thirtieth of reading it.
    """
    return [isal_zlib.crc32(np.ascontiguousarray(plane)) for plane in volume]


class StoredArray:
    """A volume (z, y, x) in a `.b2nd`, of whole numbers with a sign (`kind` "i") or without ("u").

    Raises SegkitError that names the file if it is damaged, of another shape or of other numbers.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], kind: str, expected: Sequence[int]):
        self.path, self._expected = path, expected  # `checksums` of what was written
        try:
            self._check_is_there()  # before it is opened: a pipe would wait
            self._array = blosc2.open(str(path), mode="r")
            found = tuple(self._array.shape), self._array.dtype
        except SegkitError:
            raise
        except Exception as error:  # blosc2 raises many kinds for a file that makes no sense
            raise self._damaged(error) from error
        if (found[0], found[1].kind) != (shape, kind) or len(expected) != shape[0]:
            raise self._damaged(f"expected the shape {shape}, found {found[0]}, {found[1]}")

    def __getitem__(self, z: int | slice) -> np.ndarray:
        """One slice (y, x) or several (z, y, x). Raises SegkitError that names the file if they are damaged."""
        try:
            planes = self._array[z]
        except Exception as error:  # blosc2 raises many kinds for compressed data that make no sense
            self._check_is_there()
            raise self._damaged(error) from error
        expected: Any = self._expected[z]
        found = checksums(planes if isinstance(z, slice) else planes[None])
        if found != (list(expected) if isinstance(z, slice) else [expected]):
            raise self._damaged("its slices are not what was written")
        return planes

    def _check_is_there(self) -> None:
        if not self.path.is_file():
            raise SegkitError(f"{self.path}: is gone: deleted, or made anew because its sources changed; start again")

    def _damaged(self, reason: object) -> SegkitError:
        return SegkitError(f"{self.path}: damaged store ({reason}); {REMEDY}")


def sealed(content: Mapping) -> dict:
    """The content of a JSON file with a checksum over all of it."""
    return {**content, "checksum": _checksum(content)}


def is_whole(content: object) -> bool:
    """Whether it is what `sealed` gave."""
    return isinstance(content, dict) and content.get("checksum") == _checksum(content)


def _checksum(content: Mapping) -> str:
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
