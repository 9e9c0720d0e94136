"""Write DICOM SEG: segments that refer to the images of the series in which they were found.

Binary segments, which every viewer reads. A file holds structures that do not overlap; those that overlap them go into
a further file of the same series: highdicom would otherwise need a byte for each voxel and structure.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import segkit
from segkit.codes import CodeVolume
from segkit.errors import SegkitError
from segkit.formats.nifti import Grid
from segkit.formats.nifti_writing import file_planes
from segkit.formats.snomed import LONGEST_MEANING, Code, term_of
from segkit.labels import check_name, rgb_of

if TYPE_CHECKING:
    from highdicom.seg import Segmentation, SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom import Dataset

SERIES_NUMBER = 900  # beyond what scanners give away
MAY_BE_EMPTY = (  # type 2 of DICOM PS3.3, C.7.1.1 and C.7.2.1; those who make scans anonymous often leave them out
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip


def check_installed() -> None:
    """Raise SegkitError that says what to install where the packages for DICOM SEG are missing."""
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise SegkitError("DICOM SEG needs highdicom: pip install -e '.[dicom]'") from error


def make_segmentations(volume: CodeVolume, grid: Grid, files: Sequence[Path]) -> Iterator[Segmentation]:
    """The structures that occur in codes (z, y, x) on the canonical axes of `grid`, a segmentation a layer.

    files: of the series, in the order of the grid's k axis. Empty where no structure occurs. Raises SegkitError where
    the files are no DICOM, or lack what a segmentation has to repeat of them.
    """
    from highdicom import UID

    source, series = _read_source(files, grid), UID()
    there = volume.boxes()
    layers = [tuple(name for name in layer if name in there) for layer in volume.layers()]
    planes = file_planes(volume.codes, grid)
    for number, layer in enumerate(filter(None, layers), start=1):
        table = volume.lookup({name: place for place, name in enumerate(layer, start=1)})
        pixels = np.empty(planes.shape, table.dtype)  # (k, j, i): image, row, column
        for plane, codes in zip(pixels, planes, strict=True):
            np.take(table, codes, out=plane)
        yield _segmentation(pixels, layer, source, series, number)


def check_series(grid: Grid, files: Sequence[Path]) -> None:
    """Raise SegkitError, as `make_segmentations` would, for files that cannot have a segmentation on `grid`."""
    from highdicom import UID

    source = _read_source(files, grid)
    pixels = np.zeros((1, *grid.shape[1::-1]), np.uint8)
    pixels[0, 0, 0] = 1
    _segmentation(pixels, ("liver",), source[:1], UID(), 1)


def _read_source(files: Sequence[Path], grid: Grid) -> Sequence[Dataset]:
    """What the files of a series say without their pixels, a file a plane of `grid`."""
    import pydicom

    others = "choose 'nifti' or 'slicer'"
    advice = f"{others}, or give the folder of the DICOM series as input"
    if len(files) != grid.shape[2]:
        raise SegkitError(
            f"DICOM SEG: expected a DICOM file for each of {grid.shape[2]} slices, found {len(files)} files "
            f"({', '.join(map(str, files[:1]))}); {advice}"
        )
    try:
        source = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
    except (OSError, pydicom.errors.InvalidDicomError) as error:
        raise SegkitError(f"DICOM SEG: expected a scan of DICOM files ({error}); {advice}") from error
    if not all(image.get("FrameOfReferenceUID") for image in source):
        raise SegkitError(
            f"DICOM SEG: {files[0]}: the series names no frame of reference, in which a segmentation lies; {others}"
        )
    for image in source:
        _mend(image, source[0], float(np.linalg.norm(grid.affine[:3, 2])))
    return source


def _mend(image: Dataset, first: Dataset, step_mm: float) -> None:
    """Give an image's header what a segmentation repeats of it, where a series lacks it or says what is not so.

    step_mm: from slice to slice, as their positions say. What nobody needs to know becomes empty, where highdicom would
    refuse it. Orientations of one series may differ in a last digit; a segmentation has one.
    """
    from highdicom import PatientSexValues
    from pydicom.valuerep import DA, TM

    for keyword in MAY_BE_EMPTY:
        if keyword not in image:
            setattr(image, keyword, "")
    kinds = {"PatientSex": PatientSexValues, "PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of the very values that are looked for
        for keyword, kind in kinds.items():
            try:
                if image[keyword].value:
                    kind(image[keyword].value)
            except ValueError:
                setattr(image, keyword, "")
    image.SpacingBetweenSlices = round(step_mm, 6)
    if not image.get("SliceThickness"):
        image.SliceThickness = round(step_mm, 6)
    image.ImageOrientationPatient = first.ImageOrientationPatient


def _segmentation(
    pixels: np.ndarray, layer: Sequence[str], source: Sequence[Dataset], series: str, number: int
) -> Segmentation:
    import highdicom as hd

    try:
        return hd.seg.Segmentation(
            source_images=source,
            pixel_array=pixels,
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[_description(name, place) for place, name in enumerate(layer, start=1)],
            series_instance_uid=series,
            series_number=SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=number,
            manufacturer="segkit",
            manufacturer_model_name="segkit",
            software_versions=segkit.__version__,
            device_serial_number="none",
            series_description="segkit: for research, not for diagnosis",
            content_label="SEGKIT",
            specific_character_set="ISO_IR 192",  # UTF-8: structures have names of any script
        )
    except (AttributeError, ValueError, TypeError) as error:
        raise SegkitError(
            f"DICOM SEG: {source[0].filename}: the series lacks what a segmentation repeats of it ({error}); choose "
            "'nifti' or 'slicer'"
        ) from error


def _description(name: str, number: int) -> SegmentDescription:
    import highdicom as hd
    from highdicom.color import CIELabColor
    from pydicom.sr.codedict import codes

    term = term_of(check_name(name))
    described = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:LONGEST_MEANING],
        segmented_property_category=_coded(term.category),
        segmented_property_type=_coded(term.what),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            "segkit U-Net", codes.cid7162.ArtificialIntelligence, segkit.__version__
        ),
        display_color=CIELabColor.from_rgb(*rgb_of(name)),
    )
    if term.side:
        [what] = described.SegmentedPropertyTypeCodeSequence
        what.SegmentedPropertyTypeModifierCodeSequence = [_coded(term.side)]
    return described


def _coded(code: Code) -> CodedConcept:
    from highdicom.sr import CodedConcept

    return CodedConcept(code.value, code.scheme, code.meaning)
