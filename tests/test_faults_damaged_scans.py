"""Faults: damaged scans and labels. Each is read right, or refused with its file named; nothing hangs or fills memory.

What stands behind a checksum (gzip) is as it was written or refused. Without one (the header in front of it, DICOM)
it is at least a scan: HU of that shape on a grid that lies in space.
"""

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import write_nifti
from damage import damaged, try_all
from dicom_files import enhanced, make_series, save
from pydicom.uid import ImplicitVRLittleEndian, RLELossless

from segkit.codes import CodeVolume
from segkit.errors import Findings
from segkit.formats.label_writing import write_label_image
from segkit.formats.mask_files import write_mask_files
from segkit.formats.nifti import Grid
from segkit.reading import read_ct, read_labels, refuse
from segkit.scans import Scan, find_scans, read_scan
from segkit.subjects import find_subjects

HU = np.random.default_rng(0).integers(-1000, 1000, (12, 10, 8)).astype(np.int16)
AFFINE = np.diag([-2.0, 1.5, 3.0, 1.0])
GRID = Grid(HU.shape, AFFINE)


def read_one(path: Path) -> Scan:
    [source] = find_scans(path)
    return read_scan(source, Findings(source.name))


def check_scan(scan: Scan) -> None:
    """It is a scan at all."""
    hu, grid = scan.hu(slice(None)), scan.grid
    assert hu.dtype == np.int16 and hu.shape == scan.shape and hu.size == np.prod(grid.shape) > 0
    assert np.isfinite(grid.affine).all() and all(0.01 <= side <= 100 for side in scan.spacing_mm)
    assert grid.from_canonical(hu).shape == grid.shape and len(grid.orientation) == 3
    assert hu.min() < hu.max()  # one value everywhere is no scan


def check_same(scan: Scan) -> None:
    """It is the scan that was written."""
    assert np.array_equal(scan.grid.from_canonical(scan.hu(slice(None))), HU)
    assert np.allclose(scan.grid.affine, AFFINE)


def nifti_content(folder: Path) -> bytes:
    """A NIfTI file with an extension, not compressed."""
    image = nib.Nifti1Image(HU, AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a word of somebody"))
    nib.save(image, folder / "whole.nii")
    return (folder / "whole.nii").read_bytes()


def nrrd_header(encoding: str) -> bytes:
    lines = (
        "NRRD0005", "# made by hand", "type: short", "dimension: 3", "space: right-anterior-superior",
        "sizes: 12 10 8", "space directions: (-2,0,0) (0,1.5,0) (0,0,3)", "kinds: domain domain domain",
        "endian: little", f"encoding: {encoding}", "space origin: (0,0,0)", "", "",
    )  # fmt: skip
    return "\n".join(lines).encode()


def files_of(kind: str, folder: Path):
    """The name of a file, damaged contents of it, and what a scan read from it has to be."""
    voxels = HU.tobytes(order="F")
    if kind == "NIfTI":
        return "scan.nii", damaged(nifti_content(folder)), check_scan
    if kind == "NIfTI, before it was compressed":
        return "scan.nii.gz", damaged(nifti_content(folder)).map(lambda c: gzip.compress(c, 1)), check_scan
    if kind == "NIfTI, compressed":
        return "scan.nii.gz", damaged(gzip.compress(nifti_content(folder), 1), 30), check_same
    if kind == "NRRD":
        return "scan.nrrd", damaged(nrrd_header("raw") + voxels, len(nrrd_header("raw"))), check_scan
    header = nrrd_header("gzip")
    if kind == "NRRD, compressed voxels":
        return "scan.nrrd", damaged(gzip.compress(voxels, 1), 30).map(lambda c: header + c), check_same
    return "scan.nrrd", damaged(header + gzip.compress(voxels, 1), len(header)), check_scan


KINDS = (
    "NIfTI", "NIfTI, before it was compressed", "NIfTI, compressed", "NRRD", "NRRD, compressed voxels",
    "NRRD, header before compressed voxels",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_volumes(tmp_path, fault, many, kind):
    row = fault(f"a scan damaged: {kind}", "refused with its file named, or a scan; behind a checksum the same scan")
    name, contents, check = files_of(kind, tmp_path)
    path = tmp_path / name

    def read(content: bytes) -> Scan:
        path.write_bytes(content)
        return read_one(path)

    try_all(row, many(40, 400), contents, read, check, name)


@pytest.mark.parametrize("kind", ["explicit", "implicit", "run lengths", "many frames", "first slice"])
def test_damaged_dicom(tmp_path, fault, many, kind):
    row = fault(f"a file of a DICOM series damaged ({kind})", "refused with its folder named, or a scan")
    series = make_series(HU[..., :4], AFFINE)
    if kind == "implicit":
        for image in series:
            image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    if kind == "run lengths":
        for image in series:
            image.compress(RLELossless)
    folder = save([enhanced(series)] if kind == "many frames" else series, tmp_path / "the series")
    check_scan(read_one(folder))
    path = sorted(folder.iterdir())[0 if kind != "first slice" else -1]
    content = path.read_bytes()

    def read(content: bytes) -> Scan:
        path.write_bytes(content)
        return read_one(folder)

    # 132 bytes say that it is DICOM: without them it is another file
    contents = damaged(content[132:], 1200).map(lambda rest: content[:132] + rest)
    try_all(row, many(25, 200), contents, read, check_scan, "the series")


def test_a_slice_that_is_no_dicom_any_more_is_told(tmp_path, fault):
    row = fault("a slice at the end of a series that is no DICOM any more", "the others are read, and it is named")
    folder = save(make_series(HU, AFFINE), tmp_path / "series")
    by_place = sorted(folder.iterdir(), key=lambda path: find_scans(path)[0].series.planes[0].position[2])
    for path, content in itertools.product((by_place[0], by_place[-1]), (b"", b"nothing", bytes(5000))):
        whole = path.read_bytes()
        path.write_bytes(content)
        [source] = find_scans(folder)
        findings = Findings("series")
        assert read_scan(source, findings).shape[0] == HU.shape[2] - 1
        [told] = [finding for finding in findings if finding.kind == "left out"]
        assert path.name in told.message
        path.write_bytes(whole)
        row.times += 1


# --- labels

CODES = CodeVolume(
    np.random.default_rng(1).choice(4, (8, 10, 12), p=(0.7, 0.1, 0.1, 0.1)).astype(np.uint8),  # (z, y, x)
    np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], bool),
    ("aorta", "liver", "spleen"),
)


def labelled(folder: Path, kind: str) -> Path:
    """A subject, its labels as masks or as one file with names inside; the path of a file of labels."""
    write_nifti(folder / "s0" / "ct.nii.gz", HU, AFFINE)
    if kind.startswith("mask"):
        (folder / "s0" / "segmentations").mkdir()
        write_mask_files(folder / "s0" / "segmentations", CODES, GRID)
        return folder / "s0" / "segmentations" / "liver.nii.gz"
    write_label_image(folder / "s0" / "labels.nii.gz", CODES.codes, CODES.structures, GRID)
    return folder / "s0" / "labels.nii.gz"


def read_subject(data_dir: Path) -> CodeVolume:
    """Labels on the canonical axes. Raises what keeps the subject from being used."""
    [subject], _ = find_subjects(data_dir)
    findings = Findings(subject.name)
    _, grid = read_ct(subject, findings)
    volume = read_labels(subject, grid, findings)
    refuse(findings)
    return volume.with_codes(grid.to_canonical(volume.codes))


def check_codes(volume: CodeVolume) -> None:
    assert volume.codes.shape == CODES.codes.shape and volume.codes.dtype.kind == "u"
    assert volume.codebook.dtype == bool and volume.codebook.shape[1] == len(volume.structures) > 0
    assert not volume.codebook[0].any() and volume.codes.max() < len(volume.codebook)
    assert list(volume.structures) == sorted(set(volume.structures))


def check_same_masks(volume: CodeVolume) -> None:
    check_codes(volume)
    assert volume.structures == CODES.structures
    for name in CODES.structures:
        assert np.array_equal(volume.mask(name), CODES.mask(name))


@pytest.mark.parametrize("kind", ["mask, compressed", "mask, inside", "label image, compressed", "label image, inside"])
def test_damaged_labels(tmp_path, fault, many, kind):
    row = fault(f"labels damaged: {kind}", "refused with the file named, or masks; behind a checksum the same masks")
    path = labelled(tmp_path, kind)
    packed = path.read_bytes()
    check_same_masks(read_subject(tmp_path))
    inside = kind.endswith("inside")
    unpacked = gzip.decompress(packed)
    contents = damaged(unpacked, 900).map(lambda c: gzip.compress(c, 1)) if inside else damaged(packed, 30)

    def read(content: bytes) -> CodeVolume:
        path.write_bytes(content)
        return read_subject(tmp_path)

    try_all(row, many(25, 250), contents, read, check_codes if inside else check_same_masks, path.name)


NUMBERS = {
    "infinite": np.float32(np.inf), "infinite below": np.float32(-np.inf), "NaN": np.float32(np.nan),
    "half": np.float32(1.5), "large": np.float64(1e300), "beyond int64": np.uint64(2**64 - 1),
    "beyond int32": np.int64(2**40), "below": np.int64(-(2**40)), "not named": np.uint8(200),
}  # fmt: skip


@pytest.mark.parametrize("everywhere", [False, True])
def test_numbers_that_are_no_labels(tmp_path, fault, everywhere):
    row = fault("a label image with numbers that are none, or too large", "refused with the file named")
    for name, number in NUMBERS.items():
        labels = np.full(HU.shape, number) if everywhere else np.ones(HU.shape, np.asarray(number).dtype)
        labels[3, 4, 5] = number
        folder = tmp_path / name.replace(" ", "_")
        write_nifti(folder / "ct.nii.gz", HU, AFFINE)
        nib.Nifti1Image(labels, AFFINE, dtype=labels.dtype).to_filename(folder / "labels.nii.gz")
        (tmp_path / "labels.json").write_text('{"liver": 1}')
        [subject] = [each for each in find_subjects(tmp_path)[0] if each.name == folder.name]
        findings = Findings(subject.name)
        read_labels(subject, GRID, findings)
        assert findings.errors and "labels.nii.gz" in str(findings.errors[0])
        row.times += 1
