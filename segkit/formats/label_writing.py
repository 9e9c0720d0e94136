"""Write one file in which every structure has a number, with names and colours inside it and in tables beside it.

Names inside are TotalSegmentator's way, which `label_image.py` reads. The tables are those of viewers: ITK-SNAP's label
description (File > Segmentation > Import Label Descriptions) and 3D Slicer's colour table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from segkit.codes import CodeVolume, smallest_dtype
from segkit.formats.nifti import Grid
from segkit.formats.nifti_writing import LABEL, file_planes, write_nifti
from segkit.labels import OFFICIAL, check_name, rgb_of

IDS = ("v2", "v3", "v1")
"""The releases whose numbers are taken: those of the first that knows every structure."""


def number_structures(structures: Sequence[str]) -> dict[str, int]:
    """Structure -> number: TotalSegmentator's own of the first of IDS that has all names, else 1 to n in their order.

    Raises SegkitError for a name that is not safe in a table (`segkit.labels.check_name`).
    """
    for name in structures:
        check_name(name)
    for release in IDS:
        if all(name in OFFICIAL and release in OFFICIAL[name].ids for name in structures):
            return {name: OFFICIAL[name].ids[release] for name in structures}
    return {name: number for number, name in enumerate(structures, 1)}


def write_label_image(path: Path, best: np.ndarray, structures: Sequence[str], grid: Grid) -> None:
    """Write one number a voxel, with the names of all structures in the header.

    best: (z, y, x) on the canonical axes of `grid`; 0 is background, n the structure `structures[n - 1]`. The file's
    numbers are those of `number_structures`.
    """
    numbers = number_structures(structures)
    dtype = smallest_dtype(max(numbers.values(), default=0) + 1)
    number_of = np.array([0, *numbers.values()], dtype)
    planes = (number_of[plane] for plane in file_planes(best, grid))
    write_nifti(path, planes, grid, dtype, LABEL, _label_table(numbers))


def lost_labels(volume: CodeVolume) -> tuple[int, int]:
    """How many voxels belong to several structures, and how many labels they lose where a voxel holds one."""
    voxels = volume.counts()
    more = np.maximum(volume.codebook.sum(1) - 1, 0)
    return int(voxels[more > 0].sum()), int(voxels @ more)


def _label_table(numbers: Mapping[str, int]) -> bytes:
    rows = []
    for name, number in numbers.items():
        red, green, blue = (f"{value / 255:.6f}" for value in rgb_of(name))
        rows.append(
            f'<Label Key="{number}" Red="{red}" Green="{green}" Blue="{blue}" Alpha="1"><![CDATA[{name}]]></Label>\n'
        )
    labels = "".join(rows)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<CaretExtension>\n<VolumeInformation Index="0">\n'
        f"<LabelTable>\n{labels}</LabelTable>\n"
        "<VolumeType><![CDATA[Label]]></VolumeType>\n</VolumeInformation>\n</CaretExtension>\n"
    ).encode()


def write_names(path: Path, structures: Sequence[str]) -> None:
    """Write {"spleen": 1, ...} as JSON, which `segkit.formats.label_image.read_names` reads."""
    path.write_text(json.dumps(number_structures(structures), indent=1) + "\n", encoding="utf-8")


def write_itksnap_table(path: Path, structures: Sequence[str]) -> None:
    """Write ITK-SNAP's label description: IDX R G B A VIS MSH "LABEL", colours 0-255, opacity 0-1, shown or not 0, 1.

    ITK-SNAP knows the file by the second line of its comment.
    """
    rows = ['0 0 0 0 0 0 0 "Clear Label"']
    for name, number in number_structures(structures).items():
        rows.append("{} {} {} {} 1 1 1 {}".format(number, *rgb_of(name), f'"{name}"'))
    header = f"{'#' * 48}\n# ITK-SnAP Label Description File\n# IDX R G B A VIS MSH LABEL\n{'#' * 48}\n"
    _write_lines(path, header, rows)


def write_slicer_table(path: Path, structures: Sequence[str], title: str) -> None:
    """Write 3D Slicer's colour table for the label image: id name R G B A, all 0-255; its first line names `title`."""
    rows = ["0 background 0 0 0 0"]
    for name, number in number_structures(structures).items():
        rows.append("{} {} {} {} {} 255".format(number, name, *rgb_of(name)))
    _write_lines(path, f"# Color table file {title}\n# {len(rows)} values\n", rows)


def _write_lines(path: Path, header: str, rows: Sequence[str]) -> None:
    # line ends as on Unix everywhere: ITK-SNAP reads no others
    path.write_text(header + "\n".join(rows) + "\n", encoding="utf-8", newline="\n")
