import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import write_nifti, write_subject

from segkit import staging
from segkit.errors import SegkitError, SubjectError
from segkit.staging import stage, stage_subject, structures_in
from segkit.subjects import find_subjects


def staged_equals_sources(staged, folder: Path) -> int:
    """Compare every mask and the CT with the files as nibabel reads them, in their own grid; the number of overlaps."""
    source = nib.load(folder / "ct.nii.gz")
    assert np.array_equal(staged.grid.from_canonical(staged.hu()), np.asanyarray(source.dataobj))
    assert np.allclose(staged.grid.affine, source.affine)
    volume = staged.labels()
    files = sorted((folder / "segmentations").glob("*.nii.gz"))
    assert [file.name[:-7] for file in files] == list(staged.structures)
    for file in files:
        mask = np.asanyarray(nib.load(file).dataobj) > 0
        name = file.name[:-7]
        assert np.array_equal(staged.grid.from_canonical(volume.mask(name)), mask), name
        assert staged.voxels[name] == mask.sum()
    return int((volume.codebook.sum(1) > 1).sum())


def test_phantoms_come_back_voxel_for_voxel_in_their_own_grid(phantom_data):
    overlaps = 0
    orientations = set()
    for staged in phantom_data.staged.values():
        overlaps += staged_equals_sources(staged, phantom_data.folder / staged.name)
        orientations.add(staged.grid.orientation)
    assert overlaps > 0 and len(orientations) > 1


def test_the_torso_with_planted_overlaps_comes_back_voxel_for_voxel(torso_dir, tmp_path):
    folder = tmp_path / "data" / "s0000"
    shutil.copytree(torso_dir / "s0000", folder)
    volumes = {f.name: np.asanyarray(nib.load(f).dataobj) for f in sorted((folder / "segmentations").iterdir())}
    held = [name for name, mask in volumes.items() if mask.any()]
    affine = nib.load(folder / "ct.nii.gz").affine
    for first, second in pairwise(held[:25]):
        places = np.argwhere(volumes[second])[:: max(1, int(volumes[second].sum()) // 40)]
        mask = volumes[first].copy()
        mask[tuple(places.T)] = 1
        (folder / "segmentations" / first).unlink()
        write_nifti(folder / "segmentations" / first, mask.astype(np.uint8), affine)
    subjects, _ = find_subjects(folder.parent)
    [staged], problems = stage(subjects, tmp_path / "store", progress=False)
    assert staged_equals_sources(staged, folder) >= 20 and not problems


def test_slices_are_those_of_the_canonical_volume(phantom_data):
    staged = next(iter(phantom_data.staged.values()))
    z = staged.shape[0] // 2
    assert np.array_equal(staged.hu(z), staged.hu()[z]) and staged.hu(z).dtype == np.int16
    assert np.array_equal(staged.labels(z).codes, staged.labels().codes[z])
    occurring = [name for name, runs in staged.info["slices"].items() if any(a <= z < b for a, b in runs)]
    assert occurring == [name for name in staged.structures if staged.labels(z).mask(name).any()]


@pytest.fixture
def two_subjects(tmp_path):
    masks = {"liver": np.zeros((4, 5, 6)), "aorta": np.zeros((4, 5, 6))}
    masks["liver"][1:3, 2, 2:5] = 1
    for name in ("s0000", "s0001"):
        write_subject(tmp_path / "data" / name, masks)
    return tmp_path / "data"


def test_runs_of_slices_by_hand(two_subjects, tmp_path):
    [first, _], _ = stage(find_subjects(two_subjects)[0], tmp_path / "store", progress=False)
    assert first.info["slices"] == {"aorta": [], "liver": [[2, 5]]}
    assert first.shape == (6, 5, 4) and first.spacing_mm == (3, 2, 2)
    readable = (first.folder / "subject.json").read_text()
    assert '"shape": [ 6, 5, 4 ]' in readable and json.loads(readable) == first.info


def test_a_second_run_stages_nothing_and_a_changed_source_is_staged_again(two_subjects, tmp_path, monkeypatch):
    subjects, _ = find_subjects(two_subjects)
    stage(subjects, tmp_path / "store", progress=False)
    written = []
    original = staging._write_store
    monkeypatch.setattr(staging, "_write_store", lambda s, *more: written.append(s.name) or original(s, *more))
    stage(subjects, tmp_path / "store", progress=False)
    assert written == []
    path = subjects[1].labels.masks["aorta"]
    write_nifti(path, np.ones((4, 5, 6), np.uint8))
    os.utime(path, ns=(1, 1))
    [_, second], _ = stage(subjects, tmp_path / "store", progress=False)
    assert written == ["s0001"] and second.voxels["aorta"] == 120


def test_two_data_folders_share_a_store_without_mixing(two_subjects, tmp_path):
    shutil.copytree(two_subjects, tmp_path / "other" / "data")
    write_nifti(tmp_path / "other" / "data" / "s0000" / "segmentations" / "aorta.nii.gz", np.ones((4, 5, 6), np.uint8))
    [a, _], _ = stage(find_subjects(two_subjects)[0], tmp_path / "store", progress=False)
    [b, _], _ = stage(find_subjects(tmp_path / "other" / "data")[0], tmp_path / "store", progress=False)
    assert (a.labels().voxels()["aorta"], b.labels().voxels()["aorta"]) == (0, 120)


def test_parallel_gives_the_same_store(two_subjects, tmp_path):
    subjects, _ = find_subjects(two_subjects)
    one, _ = stage(subjects, tmp_path / "one", progress=False)
    two, _ = stage(subjects, tmp_path / "two", jobs=2, progress=False)
    assert [s.info for s in one] == [s.info for s in two]
    assert all(np.array_equal(a.labels().codes, b.labels().codes) for a, b in zip(one, two, strict=True))


def bad_ct(folder, value):
    ct = np.zeros((4, 5, 6), np.float32)
    ct[1, 2, 3] = value
    write_nifti(folder / "ct.nii.gz", ct)


def other_shape(folder):
    write_nifti(folder / "segmentations" / "liver.nii.gz", np.ones((4, 5, 7), np.uint8))


def other_place(folder):
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[0, 3] = 1.5
    write_nifti(folder / "segmentations" / "liver.nii.gz", np.ones((4, 5, 6), np.uint8), affine)


def other_orientation(folder):
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    write_nifti(folder / "segmentations" / "liver.nii.gz", np.ones((4, 5, 6), np.uint8), affine)


def nan_mask(folder):
    write_nifti(folder / "segmentations" / "liver.nii.gz", np.full((4, 5, 6), np.nan, np.float32))


def dangling_link(folder):
    (folder / "segmentations" / "liver.nii.gz").unlink()
    (folder / "segmentations" / "liver.nii.gz").symlink_to(folder / "gone")


def cut_short(folder):
    path = folder / "segmentations" / "liver.nii.gz"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: bad_ct(folder, np.nan), r"ct\.nii\.gz: 1 voxels are NaN"),
        (lambda folder: bad_ct(folder, np.inf), r"ct\.nii\.gz: 1 voxels are NaN or infinite"),
        (other_shape, r"liver\.nii\.gz: another grid"),
        (other_place, r"liver\.nii\.gz: another grid.*1\.50 mm apart"),
        (other_orientation, r"liver\.nii\.gz: another grid.*found .*LAS"),
        (nan_mask, r"liver\.nii\.gz: 120 voxels are NaN"),
        (dangling_link, r"liver\.nii\.gz: cannot be read"),
        (cut_short, r"liver\.nii\.gz: damaged or cut short"),
    ],
)
def test_a_bad_subject_is_named_skipped_and_leaves_nothing(two_subjects, tmp_path, damage, says):
    damage(two_subjects / "s0001")
    subjects, _ = find_subjects(two_subjects)
    with pytest.raises(SubjectError, match=f"subject s0001: .*{says}"):
        stage_subject(subjects[1], tmp_path / "single")
    assert not list((tmp_path / "single").glob("*"))
    staged, problems = stage(subjects, tmp_path / "store", progress=False)
    assert [s.name for s in staged] == ["s0000"] and len(problems) == 1 and "s0001" in str(problems[0])
    with pytest.raises(SegkitError, match="none of the 1 subjects"):
        stage(subjects[1:], tmp_path / "store", progress=False)


def test_small_offsets_other_values_and_clipped_hu_are_accepted_and_noted(two_subjects, tmp_path):
    folder = two_subjects / "s0000"
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[0, 3] = 0.21  # as in one subject of the public data set
    write_nifti(folder / "segmentations" / "aorta.nii.gz", np.full((4, 5, 6), 4, np.uint8), affine)
    ct = np.full((4, 5, 6), 1.4, np.float32)
    ct[0, 0, 0], ct[1, 0, 0] = 1e6, -1e6
    write_nifti(folder / "ct.nii.gz", ct)
    staged = stage_subject(find_subjects(two_subjects)[0][0], tmp_path / "store")
    assert staged.voxels["aorta"] == 120
    assert any("aorta" in note and "0.210 mm" in note for note in staged.info["notes"])
    assert any("values go from -1e+06 to 1e+06" in note for note in staged.info["notes"])
    assert np.unique(staged.hu()).tolist() == [-32768, 1, 32767]


def test_a_damaged_store_is_named_or_staged_again(two_subjects, tmp_path):
    subjects, _ = find_subjects(two_subjects)
    staged = stage_subject(subjects[0], tmp_path / "store")
    [codes] = staged.folder.glob("codes-*.b2nd")
    codes.write_bytes(b"nonsense".ljust(codes.stat().st_size))
    again = stage_subject(subjects[0], tmp_path / "store")
    with pytest.raises(SegkitError, match=r"codes-\w+\.b2nd: damaged store"):
        again.labels()
    codes.write_bytes(b"cut short")
    assert stage_subject(subjects[0], tmp_path / "store").labels().codes.shape == (6, 5, 4)
    (staged.folder / "subject.json").write_text("{")
    assert stage_subject(subjects[0], tmp_path / "store").labels().codes.shape == (6, 5, 4)


@pytest.mark.parametrize("jobs", [0, -1, 1.5])
def test_jobs_are_a_whole_number(two_subjects, tmp_path, jobs):
    with pytest.raises(SegkitError, match="JOBS"):
        stage(find_subjects(two_subjects)[0], tmp_path / "store", jobs=jobs)


def test_the_store_may_not_lie_inside_the_data(two_subjects):
    subjects, _ = find_subjects(two_subjects)
    with pytest.raises(SegkitError, match="inside the data"):
        stage(subjects, two_subjects / "staged", progress=False)
    assert sorted(p.name for p in two_subjects.iterdir()) == ["s0000", "s0001"]


def test_structures_are_those_of_all_subjects(two_subjects, tmp_path):
    write_nifti(two_subjects / "s0001" / "segmentations" / "mine.nii.gz", np.ones((4, 5, 6), np.uint8))
    staged, _ = stage(find_subjects(two_subjects)[0], tmp_path / "store", progress=False)
    assert structures_in(staged) == ["aorta", "liver", "mine"]
