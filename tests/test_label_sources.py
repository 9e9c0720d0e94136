"""The ways in which people keep labels: each must give the same masks as a file a structure does."""

import gzip
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import write_nifti, write_subject

from segkit.dataset import open_data
from segkit.errors import Findings, SegkitError
from segkit.formats.label_image import LabelImage, embedded_names, numbers_of, read_names
from segkit.formats.nifti import Grid
from segkit.staging import stage
from segkit.subjects import find_subjects

AFFINE = np.diag([-2.0, 2.0, 3.0, 1.0])


@pytest.fixture
def labels() -> np.ndarray:
    """Numbers 0, 1, 2 and 7 in a volume (i, j, k)."""
    return np.random.default_rng(5).choice([0, 0, 0, 1, 2, 7], (6, 7, 8)).astype(np.uint8)


def write_ct(path: Path, shape) -> None:
    """Noise, of each name another: the same scan twice would be said."""
    noise = np.random.default_rng(list(f"{path.parent.name} {path.name}".encode()))
    write_nifti(path, noise.integers(-1000, 900, shape).astype(np.int16), AFFINE)


def staged_masks(data_dir: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    subjects, problems = find_subjects(data_dir)
    assert problems == []
    [staged], problems = stage(subjects, tmp_path / "store", progress=False)
    assert problems == []
    volume = staged.labels()
    return {name: staged.grid.from_canonical(volume.mask(name)) for name in volume.structures}


def with_table(labels: np.ndarray, names: dict[str, int], path: Path) -> None:
    """A label image with names as TotalSegmentator embeds them, written with nibabel."""
    rows = "".join(
        f'<Label Key="{key}" Red="1" Green="0.5" Blue="0" Alpha="1"><![CDATA[{name}]]></Label>'
        for name, key in names.items()
    )
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?><CaretExtension><Date><![CDATA[2013-07-14]]></Date>'
        f'<VolumeInformation Index="0"><LabelTable>{rows}</LabelTable><VolumeType>Label</VolumeType>'
        "</VolumeInformation></CaretExtension>"
    )
    image = nib.Nifti1Image(labels, AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, xml.encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def test_names_from_the_table_inside_the_file(tmp_path, labels):
    folder = tmp_path / "data" / "s0000"
    write_ct(folder / "ct.nii.gz", labels.shape)
    with_table(labels, {"liver": 2, "spleen": 1, "kidney_left": 7, "prostate": 9}, folder / "seg.nii.gz")
    masks = staged_masks(tmp_path / "data", tmp_path)
    assert list(masks) == ["kidney_left", "liver", "prostate", "spleen"]
    assert np.array_equal(masks["liver"], labels == 2) and np.array_equal(masks["kidney_left"], labels == 7)
    assert not masks["prostate"].any()  # in the table, so looked for, and not there


@pytest.mark.parametrize("content", [{"1": "a", "2": "b", "7": "c"}, {"a": 1, "b": 2, "c": 7, "background": 0}])
@pytest.mark.parametrize("where", ["s0000/seg.json", "labels.json"])
def test_names_from_a_json_file(tmp_path, labels, content, where):
    folder = tmp_path / "data" / "s0000"
    write_ct(folder / "ct.nii.gz", labels.shape)
    write_nifti(folder / "seg.nii.gz", labels.astype(np.float32), AFFINE)
    (tmp_path / "data" / where).write_text(json.dumps(content))
    masks = staged_masks(tmp_path / "data", tmp_path)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        name: int((labels == number).sum()) for name, number in (("a", 1), ("b", 2), ("c", 7))
    }


def nnunet_folder(root: Path, labels: np.ndarray, table: dict, ending: str = ".nii.gz", **more) -> Path:
    for part, case in (("Tr", "liver_01"), ("Tr", "liver_02"), ("Ts", "liver_03")):
        write_ct(root / f"images{part}" / f"{case}_0000{ending}", labels.shape)
        write_nifti(root / f"labels{part}" / f"{case}{ending}", labels, AFFINE)
    content = {"channel_names": {"0": "CT"}, "labels": table, "numTraining": 2, "file_ending": ending, **more}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_an_nnunet_raw_folder_with_regions(tmp_path, labels, ending):
    table = {"background": 0, "whole organ": [1, 2], "tumor": 2, "vessel": 7}
    root = nnunet_folder(tmp_path / "Dataset001", labels, table, ending)
    data = open_data(root, tmp_path / "store", progress=False)
    assert [part.subject for part in data.split.test] == ["liver_03"] and not data.problems
    assert len(data.split.train) == len(data.split.val) == 1
    assert list(data.label_map) == ["tumor", "vessel", "whole_organ"]
    staged = data.staged["liver_01"]
    for name, numbers in (("whole_organ", [1, 2]), ("tumor", [2]), ("vessel", [7])):
        expected = np.isin(labels, numbers)
        assert np.array_equal(staged.grid.from_canonical(staged.labels().mask(name)), expected)


def test_nnunet_version_1_and_several_channels(tmp_path, labels):
    root = nnunet_folder(tmp_path / "Task001", labels, {"0": "background", "1": "a", "2": "b", "7": "c"})
    content = json.loads((root / "dataset.json").read_text())
    del content["channel_names"], content["file_ending"]
    (root / "dataset.json").write_text(json.dumps({**content, "modality": {"0": "PET", "1": "CT"}}))
    for path in list(root.glob("images*/*_0000.nii.gz")):
        shutil.copy(path, path.with_name(path.name.replace("_0000", "_0001")))
        write_nifti(path, np.zeros(labels.shape, np.int16), AFFINE)  # if this one were read: one value everywhere
    data = open_data(root, tmp_path / "store", progress=False)
    assert list(data.label_map) == ["a", "b", "c"] and len(data.staged) == 3
    (root / "dataset.json").write_text(json.dumps({**content, "modality": {"0": "PET", "1": "MR"}}))
    with pytest.raises(SegkitError, match=r"dataset\.json: expected one channel called CT"):
        find_subjects(root)


def test_nnunet_problems_are_named(tmp_path, labels):
    root = nnunet_folder(tmp_path / "Dataset001", labels, {"background": 0, "a": 1, "b": 2, "ignore": 7})
    (root / "labelsTr" / "liver_02.nii.gz").unlink()
    write_nifti(root / "labelsTs" / "liver_03.nii.gz", np.where(labels == 7, 0, labels), AFFINE)
    subjects, [problem] = find_subjects(root)
    assert problem.subject == "liver_02" and "has no label file" in problem.message
    [staged], [problem] = stage(subjects, tmp_path / "store", progress=False)
    assert staged.name == "liver_03"  # holds no voxel to ignore
    assert problem.subject == "liver_01" and "hold 7, which means that nobody annotated them" in problem.message
    for damage, says in (
        ({"file_ending": ".nrrd"}, "file_ending '.nrrd'"),
        ({"labels": {"a": "x"}}, "expected a whole number"),
        ({"labels": {"a": 1, "a ": 2}}, "'a' comes twice"),
        ({"labels": {"../a": 1}}, "cannot be used as a name"),
        ({"channel_names": 3}, "expected channel_names"),
    ):
        content = json.loads((root / "dataset.json").read_text())
        (root / "dataset.json").write_text(json.dumps({**content, **damage}))
        with pytest.raises(SegkitError, match=says):
            find_subjects(root)
        (root / "dataset.json").write_text(json.dumps(content))


def test_scans_to_be_segmented_are_no_subjects(tmp_path, labels):
    """imagesTs without labelsTs, as most nnU-Net data sets come."""
    root = nnunet_folder(tmp_path / "Dataset001", labels, {"background": 0, "a": 1, "b": 2})
    shutil.rmtree(root / "labelsTs", ignore_errors=True)
    assert list((root / "imagesTs").iterdir())
    subjects, problems = find_subjects(root)
    assert [subject.split for subject in subjects] == [None] * len(subjects) and problems == []


def test_uncompressed_files_are_the_same_as_compressed_ones(tmp_path):
    masks = {name: np.random.default_rng(n).random((5, 6, 7)) < 0.2 for n, name in enumerate(("aorta", "liver"))}
    write_subject(tmp_path / "packed" / "s0000", masks, affine=AFFINE)
    for path in (tmp_path / "packed").rglob("*.nii.gz"):
        plain = tmp_path / "plain" / path.relative_to(tmp_path / "packed").with_suffix("")
        plain.parent.mkdir(parents=True, exist_ok=True)
        plain.write_bytes(gzip.decompress(path.read_bytes()))
    found = staged_masks(tmp_path / "plain", tmp_path)
    assert list(found) == ["aorta", "liver"]
    assert all(np.array_equal(found[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "found none"),
        (["a.nii.gz", "b.nii.gz"], r"found a\.nii\.gz, b\.nii\.gz"),
        (["a.nii.gz"], "nothing names its numbers"),
    ],
)
def test_a_folder_without_usable_labels_says_what_was_expected(tmp_path, labels, names, says):
    folder = tmp_path / "data" / "s0000"
    write_ct(folder / "ct.nii.gz", labels.shape)
    for name in names:
        write_nifti(folder / name, labels, AFFINE)
    with pytest.raises(SegkitError, match=says):
        find_subjects(tmp_path / "data")


def findings_of(path: Path, labels: np.ndarray, numbers: dict) -> list[tuple[str, str]]:
    findings = Findings("s1")
    volume = LabelImage(write_nifti(path, labels, AFFINE), numbers).read(Grid((6, 7, 8), AFFINE), findings)
    assert volume.codes.shape == (6, 7, 8)
    return [(finding.kind, finding.message) for finding in findings]


def test_numbers_without_a_name_and_volumes_that_are_no_label_image(tmp_path, labels):
    [(kind, message)] = findings_of(tmp_path / "a.nii.gz", labels, {"a": (1,), "b": (2,)})
    assert kind == "unnamed label" and f"{int((labels == 7).sum())} voxels hold 7" in message
    negative = labels.astype(np.int16)
    negative[0, 0, 0] = -3
    kinds = [kind for kind, _ in findings_of(tmp_path / "b.nii.gz", negative, {"a": (1,), "b": (2,), "c": (7,)})]
    assert kinds == ["unnamed label"]
    for wrong in (labels + np.float32(0.5), np.where(labels == 1, np.nan, labels).astype(np.float32)):
        assert [kind for kind, _ in findings_of(tmp_path / "c.nii.gz", wrong, {"a": (1,)})] == ["no label image"]
    huge = labels.astype(np.int32)
    huge[0, 0, 0] = 2**30
    assert [kind for kind, _ in findings_of(tmp_path / "d.nii.gz", huge, {"a": (1,)})] == ["no label image"]
    kinds = [kind for kind, _ in findings_of(tmp_path / "e.nii.gz", labels[:5], {"a": (1,)})]
    assert kinds == ["other grid"]


def test_damaged_or_hostile_tables_are_refused(tmp_path, labels):
    path = tmp_path / "seg.nii.gz"
    with_table(labels, {"liver": 1}, path)
    assert embedded_names(path, "s1") == {"liver": 1}
    for xml in (
        b"<LabelTable><Label Key='1'>",
        b"<a><LabelTable><Label>liver</Label></LabelTable></a>",
        b"<!DOCTYPE a [<!ENTITY b 'c'>]><a><LabelTable><Label Key='1'>&b;</Label></LabelTable></a>",
    ):
        image = nib.Nifti1Image(labels, AFFINE)
        image.header.extensions.append(nib.nifti1.Nifti1Extension(0, xml))
        nib.save(image, path)
        with pytest.raises(SegkitError, match=r"subject s1: .*seg\.nii\.gz: damaged label table"):
            embedded_names(path, "s1")
    for content in ("{", "[]", "{}", '{"a": "b", "c": "b"}', '{"a": [0, 1]}', '{"0": "background"}'):
        (tmp_path / "names.json").write_text(content)
        with pytest.raises(SegkitError, match=r"names\.json"):
            read_names(tmp_path / "names.json")
    assert numbers_of([("left kidney", 3), ("b/c", [2, 1])], "x") == {"b_c": (1, 2), "left_kidney": (3,)}
