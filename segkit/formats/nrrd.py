"""NRRD: one volume behind a header of some lines of text, as 3D Slicer writes it.

Format: https://teem.sourceforge.net/nrrd/format.html. The header is read here and not by a library: what a scan needs
of it is little, and a header from outside must not name another file that is then read.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal, cast

import numpy as np

from segkit.errors import SubjectError
from segkit.formats import gunzip
from segkit.formats.nifti import Grid, explained, usable_grid
from segkit.untrusted import read_file

ENDINGS = (".nrrd",)
"""How the names of the files that are read here end."""

MOST_HEADER = 1 << 20
"""Bytes in which the header must end."""

LONGEST_FIELD = 1000
"""Characters: the four vectors of a place in space have 100. What is longer could take hours to look through."""

_NAMES = {
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}
_TYPES = {name: np.dtype(code) for code, names in _NAMES.items() for name in names.split(", ")}
_ENDIANS = {"little": "<", "big": ">"}
_TO_RAS = {  # which of a space's axes point the other way in RAS+
    ("right-anterior-superior", "ras"): (1, 1, 1),
    ("left-anterior-superior", "las"): (-1, 1, 1),
    ("left-posterior-superior", "lps"): (-1, -1, 1),
}
_SPACES = {name: signs for names, signs in _TO_RAS.items() for name in names}
_FIELDS = ("type", "dimension", "sizes", "encoding", "space", "space directions")


def read_volume(path: Path, subject: str) -> tuple[np.ndarray, Grid]:
    """Read a 3-D NRRD file: its array (i, j, k) in the stored dtype, read-only, and its grid.

    Raises SubjectError that names the subject and the file for a file that is missing, damaged, cut short, not 3-D or
    without its place in the patient, for one that keeps its voxels in other files, and for a segmentation.
    """
    where = f"subject {subject}: {path}"
    with explained(where, "NRRD"):
        content = read_file(path)
        fields, start = _read_header(content, where)
        shape, dtype = _layout(fields, where)
        grid = usable_grid(shape, _affine(fields, where), where)
        voxels = _voxels(content, start, fields["encoding"], math.prod(shape) * dtype.itemsize, where)
        return np.frombuffer(voxels, dtype, math.prod(shape)).reshape(shape, order="F"), grid


def _read_header(content: bytes, where: str) -> tuple[dict[str, str], int]:
    """The fields, names in lower case, and where the voxels begin."""
    if not re.match(rb"NRRD000[1-5]\r?\n", content):
        raise SubjectError(f"{where}: expected a NRRD file, found one that begins with {content[:8]!r}")
    end = re.compile(rb"\r?\n\r?\n").search(content, 0, MOST_HEADER)
    if not end:
        raise SubjectError(f"{where}: its header has no end; it is damaged or keeps its voxels in another file")
    fields: dict[str, str] = {}
    for line in content[: end.start()].decode("utf-8", "replace").splitlines()[1:]:
        if line.startswith("#"):
            continue
        if ":=" in line:  # a key of somebody's own
            if line.startswith(("Segment0_", "Segmentation_")):
                raise SubjectError(f"{where}: holds a segmentation, expected a scan")
            continue
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        if not colon or name in fields:
            raise SubjectError(f"{where}: damaged header: {'comes twice' if colon else 'no field'}: {line[:60]!r}")
        if len(value) > LONGEST_FIELD:
            raise SubjectError(f"{where}: damaged header: {name[:60]!r} has {len(value):,} characters")
        fields[name] = value.strip()
    _refuse_what_is_not_read(fields, where)
    return fields, end.end()


def _refuse_what_is_not_read(fields: dict[str, str], where: str) -> None:
    if "data file" in fields or "datafile" in fields:
        raise SubjectError(f"{where}: keeps its voxels in other files; save the scan as one file, .nrrd or .nii.gz")
    missing = [name for name in _FIELDS if name not in fields]
    if missing:
        raise SubjectError(
            f"{where}: does not say {', '.join(missing)}; without them it is not known where in the patient a voxel "
            "lies: save it again from the program that reads DICOM"
        )
    for name in ("line skip", "lineskip", "byte skip", "byteskip"):
        if fields.get(name, "0") != "0":
            raise SubjectError(f"{where}: {name} {fields[name]} is not supported; save it again, as .nrrd or .nii.gz")
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", "")))
    if not units <= {"mm", ""}:
        raise SubjectError(f"{where}: expected mm, found the space units {', '.join(sorted(units))}")


def _layout(fields: dict[str, str], where: str) -> tuple[tuple[int, int, int], np.dtype]:
    shape = tuple(int(size) for size in fields["sizes"].split())
    if fields["dimension"] != "3" or len(shape) != 3 or min(shape) < 1:
        raise SubjectError(f"{where}: expected one 3-D volume, found the sizes {fields['sizes'][:60]}")
    dtype = _TYPES.get(fields["type"].lower())
    if dtype is None:
        raise SubjectError(f"{where}: expected one number a voxel, found the type {fields['type'][:60]!r}")
    order = _ENDIANS.get(fields.get("endian", "").lower())
    if dtype.itemsize > 1 and order is None:
        raise SubjectError(f"{where}: does not say endian: little or big")
    return shape, dtype.newbyteorder(cast(Literal["<", ">", "="], order or "="))


def _affine(fields: dict[str, str], where: str) -> np.ndarray:
    """Voxel (i, j, k) -> world mm, RAS+. Without a space origin the first voxel lies at 0."""
    signs = _SPACES.get(fields["space"].lower())
    if signs is None:
        raise SubjectError(
            f"{where}: expected the space {', '.join(names[0] for names in _TO_RAS)}, found {fields['space'][:60]!r}"
        )
    vectors = [_vector(text, where) for text in re.findall(r"\([^)]*\)", fields["space directions"])]
    if len(vectors) != 3:
        raise SubjectError(f"{where}: expected three space directions, found {fields['space directions'][:80]!r}")
    affine = np.eye(4)
    affine[:3] = np.transpose([*vectors, _vector(fields.get("space origin", "(0,0,0)"), where)])
    return np.diag([*signs, 1.0]) @ affine


def _vector(text: str, where: str) -> list[float]:
    numbers = [float(number) for number in text.strip().strip("()").split(",")]
    if len(numbers) != 3:
        raise SubjectError(f"{where}: expected three numbers, found {text[:60]!r}")
    return numbers


def _voxels(content: bytes, start: int, encoding: str, size: int, where: str) -> bytes | memoryview:
    packed = encoding.lower() in ("gzip", "gz")
    if not packed and encoding.lower() != "raw":
        raise SubjectError(f"{where}: the encoding {encoding[:20]!r} is not supported; save it as raw or gzip")
    held = (len(content) - start) * (gunzip.LARGEST_RATIO if packed else 1)
    if size > held:
        raise EOFError(f"expected {size} bytes of voxels, more than the file can hold")
    if not packed:
        return memoryview(content)[start:]
    reader = gunzip.GzipReader(memoryview(content)[start:])
    voxels = reader.read(size)
    if len(voxels) < size:
        raise EOFError(f"{size - len(voxels)} bytes of voxels are missing")
    reader.finish()
    return voxels
