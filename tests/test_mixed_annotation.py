"""A folder that mixes releases of the public data set and structures of one's own trains in one run."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from segkit import labels, losses
from segkit.augment import to_network
from segkit.checkpoints import best_checkpoint, load_checkpoint
from segkit.dataset import open_data
from segkit.evaluation import evaluate
from segkit.inference import Predictor
from segkit.settings import TrainSettings
from segkit.slices import SliceDataset, batches
from segkit.steps import train_voxels
from segkit.training import train
from segkit.unet import UNet2D

V1_ONLY = ("heart_atrium_left", "pulmonary_artery", "face")
SUBJECTS = {"s0000": "v1", "s0001": "v2", "s0002": "v3", "s0003": "own"}


def convert(folder: Path, kind: str) -> None:
    """Make a phantom of v2 one of another release, by its mask files alone."""
    masks = folder / "segmentations"
    if kind == "v1":
        for path in masks.iterdir():
            if path.name.removesuffix(".nii.gz") not in labels.official_names("v1"):
                path.unlink()
        for new in V1_ONLY:
            shutil.copy(masks / "aorta.nii.gz", masks / f"{new}.nii.gz")
    if kind == "v3":
        (masks / "vertebrae_S1.nii.gz").rename(masks / "vertebrae_L6.nii.gz")
    if kind == "own":
        shutil.copy(masks / "liver.nii.gz", masks / "my_tumor.nii.gz")
        (masks / "spleen.nii.gz").unlink()


@pytest.fixture(scope="module")
def mixed_dir(phantom_dir, tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("mixed") / "data"
    for name, kind in SUBJECTS.items():
        shutil.copytree(phantom_dir / name, data_dir / name)
        convert(data_dir / name, kind)
    shutil.copytree(phantom_dir / "s0004", data_dir / "s0004")
    # the four of different kinds train; a fifth, of v2, validates and stands in for test
    rows = ["image_id;split", *(f"{name};train" for name in SUBJECTS), "s0004;val"]
    (data_dir / "meta.csv").write_text("\n".join(rows))
    return data_dir


@pytest.fixture(scope="module")
def mixed(mixed_dir, tmp_path_factory):
    return open_data(mixed_dir, tmp_path_factory.mktemp("staged"), progress=False)


def test_the_label_map_is_the_union_in_the_official_order(mixed):
    assert len(mixed.label_map) == 117 + len(V1_ONLY) + 2  # vertebrae_L6 and my_tumor
    names = list(mixed.label_map)
    trained = [part.subject for part in mixed.split.train]
    expected = set()
    for name in trained:
        expected |= {path.name[:-7] for path in (mixed.folder / name / "segmentations").iterdir()}
    assert set(names) == expected
    official = [name for name in names if name in labels.OFFICIAL]
    assert official == [name for name in labels.OFFICIAL if name in expected]
    assert names == official + sorted(expected - set(labels.OFFICIAL))


def test_per_structure_counts_are_those_of_the_files(mixed):
    table = mixed.structures()
    for split in ("train", "val", "test"):
        subjects = [part.subject for part in getattr(mixed.split, split)]
        for name in ("liver", "spleen", "vertebrae_S1", "vertebrae_L6", "my_tumor", "heart", "face", "prostate"):
            if name not in table.index:
                continue
            files = [mixed.folder / subject / "segmentations" / f"{name}.nii.gz" for subject in subjects]
            masks = [np.asanyarray(nib.load(path).dataobj) for path in files if path.exists()]
            assert table.loc[name, f"{split}_annotated"] == len(masks), (name, split)
            assert table.loc[name, f"{split}_present"] == sum(mask.any() for mask in masks), (name, split)
    spleens = [mixed.staged[part.subject] for part in mixed.split.train if part.subject != "s0003"]
    slices = sum(int(subject.labels().mask("spleen").any((1, 2)).sum()) for subject in spleens)
    assert table.loc["spleen", "train_slices"] == slices


def test_frequencies_count_only_who_annotates(mixed):
    frequencies = losses.structure_frequencies(train_voxels(mixed), mixed.label_map)
    trained = {part.subject: mixed.staged[part.subject] for part in mixed.split.train}
    for name in ("spleen", "vertebrae_L6", "liver"):
        who = [subject for subject in trained.values() if name in subject.structures]
        inside = sum(subject.voxels[name] for subject in who)
        annotated = sum(int(np.prod(subject.shape)) for subject in who)
        expected = (inside + 1) / (annotated + 2)
        assert float(frequencies[mixed.label_map[name]]) == pytest.approx(expected, rel=1e-6)


def test_it_trains_and_scores_only_what_is_annotated(mixed, tmp_path):
    settings = TrainSettings(
        epochs=1, batch_size=4, target_shape=(32, 32), features=(4, 8), slices_per_epoch=24, validation_slices=8,
        balance=0.5, context=1, device="cpu",
    )  # fmt: skip
    history = train(mixed, settings, tmp_path, progress=False)
    assert np.isfinite(history[0]["train_loss"])
    checkpoint = load_checkpoint(best_checkpoint(tmp_path), mixed.label_map)
    assert checkpoint.model.in_channels == 3
    predictor = Predictor(checkpoint.model, checkpoint.label_map, checkpoint.target_shape, device="cpu")
    scores = evaluate(predictor, mixed.staged, mixed.split.test, "test", progress=False).scores
    # the test subject is of v2: vertebrae_L6, my_tumor and what only v1 has were not annotated in it
    scored = set(scores["structure"])
    assert scored == set(mixed.staged["s0004"].structures) & set(mixed.label_map)
    assert not scored & {"vertebrae_L6", "my_tumor", *V1_ONLY} and "spleen" in scored


def test_a_missing_file_gives_no_gradient_and_an_empty_one_does(mixed):
    """The head's gradient of a channel that nobody in the batch annotates is exactly zero."""
    data = SliceDataset(mixed.staged, [part for part in mixed.split.train if part.subject == "s0003"], mixed.label_map)
    images, targets = to_network(next(iter(batches(data, [10, 20], 2))), (32, 32))
    model = losses.ModelWithLoss(
        UNet2D(out_channels=len(mixed.label_map), features=(4, 8)), torch.ones(len(mixed.label_map))
    )
    model(images, targets).backward()
    gradient = model.network.head.bias.grad
    own = mixed.staged["s0003"]
    for name, channel in mixed.label_map.items():
        assert (gradient[channel] == 0) == (name not in own.structures), name
    assert "spleen" not in own.structures and any(count == 0 for count in own.voxels.values())
