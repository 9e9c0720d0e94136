"""Scans found in files and folders of any kind, read alike, and ready to be predicted."""

import numpy as np
import pytest
import torch
from conftest import write_nifti, write_subject
from dicom_files import make_series, save

from segkit.errors import Findings, SegkitError, SubjectError
from segkit.formats.nifti import Grid, read_volume
from segkit.inference import Predictor
from segkit.scans import Scan, find_scans, read_scan
from segkit.staging import stage_subject
from segkit.subjects import find_subjects
from segkit.unet import UNet2D

VOLUME = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)


def read(source) -> tuple[Scan, Findings]:
    [found] = find_scans(source)
    findings = Findings(found.name)
    return read_scan(found, findings), findings


def write_nrrd(path, volume=VOLUME, affine=None):
    """As 3D Slicer does: LPS+."""
    nrrd = pytest.importorskip("nrrd")
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ (np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine)
    header = {"space": "left-posterior-superior", "space directions": lps[:3, :3].T, "space origin": lps[:3, 3]}
    nrrd.write(str(path), volume, header)
    return path


def names(source) -> list[str]:
    return [found.name for found in find_scans(source)]


def test_what_is_found_where(tmp_path):
    files = tmp_path / "files"
    for name in ("b.nii.gz", "a scan.nii", ".hidden.nii.gz"):
        write_nifti(files / name, VOLUME)
    write_nrrd(files / "c.nrrd")
    write_nrrd(files / "c.seg.nrrd")
    assert names(files) == ["a_scan", "b", "c"]
    assert names(files / "a scan.nii") == ["a_scan"] and names(str(files / "c.nrrd")) == ["c"]
    subjects = tmp_path / "subjects"
    for name in ("s0002", "s0001"):
        write_subject(subjects / name, {"liver": np.ones((3, 4, 5), bool)})
    (subjects / "empty").mkdir()
    assert names(subjects) == ["s0001", "s0002"]
    assert names(subjects / "s0001") == ["s0001"] and names(subjects / "s0001" / "ct.nii.gz") == ["s0001"]


def test_scans_are_named_also_from_inside_their_folder(tmp_path, monkeypatch):
    write_subject(tmp_path / "s0007", {"liver": np.ones((3, 4, 5), bool)})
    save(make_series(VOLUME, np.eye(4)), tmp_path / "thorax" / "images")
    monkeypatch.chdir(tmp_path / "s0007" / "segmentations")
    assert names("../ct.nii.gz") == ["s0007"] and names("..") == ["s0007"]
    monkeypatch.chdir(tmp_path / "thorax" / "images")
    assert names("..") == ["thorax"] and names(".") == ["images"]


def test_nothing_usable_says_what_is(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "notes.txt").write_text("nothing")
    for source in (tmp_path / "a", tmp_path / "a" / "b" / "notes.txt", tmp_path / "nowhere"):
        with pytest.raises(SegkitError, match=r"expected a \.nii\.gz, \.nii or \.nrrd file, a folder of such") as error:
            find_scans(source)
        assert str(error.value).startswith(str(source))
    (tmp_path / "scan.nhdr").write_text("NRRD0004\n")
    with pytest.raises(SegkitError, match="save the scan as one file"):
        find_scans(tmp_path / "scan.nhdr")


def test_names_that_become_one_and_names_that_cannot_be_used(tmp_path):
    for name in ("a b.nii.gz", "a_b.nii"):
        write_nifti(tmp_path / "a" / name, VOLUME)
    with pytest.raises(SegkitError, match="would both be called a_b: rename one"):
        find_scans(tmp_path / "a")
    write_nifti(tmp_path / "b" / "%%%.nii", VOLUME)
    with pytest.raises(SegkitError, match=r"%%%\.nii: .*; rename it"):
        find_scans(tmp_path / "b")


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SLP", "PIR"])
def test_nrrd_and_nifti_are_the_same_scan(tmp_path, orientation):
    affine = np.zeros((4, 4))
    for column, letter in enumerate(orientation):
        row, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[letter]
        affine[row, column] = sign * (0.7, 1.5, 3)[column]
    affine[:, 3] = (-10, 20, 30, 1)
    ours, findings = read(write_nrrd(tmp_path / "a.nrrd", affine=affine))
    same, _ = read(write_nifti(tmp_path / "a.nii.gz", VOLUME, affine))
    assert np.array_equal(ours.hu(), same.hu()) and np.allclose(ours.grid.affine, same.grid.affine)
    assert ours.grid.orientation == orientation and list(findings) == []
    assert np.array_equal(ours.grid.from_canonical(ours.hu()), VOLUME)
    assert ours.files == (tmp_path / "a.nrrd",)


@pytest.mark.parametrize(
    ("volume", "kind", "words"),
    [
        (VOLUME / np.float32(2000) + 0.5, "scaled CT", "undo the scaling"),
        ((VOLUME // 16 + 100).clip(0, 255).astype(np.uint8), "no air", "an 8-bit image"),
        (np.where(VOLUME > 900, np.int32(60_000), VOLUME), "HU range", "clipped"),
    ],
)
def test_what_is_doubtful_is_reported_and_read(tmp_path, volume, kind, words):
    scan, findings = read(write_nifti(tmp_path / "a.nii.gz", volume))
    assert [(finding.severity, finding.kind) for finding in findings] == [("warning", kind)]
    assert words in str(findings[0]) and f"subject a: {tmp_path / 'a.nii.gz'}" in str(findings[0])
    assert scan.hu().dtype == np.int16
    assert np.array_equal(scan.grid.from_canonical(scan.hu()), np.rint(np.clip(volume, -32768, 32767)))


def sheared() -> np.ndarray:
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[1, 2] = 0.5  # over five steps 2.5 mm
    return affine


@pytest.mark.parametrize(
    ("volume", "affine", "kind", "words"),
    [
        (np.where(VOLUME > 900, np.float32(np.nan), VOLUME), None, "NaN", "NaN or infinite, expected HU"),
        (np.full((3, 3, 3), 7, np.int16), None, "empty CT", "holds 7 everywhere"),
        (np.zeros((3, 3, 3, 2), np.int16), None, "unreadable", "expected one 3-D volume"),
        (VOLUME, sheared(), "sheared grid", "its axes are not perpendicular, by 9.5 degrees"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, volume, affine, kind, words):
    path = write_nifti(tmp_path / "a.nii.gz", volume, affine)
    [found] = find_scans(path)
    findings = Findings(found.name)
    with pytest.raises(SubjectError, match=words) as error:
        read_scan(found, findings)
    assert [finding.kind for finding in findings.errors] == [kind]
    assert str(error.value) == str(findings.errors[0])


def test_a_damaged_file_among_good_ones_is_refused_alone(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", VOLUME)
    write_nrrd(tmp_path / "b.nrrd").write_bytes(b"NRRD0004\n")
    good, bad = find_scans(tmp_path)
    assert read_scan(good, Findings("a")).shape == (6, 5, 4)
    with pytest.raises(SubjectError, match=r"b\.nrrd"):
        read_scan(bad, Findings("b"))


def test_a_nifti_without_orientation_is_read_with_a_warning(tmp_path):
    import nibabel as nib

    image = nib.Nifti1Image(VOLUME, None)
    image.header.set_zooms((2, 2, 3))
    nib.save(image, tmp_path / "a.nii.gz")
    scan, findings = read(tmp_path / "a.nii.gz")
    assert [(finding.severity, finding.kind) for finding in findings] == [("warning", "no orientation")]
    assert scan.spacing_mm == (3, 2, 2)


def test_a_scan_has_the_face_of_a_staged_subject(tmp_path):
    """The same slices and the same prediction as for the same CT staged; nothing is annotated."""
    random = np.random.default_rng(1)
    volume = random.integers(-1000, 1000, (9, 8, 7)).astype(np.int16)
    affine = np.diag([-2.0, 1.5, -3.0, 1.0])
    write_subject(tmp_path / "data" / "s1", {"liver": random.random((9, 8, 7)) < 0.1}, volume, affine)
    [subject], _ = find_subjects(tmp_path / "data")
    staged = stage_subject(subject, tmp_path / "stage")
    scan, _ = read(tmp_path / "data" / "s1")
    assert isinstance(scan.grid, Grid) and scan.grid.orientation == staged.grid.orientation == "LAI"
    assert (scan.name, scan.shape, scan.spacing_mm) == (staged.name, staged.shape, staged.spacing_mm)
    for z in (0, 3, slice(2, 5), slice(None)):
        assert np.array_equal(scan.hu(z), staged.hu(z)) and scan.hu(z).flags.c_contiguous
        labels = scan.labels(z)
        assert labels.structures == () and labels.codes.shape == staged.labels(z).codes.shape and not labels.codes.any()
    torch.manual_seed(0)
    network = UNet2D(1, 2, features=(4, 8))
    predictor = Predictor(network, {"liver": 0, "spleen": 1}, (16, 16), device="cpu")
    ours, theirs = predictor.segment(scan), predictor.segment(staged)
    assert len(np.unique(theirs.codes.codes)) > 1 and np.array_equal(ours.codes.codes, theirs.codes.codes)
    assert np.array_equal(ours.best, theirs.best)
    assert np.array_equal(predictor.predict(scan).codes, predictor.predict(staged).codes)


def test_the_real_torso_as_dicom(torso_dir, tmp_path):
    """A series made of it is the same scan as its NIfTI, voxel by voxel and mm by mm."""
    volume, grid = read_volume(torso_dir / "s0000" / "ct.nii.gz", "s0000")
    for place, order in enumerate([(0, 1, 2), (1, 2, 0), (2, 0, 1)]):  # axial, sagittal, coronal
        affine = grid.affine[:, [*order, 3]]
        turned = volume.transpose(order)[..., ::4]
        affine[:, 2] *= 4
        scan, findings = read(
            save(make_series(turned, affine, intercept=0, signed=True), tmp_path / str(place), seed=place)
        )
        same, _ = read(write_nifti(tmp_path / f"{place}.nii.gz", turned, affine))
        assert list(findings) == [] and np.array_equal(scan.hu(), same.hu())
        assert np.allclose(scan.grid.canonical_affine, same.grid.canonical_affine, atol=1e-4)
