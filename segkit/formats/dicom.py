"""DICOM: the images of a folder sorted into series, each image with its place in the patient. No pixels are read here.

Attributes: https://dicom.nema.org/medical/dicom/current/output/chtml/part03/sect_C.7.6.2.html (image plane) and
.../sect_C.7.6.16.2.html (functional groups of enhanced images). Positions and directions are LPS+ in mm, as stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from segkit.errors import SegkitError, printable

HINT = "pip install -e '.[dicom]'"

MOST_PIXELS = 1 << 24
"""An image of more is no slice of a patient; refused before memory is asked for."""

MOST = 1e9
"""No length in mm and no factor is as large: beyond, a file is damaged."""

NO_IMAGES = frozenset(
    ("SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "RTRECORD", "RTIMAGE", "SR", "PR", "KO", "REG", "DOC", "PLAN", "RAW", "FID")
)
"""Modalities of objects that are no scan: results, plans, reports, documents."""

_ATTRIBUTES = [
    "SeriesInstanceUID", "SeriesDescription", "Modality", "ImageType", "InstanceNumber", "FrameOfReferenceUID", "Rows",
    "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "PixelRepresentation", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "RescaleSlope",
    "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
_GROUPS = (
    "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence",
)  # fmt: skip


@dataclass(frozen=True)
class Plane:
    """One slice of a series: where it lies and how its stored numbers become HU."""

    path: Path
    frame: int  # from 0; 0 in a file of one image
    number: int | None  # InstanceNumber, to name the slice; slices are never sorted by it
    size: tuple[int, int]  # rows, columns
    spacing_mm: tuple[float, float]  # from row to row, from column to column
    axes: np.ndarray  # float (2, 3), unit vectors: along which the columns are counted, along which the rows
    position: np.ndarray  # float (3,), mm: the centre of the first pixel
    frame_of_reference: str
    thickness_mm: float | None
    between_mm: float | None  # SpacingBetweenSlices
    rescale: tuple[float, float] | None  # slope and intercept; None where the file has none
    units: str  # RescaleType; "" where the file has none
    padding: tuple[float, float] | None  # stored numbers from .. to that stand for "not measured"
    syntax: str  # UID of the transfer syntax

    def __str__(self) -> str:
        frame = f" frame {self.frame + 1}" if self.frame else ""
        number = "" if self.number is None else f"instance {self.number}, "
        return f"{self.path.name}{frame} ({number}at {', '.join(f'{mm:.2f}' for mm in self.position)} mm)"


@dataclass
class Series:
    """What belongs together by its SeriesInstanceUID."""

    uid: str
    description: str
    modality: str
    planes: list[Plane] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # why an image of it cannot be used; each names its file
    localizers: list[Path] = field(default_factory=list)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of its slices, in the order in which they were found."""
        return tuple(dict.fromkeys(plane.path for plane in self.planes))

    def __str__(self) -> str:
        """A line to choose by. Text from the files is shown without what a terminal would act on."""
        sizes = " and ".join(sorted({f"{plane.size[1]} x {plane.size[0]}" for plane in self.planes})[:3]) or "no size"
        thick = sorted({plane.thickness_mm for plane in self.planes if plane.thickness_mm is not None})
        thickness = f"{thick[0]:g} mm" if thick else "unknown thickness"
        text = f"{len(self.files)} files, {len(self.planes)} slices, {sizes}, {thickness}, {self.modality}"
        return f"{_shown(self.uid)}: {_shown(self.description) or 'no description'} ({text})"


def require_pydicom() -> ModuleType:
    """pydicom. Raises SegkitError that says how to install it."""
    try:
        import pydicom
    except ImportError as error:
        raise SegkitError(f"reading DICOM needs pydicom: {HINT}") from error
    return pydicom


def is_dicom(path: Path) -> bool:
    """Whether a file is marked as DICOM: `DICM` after 128 bytes. Its name says nothing."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def find_series(paths: Sequence[Path]) -> list[Series]:
    """The series of DICOM files, in the order in which they were found; what is no image is left out.

    Raises SegkitError that names the file where one is so damaged that nobody knows to what it belongs.
    """
    pydicom = require_pydicom()
    found: dict[str, Series] = {}
    with warnings.catch_warnings(action="ignore"):  # about values of no matter here, for each file again
        for path in paths:
            read = _read_header(pydicom, path)
            if read is not None:
                header, series = read
                _add(header, path, found.setdefault(series.uid, series))
    return list(found.values())


def _add(header: Any, path: Path, series: Series) -> None:
    """Put an image into its series, or what is wrong with it."""
    try:
        if "LOCALIZER" in (header.get("ImageType") or ()):
            series.localizers.append(path)
        else:
            series.planes += _planes(header, path)
    except SegkitError as error:
        series.faults.append(str(error))
    except Exception as error:  # noqa: BLE001, pydicom converts a value when it is asked for, and raises many kinds
        series.faults.append(f"{path}: {_DAMAGED} ({_shown(error)})")


_DAMAGED = "damaged or cut short; copy it again, or remove it if it does not belong to the scan"


def _read_header(pydicom: ModuleType, path: Path) -> tuple[Any, Series] | None:
    """What is needed of a file, before its pixels, and its series, still empty; None for an object without an image."""
    try:
        # such a file would be inflated at once, before its header is known, to a thousand times its size
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
            raise SegkitError(f"{path}: is deflated as a whole, which is not supported; save it uncompressed")
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_ATTRIBUTES)
        directory = header.file_meta.get("MediaStorageSOPClassUID") == pydicom.uid.MediaStorageDirectoryStorage
        names = ("SeriesInstanceUID", "SeriesDescription", "Modality")
        uid, description, modality = (str(header.get(name) or "") for name in names)
    except SegkitError:
        raise
    except Exception as error:
        raise SegkitError(f"{path}: {_DAMAGED} ({_shown(error)})") from error
    if directory or modality in NO_IMAGES:
        return None
    if not uid:
        raise SegkitError(f"{path}: {_DAMAGED} (it names no series)")
    return header, Series(uid, description, _shown(modality))


def _planes(header: Any, path: Path) -> Iterator[Plane]:
    frames = int(header.get("NumberOfFrames") or 1)
    if "PerFrameFunctionalGroupsSequence" not in header:
        if frames != 1:
            raise SegkitError(f"{path}: {frames} images in one file, and nothing says where each lies")
        yield _plane(header.get, header, path, 0)
        return
    groups = header.PerFrameFunctionalGroupsSequence
    if len(groups) != frames:
        raise SegkitError(f"{path}: expected the places of {frames} frames, found {len(groups)}; {_DAMAGED}")
    shared = list(header.get("SharedFunctionalGroupsSequence") or ())[:1]
    for frame, own in enumerate(groups):
        items = [item[name][0] for item in (own, *shared) for name in _GROUPS if item.get(name)]

        def find(keyword: str, items: list[Any] = items) -> object:
            return next((item.get(keyword) for item in items if keyword in item), None)

        yield _plane(find, header, path, frame)


def _plane(find: Callable[[str], object], header: Any, path: Path, frame: int) -> Plane:
    """One slice; `find` gives an attribute of it by its keyword, `header` those of the whole file."""
    size = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    if not 0 < size[0] * size[1] <= MOST_PIXELS or header.get("SamplesPerPixel", 1) != 1:
        samples = header.get("SamplesPerPixel", 1)
        raise SegkitError(f"{path}: expected an image, one number a pixel, found {size[0]} x {size[1]} x {samples}")
    if find("ModalityLUTSequence"):
        raise SegkitError(f"{path}: its numbers become HU through a table, which is not supported; save it as .nii.gz")
    axes = _numbers(find, "ImageOrientationPatient", 6, path).reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if abs(lengths - 1).max() > 0.01 or abs(axes[0] @ axes[1]) > 0.01:
        raise SegkitError(f"{path}: ImageOrientationPatient {axes.ravel().tolist()}: expected two unit vectors")
    spacing = _numbers(find, "PixelSpacing", 2, path)
    if spacing.min() <= 0:
        raise SegkitError(f"{path}: PixelSpacing {spacing.tolist()}: expected two lengths in mm")
    slope, intercept = find("RescaleSlope"), find("RescaleIntercept")
    without = slope is None or intercept is None
    return Plane(
        path,
        frame,
        None if header.get("InstanceNumber") is None else int(header.InstanceNumber),
        size,
        tuple(spacing.tolist()),
        axes / lengths[:, None],
        _numbers(find, "ImagePositionPatient", 3, path),
        str(header.get("FrameOfReferenceUID", "")),
        _length(find("SliceThickness")),
        _length(find("SpacingBetweenSlices")),
        None if without else tuple(_finite([slope, intercept], 2, "RescaleSlope, RescaleIntercept", path).tolist()),
        _shown(find("RescaleType") or ""),
        _padding(header, path),
        str(header.file_meta.get("TransferSyntaxUID", "")),
    )


def _numbers(find: Callable[[str], object], keyword: str, count: int, path: Path) -> np.ndarray:
    value = find(keyword)
    if value is None:
        raise SegkitError(f"{path}: has no {keyword}: nobody knows where in the patient it lies")
    return _finite(value, count, keyword, path)


def _finite(value: object, count: int, keyword: str, path: Path) -> np.ndarray:
    numbers = np.array(value, float).ravel()
    if len(numbers) != count or not (abs(numbers) < MOST).all():  # NaN is not smaller either
        raise SegkitError(f"{path}: {keyword}: expected {count} numbers, found {_shown(value)}")
    return numbers


def _length(value: Any) -> float | None:
    return float(value) if value is not None and 0 < float(value) < np.inf else None


def _padding(header: Any, path: Path) -> tuple[float, float] | None:
    """The range of stored numbers that stand for "not measured", as the pixels hold them."""
    value = header.get("PixelPaddingValue")
    if value is None:
        return None
    limit = header.get("PixelPaddingRangeLimit")
    ends = _finite([value, value if limit is None else limit], 2, "PixelPaddingValue", path)
    # scanners write -2000 as 63536 and the other way round
    span, signed = 2.0 ** int(header.get("BitsAllocated", 16)), int(header.get("PixelRepresentation", 0)) == 1
    ends = np.where(ends >= span / 2, ends - span, ends) if signed else np.where(ends < 0, ends + span, ends)
    return tuple(sorted(ends.tolist()))


def _shown(text: object) -> str:
    return printable(str(text)).strip()[:120]
