"""Scans of one's own, from the file to what viewers open."""

import gc

import highdicom
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import write_nifti
from dicom_files import make_series, save
from torch import nn

from segkit import augment, choices, predicting, settings
from segkit.errors import SegkitError
from segkit.inference import Predictor
from segkit.scans import Scan, find_scans


class Bright(nn.Module):
    """A network that calls liver what is above 200 HU, and never finds the second structure."""

    in_channels = 1

    def forward(self, images):
        return torch.cat([images - augment.normalize(torch.tensor(200.0)), images - 9], 1)


@pytest.fixture(scope="module")
def predictor():
    return Predictor(Bright(), {"liver": 0, "spleen": 1}, (20, 20), device="cpu")


def scan_file(path, affine=None, seed=0):
    """HU in squares of 4 x 4 voxels, so that what is bright is a shape and not noise; returns path and HU (i, j, k)."""
    squares = np.random.default_rng(seed).choice([-900, 40, 400], (5, 5, 6))
    hu = squares.repeat(4, 0).repeat(4, 1).astype(np.int16)
    return write_nifti(path, hu, np.diag([-2.0, 2.0, 3.0, 1.0]) if affine is None else affine), hu


def test_a_folder_of_scans_comes_back_on_their_own_grids(predictor, tmp_path):
    turned = np.array([[0, 0, 3.0, 5], [-2.0, 0, 0, 6], [0, 2.0, 0, 7], [0, 0, 0, 1]])
    volumes = {
        "a": scan_file(tmp_path / "in" / "a.nii.gz")[1],
        "b": scan_file(tmp_path / "in" / "b.nii.gz", turned, seed=1)[1],
    }
    out = tmp_path / "out"
    done = list(predicting.predict_scans(predictor, find_scans(tmp_path / "in"), out, ("masks", "csv"), progress=False))
    assert [outcome.source.name for outcome in done] == ["a", "b"]
    for outcome in done:
        name, source = outcome.source.name, nib.load(outcome.source.path)
        assert all(path.is_file() and path.is_relative_to(out / name) for path in outcome.files)
        assert set(outcome.seconds) == {"read", "segmented", "written"} and "1 of 2 structures" in str(outcome)
        mask = nib.load(out / name / "segmentations" / "liver.nii.gz")
        assert np.allclose(mask.affine, source.affine, atol=1e-5) and mask.shape == source.shape
        if name == "a":  # its slices lie as the network sees them, so squares come back as they are
            assert np.array_equal(np.asarray(mask.dataobj) > 0, volumes[name] > 200)
        assert not np.asarray(nib.load(out / name / "segmentations" / "spleen.nii.gz").dataobj).any()


def test_a_scan_that_cannot_be_read_is_said_and_the_others_are_done(predictor, tmp_path):
    scan_file(tmp_path / "in" / "good.nii.gz")
    whole = scan_file(tmp_path / "in" / "bad.nii.gz")[0].read_bytes()
    (tmp_path / "in" / "bad.nii.gz").write_bytes(whole[: len(whole) // 2])
    bad, good = predicting.predict_scans(
        predictor, find_scans(tmp_path / "in"), tmp_path / "out", ("nifti",), progress=False
    )
    assert bad.scan is None and bad.files == [] and str(bad) == "bad: not segmented"
    [finding] = [finding for finding in bad.findings if finding.severity == "error"]
    assert "bad.nii.gz" in str(finding) and not (tmp_path / "out" / "bad").exists()
    assert good.scan is not None and good.files


def test_what_cannot_be_done_is_refused_before_the_first_scan(predictor, tmp_path):
    sources = find_scans(scan_file(tmp_path / "a.nii.gz")[0])
    with pytest.raises(SegkitError, match=r"'gif': expected one or more of nifti, masks"):
        predicting.predict_scans(predictor, sources, tmp_path / "out", ("nifti", "gif"))
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "notes.txt").write_text("mine")
    with pytest.raises(SegkitError, match=r"out/a: holds files already"):
        predicting.predict_scans(predictor, sources, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "a").iterdir()] == ["notes.txt"]
    scan_file(tmp_path / "b.nii.gz")
    both = find_scans(tmp_path)
    [done] = predicting.predict_scans(predictor, both, tmp_path / "out", ("csv",), progress=False, resume=True)
    assert done.source.name == "b" and [path.name for path in done.files] == ["b_structures.csv"]


def test_a_scans_folder_is_whole_or_not_there(predictor, tmp_path, monkeypatch):
    path, _ = scan_file(tmp_path / "a.nii.gz")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pandas.DataFrame.to_csv", full)
    with pytest.raises(SegkitError, match=r"out/a/a_structures\.csv: the disk is full; make room"):
        list(predicting.predict_scans(predictor, find_scans(path), tmp_path / "out", ("nifti", "csv"), progress=False))
    assert list((tmp_path / "out").iterdir()) == []


def test_the_uncertainty_lies_on_the_scan_and_is_highest_at_edges(predictor, tmp_path):
    path, hu = scan_file(tmp_path / "a.nii.gz")
    [outcome] = predicting.predict_scans(
        predictor, find_scans(path), tmp_path / "out", ("nifti",), settings.Segmenting(uncertainty=True), progress=False
    )
    [unsure] = [file for file in outcome.files if file.name == "a_uncertainty.nii.gz"]
    image = nib.load(unsure)
    bits = np.asarray(image.dataobj)
    assert image.shape == hu.shape and np.allclose(image.affine, nib.load(path).affine)
    assert bits.min() >= 0 and bits.max() <= 1
    # the nearer a voxel is to the threshold of 200 HU, the less sure this network is: 40 and 400 HU against -900
    assert bits[hu == 400].mean() > 2 * bits[hu == -900].mean()
    figure = predicting.picture(outcome, slices=3)
    assert [axes.get_title() for axes in figure.axes[:3]] == [f"a, slice {z}" for z in (5, 3, 1)]
    assert len([axes for axes in figure.axes if axes.images]) == 9
    plt.close(figure)


def test_every_format_has_a_writer(predictor, tmp_path):
    path, _ = scan_file(tmp_path / "a.nii.gz")
    formats = [name for name in choices.FORMATS if name != "dicom"]  # needs a DICOM series
    [outcome] = predicting.predict_scans(predictor, find_scans(path), tmp_path / "out", formats, progress=False)
    assert all(file.stat().st_size for file in outcome.files) and len(set(outcome.files)) == len(outcome.files)
    ends = ("nii.gz", "json", "nrrd", "ctbl", "txt", "stl", "ply", "html", "csv")
    assert {end for end in ends if any(file.name.endswith(end) for file in outcome.files)} == set(ends)
    single = [str(file) for file in outcome.files if file.parent == outcome.folder]
    masks = len(list((outcome.folder / "segmentations").iterdir()))
    assert {*single, f"{outcome.folder / 'segmentations'} ({masks} files)"} < set(outcome.written)
    assert len(outcome.written) == len(single) + 3  # masks, stl and ply in a folder each


def test_the_torso_as_dicom_and_as_nifti_gives_the_same_masks(torso_dir, predictor, tmp_path):
    path = torso_dir / "s0000" / "ct.nii.gz"
    image = nib.load(path)
    series = save(make_series(np.asarray(image.dataobj), image.affine, intercept=0, signed=True), tmp_path / "series")
    formats, found = ("masks", "dicom"), {}
    for source, kinds in ((path, formats[:1]), (series, formats)):
        [outcome] = predicting.predict_scans(
            predictor, find_scans(source), tmp_path / "out", kinds, settings.Segmenting(largest=True), progress=False
        )
        mask = nib.load(tmp_path / "out" / outcome.source.name / "segmentations" / "liver.nii.gz")
        assert np.allclose(np.abs(np.linalg.det(mask.affine)), np.abs(np.linalg.det(image.affine)), rtol=1e-6)
        found[outcome.source.name] = np.asarray(nib.as_closest_canonical(mask).dataobj)
    assert np.array_equal(found["s0000"], found["series"]) and found["series"].sum() > 1_000
    [made] = [file for file in outcome.files if file.suffix == ".dcm"]
    read = highdicom.seg.segread(made)
    assert read.get_volume(combine_segments=True).array.sum() == found["series"].sum()


def test_no_volume_of_the_scan_before_is_kept(predictor, tmp_path, monkeypatch):
    for name in "abc":
        scan_file(tmp_path / "in" / f"{name}.nii.gz")
    read, alive = predicting.read_scan, []

    def counting(source, findings):
        gc.collect()
        alive.append(sum(type(each) is Scan for each in gc.get_objects()))
        return read(source, findings)

    monkeypatch.setattr(predicting, "read_scan", counting)
    for outcome in predicting.predict_scans(predictor, find_scans(tmp_path / "in"), tmp_path / "out", progress=False):
        assert outcome.scan is not None
        del outcome
    assert len(alive) == 3 and len(set(alive)) == 1


def test_a_scan_that_cannot_be_written_is_said_before_it_is_segmented(predictor, tmp_path, monkeypatch):
    hu = np.random.default_rng(0).integers(-900, 900, (9, 8, 6))
    for name, frame in (("good", "1.3"), ("bad", "")):
        save(make_series(hu, np.diag([2.0, 2.0, 3.0, 1.0]), FrameOfReferenceUID=frame), tmp_path / name)
    sources = [source for name in ("bad", "good") for source in find_scans(tmp_path / name)]
    segmented = []
    segment = Predictor.segment
    monkeypatch.setattr(
        Predictor, "segment", lambda self, scan, *rest: (segmented.append(scan.name), segment(self, scan, *rest))[1]
    )
    bad, good = predicting.predict_scans(predictor, sources, tmp_path / "out", ("slicer", "dicom"), progress=False)
    assert segmented == ["good"] and bad.scan is None and not (tmp_path / "out" / "bad").exists()
    assert "DICOM SEG" in str(bad.findings.errors[0]) and "bad" in str(bad.findings.errors[0])
    assert any(file.suffix == ".dcm" for file in good.files)


def test_locks_of_other_programs_are_left_alone(predictor, tmp_path):
    out = tmp_path / "out"
    (out / ".apt.lock").mkdir(parents=True)
    (out / ".apt.lock" / "file").touch()
    (out / ".other.lock").write_text("4711")
    (out / ".killed.lock").touch()
    scan_file(tmp_path / "in" / "a.nii.gz")
    [done] = predicting.predict_scans(predictor, find_scans(tmp_path / "in"), out, ("csv",), progress=False)
    assert done.files
    assert sorted(path.name for path in out.glob(".*")) == [".apt.lock", ".other.lock"]
    assert (out / ".apt.lock" / "file").exists()
