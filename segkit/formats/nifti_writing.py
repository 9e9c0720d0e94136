"""Write NIfTI files plane by plane, compressed on the way: no more than a plane is held beside the volume."""

from __future__ import annotations

import io
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from isal import isal_zlib

from segkit.formats.nifti import Grid

LABEL = "label"
"""The intent of a file whose numbers stand for names."""

_GZIP = 31  # zlib's wbits for a gzip header and checksum
_LEVEL = 1  # of isal: on label volumes as small as level 2, and ten times as fast as 3 (measured)


def file_planes(volume: np.ndarray, grid: Grid) -> np.ndarray:
    """A canonical array (z, y, x) as a view (k, j, i) on the file's axes, whose planes lie in a file as they come."""
    return grid.from_canonical(volume).T


def write_nifti(
    path: Path, planes: Iterable[np.ndarray], grid: Grid, dtype: np.dtype, intent: str = "", extension: bytes = b""
) -> None:
    """Write `path` (.nii.gz) on `grid` from its planes (j, i) along k, each of `dtype`.

    It is placed as the NIfTI file that the grid is of, field by field (`Grid.placing`). Of another file's grid the
    affine goes into the sform, and into the qform, which can say no shear, what is nearest to it: ITK refuses files
    without a rotation.
    `extension` becomes the header's first extension, code 0.
    """
    with open(path, "wb") as file:
        write_gzip(file, chain([_header(grid, dtype, intent, extension)], planes))


def write_gzip(file: BinaryIO, pieces: Iterable[bytes | np.ndarray]) -> None:
    """Write bytes and arrays (in C order), one after the other, as one gzip member."""
    packer = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, _GZIP)
    file.writelines(
        packer.compress(piece if isinstance(piece, bytes) else np.ascontiguousarray(piece)) for piece in pieces
    )
    file.write(packer.flush())


def _header(grid: Grid, dtype: np.dtype, intent: str, extension: bytes) -> bytes:
    header = nib.Nifti1Header(endianness="<")
    header.set_data_dtype(dtype)
    header.set_data_shape(grid.shape)
    header.set_xyzt_units("mm")
    if grid.placing is None:
        header.set_sform(grid.affine, "scanner")
        header.set_qform(grid.affine, "scanner")
    for name, value in (grid.placing or {}).items():
        header[name] = value
    header["descrip"] = b"segkit: for education and research, not for diagnosis"
    if intent:
        header.set_intent(intent)
    if extension:
        header.extensions.append(nib.nifti1.Nifti1Extension(0, extension))
    content = io.BytesIO()
    header.write_to(content)
    return content.getvalue()
