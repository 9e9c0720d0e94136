"""DICOM series written with pydicom, for tests to read and to damage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def make_series(
    hu: np.ndarray,
    affine: np.ndarray,
    slope: float = 1,
    intercept: float = -1024,
    signed: bool = False,
    uid: str = "1.2.826.0.1",
    **attributes,
) -> list[Dataset]:
    """A CT series, an image for each k of `hu` (i, j, k): i counts columns, j rows; affine from (i, j, k) to RAS mm.

    Places follow the standard, C.7.6.2.1.1: the first pixel's centre at ImagePositionPatient, PixelSpacing from row to
    row first, ImageOrientationPatient the direction of a row first. `attributes` are put into every image.
    """
    lps = RAS_TO_LPS @ affine
    lengths = np.linalg.norm(lps[:3, :3], axis=0)
    series = []
    for k in range(hu.shape[2]):
        image = Dataset()
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, f"{uid}.{k + 1}"
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = "1.2", uid, "1.3"
        image.Modality, image.SeriesDescription, image.ImageType = "CT", "Thorax", ["ORIGINAL", "PRIMARY", "AXIAL"]
        image.PatientID, image.PatientName, image.InstanceNumber = "0", "Nobody^", hu.shape[2] - k
        image.ImagePositionPatient = numbers(lps[:3, 3] + k * lps[:3, 2])
        image.ImageOrientationPatient = numbers((lps[:3, :2] / lengths[:2]).T.ravel())
        image.PixelSpacing = numbers(lengths[[1, 0]])
        image.SliceThickness = numbers([lengths[2]])[0]
        image.RescaleSlope, image.RescaleIntercept, image.RescaleType = str(slope), str(intercept), "HU"
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
        image.PixelRepresentation = int(signed)
        store(image, np.rint((hu[:, :, k].T.astype(float) - intercept) / slope))
        for name, value in attributes.items():
            setattr(image, name, value)
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        series.append(image)
    return series


def numbers(values: Sequence[float]) -> list[str]:
    """As DICOM keeps them: text of 16 letters at most."""
    texts = [f"{value:.10g}" for value in values]
    return [text if len(text) <= 16 else f"{value:.8g}" for text, value in zip(texts, values, strict=True)]


def store(image: Dataset, stored: np.ndarray) -> None:
    """Put stored numbers (rows, columns) into an image."""
    image.Rows, image.Columns = stored.shape
    kept = stored.astype("<i2" if image.PixelRepresentation else "<u2")
    assert np.array_equal(kept, stored)  # a test that writes what does not fit proves nothing
    image.PixelData = kept.tobytes()


def save(series: Sequence[Dataset], folder: Path, seed: int = 0) -> Path:
    """Write images under names without ending that say nothing of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, name in zip(series, np.random.default_rng(seed).permutation(len(series)), strict=True):
        image.save_as(folder / f"IM{name:04}", enforce_file_format=True)
    return folder


def enhanced(series: Sequence[Dataset]) -> Dataset:
    """The images of a series as one multi-frame image: what is the same for all shared, positions a frame."""
    first = series[0]
    whole = Dataset()
    whole.update({tag: first[tag] for tag in first.keys()})  # noqa: SIM118 - a Dataset iterates over elements
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "RescaleSlope",
                 "RescaleIntercept", "RescaleType"):  # fmt: skip
        delattr(whole, name)
    whole.SOPClassUID, whole.NumberOfFrames = EnhancedCTImageStorage, len(series)
    shared = Dataset()
    shared.PlaneOrientationSequence = [_only(first, "ImageOrientationPatient")]
    shared.PixelMeasuresSequence = [_only(first, "PixelSpacing", "SliceThickness")]
    whole.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for image in series:
        frame = Dataset()
        frame.PlanePositionSequence = [_only(image, "ImagePositionPatient")]
        frame.PixelValueTransformationSequence = [_only(image, "RescaleSlope", "RescaleIntercept", "RescaleType")]
        frames.append(frame)
    whole.PerFrameFunctionalGroupsSequence = frames
    whole.PixelData = b"".join(image.PixelData for image in series)
    whole.file_meta = FileMetaDataset()
    whole.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    whole.file_meta.MediaStorageSOPClassUID = whole.SOPClassUID
    whole.file_meta.MediaStorageSOPInstanceUID = whole.SOPInstanceUID
    return whole


def _only(image: Dataset, *names: str) -> Dataset:
    group = Dataset()
    for name in names:
        setattr(group, name, getattr(image, name))
    return group
