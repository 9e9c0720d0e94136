"""Attention U-Net and 3D U-Net: built, trained on slabs, stored, blended over windows; answers known by other ways."""

import importlib.util
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segkit import augment, slabs
from segkit.checkpoints import load_checkpoint
from segkit.choices import MODELS, find
from segkit.errors import SegkitError
from segkit.inference import Predictor
from segkit.losses import ModelWithLoss, head_loss
from segkit.networks import build_network, network_arguments, on_device
from segkit.ranks import Ranks
from segkit.settings import NO_AUGMENTATION, TrainSettings
from segkit.slabs import SlabDataset, around, tiles, window_starts, window_weights, windows
from segkit.slices import SliceDataset, Targets, batches
from segkit.splits import Part
from segkit.steps import Learner
from segkit.trainer import Trainer
from segkit.training import train

SMALL = TrainSettings(
    epochs=2, batch_size=4, target_shape=(32, 32), features=(4, 8), patch_slices=4, slices_per_epoch=8,
    validation_slices=6, device="cpu",
)  # fmt: skip
CPU = torch.device("cpu")


def small(model: str, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return build_network(**network_arguments(replace(SMALL, model=model).checked(), channels))


def images_for(model: str) -> torch.Tensor:
    return torch.randn(2, 4 if model == "unet3d" else 1, 16, 24)


@pytest.mark.parametrize("model", MODELS)
def test_features_and_head_are_the_whole_network_and_every_weight_learns(model):
    network, images = small(model), images_for(model)
    depth = (4,) if model == "unet3d" else ()
    with torch.no_grad():
        network.eval()
        features = network.decode(images)
        assert features.shape == (2, 4, *depth, 16, 24)
        assert torch.equal(network.head(features), network(images))
        # in the layout of a device the values are the same
        assert torch.allclose(on_device(network, CPU)(images), network.head(features), atol=1e-5)
    network.train()(images).square().sum().backward()
    assert all(weights.grad is not None for weights in network.parameters())
    with pytest.raises(SegkitError, match="multiples of 4"):
        network(images[..., :18])


def test_the_three_dimensional_network_uses_every_level_and_the_finest_skip():
    torch.manual_seed(0)
    network = build_network("unet3d", out_channels=1, features=[4, 8], depth=8).eval()
    assert [level.conv1.conv.out_channels for level in network.down] == [4, 8, 16] and len(network.up) == 2
    image = torch.randn(1, 8, 16, 16, requires_grad=True)
    network(image)[0, 0, 4, 8, 8].backward()
    reached = (image.grad[0] != 0).nonzero()
    assert reached.min(0).values.tolist() == [0, 0, 0] and reached.max(0).values.tolist() == [7, 15, 15]
    # without what comes from below, the finest level still sees the image
    with torch.no_grad():
        network.up[1].transp_conv.conv.weight.zero_()
        assert not torch.equal(network(image)[0, 0], network(image + torch.randn_like(image))[0, 0])


def test_names_are_those_that_there_are_and_another_is_refused():
    with pytest.raises(SegkitError, match="MODEL = 'vnet': expected one of unet, attention_unet, unet3d"):
        build_network("vnet")


def test_without_monai_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for model in ("attention_unet", "unet3d"):
        with pytest.raises(SegkitError, match=rf"MODEL = '{model}'.*pip install 'segkit\[monai\]'"):
            build_network(model)
    assert build_network("unet", features=(2,)) is not None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "vnet"}, "MODEL = 'vnet'"),
        ({"model": "unet3d", "context": 1}, "CONTEXT = 1: unet3d"),
        ({"model": "unet3d", "patch_slices": 6}, "PATCH_SLICES = 6: .* a multiple of 4"),
        ({"model": "unet3d", "patch_slices": 0}, "PATCH_SLICES"),
        ({"model": "unet3d", "features": (8,)}, "FEATURES = .* 2 levels"),
        ({"model": "unet3d", "target_shape": (4, 4)}, "TARGET_SHAPE = .* to one pixel"),
        ({"model": "attention_unet", "features": (1, 2)}, "FEATURES = .* give 2 or more"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(wrong, message):
    with pytest.raises(SegkitError, match=message):
        replace(SMALL, **wrong).checked()


def by_hand(features, head, targets, counted, weight):
    """BCEWithLogitsLoss over all (slice that counts, annotated channel, pixel) of slabs, on dense planes."""
    loss = F.binary_cross_entropy_with_logits(
        head(features), targets.dense().double(), pos_weight=weight[:, None, None, None], reduction="none"
    )
    chosen = targets.annotated[:, :, None] & counted[:, None]
    return loss[chosen].mean()


def test_the_loss_of_slabs_equals_the_dense_reference_with_every_gradient():
    g = torch.Generator().manual_seed(1)
    table = torch.rand(2, 5, 3, generator=g) < 0.4
    annotated = torch.tensor([[True, False, True], [True, True, True]])
    counted = torch.rand(2, 4, generator=g) < 0.6
    targets = Targets(torch.randint(0, 5, (2, 4, 5, 6), generator=g), table, annotated, counted)
    features = torch.randn(2, 7, 4, 5, 6, generator=g, dtype=torch.float64, requires_grad=True)
    head, weight = nn.Conv3d(7, 3, 1).double(), torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64)
    inputs = [features, head.weight, head.bias]
    by_slice, planes = targets.by_slice(features)
    loss, expected = head_loss(planes, head, by_slice, weight), by_hand(features, head, targets, counted, weight)
    assert torch.allclose(loss, expected, rtol=1e-9)
    ours, theirs = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-12) for a, b in zip(ours, theirs, strict=True))
    # and ModelWithLoss takes this way
    network = small("unet3d")
    model = ModelWithLoss(network, weight.float()).eval()
    images = torch.randn(2, 4, 8, 8)
    targets = Targets(torch.randint(0, 5, (2, 4, 8, 8), generator=g), table, annotated, counted)
    expected = by_hand(network.decode(images).double(), network.head.double(), targets, counted, weight)
    network.head.float()
    assert torch.allclose(model(images, targets).double(), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def few(phantom_data):
    """The phantoms with few structures, which takes less time."""
    return replace(phantom_data, label_map={"lung_upper_lobe_left": 0, "lung_upper_lobe_right": 1, "aorta": 2})


@pytest.fixture(scope="module")
def subject(phantom_data):
    return next(iter(phantom_data.staged.values()))


def test_slabs_hold_what_the_store_holds(subject, phantom_data):
    total = subject.shape[0]
    data = SlabDataset({subject.name: subject}, [Part(subject.name)], phantom_data.label_map, 8)
    assert len(data) == total and data.where == [(subject.name, z) for z in range(total)]
    for place in (0, 3, 4, 17, total - 1):
        item, start = data[place], min(max(place - 4, 0), total - 8)
        assert np.array_equal(item["hu"], subject.hu()[start : start + 8])
        assert np.array_equal(item["codes"], subject.labels().codes[start : start + 8]) and item["counted"].all()
    # the same in-plane geometry and codebook as slices by themselves: a slab of them on the network's grid
    flat = SliceDataset({subject.name: subject}, [Part(subject.name)], phantom_data.label_map)
    [slab] = batches(data, [10], 1)
    [single] = batches(flat, range(6, 14), 8)
    variation = augment.draw(TrainSettings().augmentation, 0, 1, [0])
    repeated = augment.draw(TrainSettings().augmentation, 0, 1, [0] * 8)
    as_it_is = torch.tensor([[1.0, 0, 0, 1, 0]])
    images, targets = augment.to_network(slab, (32, 32), replace(variation, intensity=as_it_is))
    planes, singly = augment.to_network(single, (32, 32), replace(repeated, intensity=as_it_is.expand(8, -1)))
    assert torch.equal(targets.codes[0], singly.codes) and torch.allclose(images[0], planes[:, 0], atol=1e-5)
    of_slices, _ = targets.by_slice(images[:, None])
    assert torch.equal(of_slices.dense(), singly.dense())


def test_tiles_count_every_slice_of_a_part_once_and_windows_cover_it():
    for total, depth, slices in ((40, 8, range(40)), (37, 8, range(37)), (5, 8, range(5)),
                                 (40, 16, [*range(8, 16), *range(24, 32), 39])):  # fmt: skip
        slices = list(slices)
        counted = [z for _, start, first in tiles(slices, total, depth)
                   for z in range(max(start, first), start + depth) if z in slices]  # fmt: skip
        assert counted == slices
        covered = {z for _, start, _ in windows(slices, total, depth) for z in range(start, start + depth)}
        assert covered >= set(slices)
        assert all(start <= z < start + depth for z, start, _ in around(slices, total, depth))
        weights = window_weights(total, depth)
        assert weights.shape == (len(window_starts(total, depth)), total) and weights.min() >= 0
        assert weights.sum(0) == pytest.approx(np.ones(total))


class Relabelled:
    """A staged subject whose labels outside of some slices are replaced by others."""

    def __init__(self, subject, kept):
        self.subject, self.kept = subject, kept

    def __getattr__(self, name):
        return getattr(self.subject, name)

    def labels(self, z=slice(None)):
        volume = self.subject.labels()
        other = np.full_like(volume.codes, 3)
        other[self.kept] = volume.codes[self.kept]
        return volume.with_codes(other[z])


@pytest.mark.parametrize("layout", [around, tiles])
def test_labels_outside_of_the_part_never_reach_the_loss(subject, phantom_data, layout):
    part = Part(subject.name, ((6, 10), (14, 18)))
    kept = part.slices(subject.shape[0])
    torch.manual_seed(0)
    network = build_network("unet3d", out_channels=117, features=[4, 8], depth=8).eval()
    model = ModelWithLoss(network, torch.ones(117))
    seen = []
    for staged in (subject, Relabelled(subject, kept)):
        data = SlabDataset({subject.name: staged}, [part], phantom_data.label_map, 8, layout)
        [batch] = batches(data, range(len(data)), 100)
        # of the codes themselves nothing is left outside of what counts
        assert not batch.codes[~batch.counted].any() and batch.codes[batch.counted].any()
        seen.append((batch.codes, model(*augment.to_network(batch, (32, 32)))))
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    # but the image of the neighbours is there, as by CONTEXT
    assert all(np.array_equal(data[i]["hu"], subject.hu()[s : s + 8]) for i, (s, _) in enumerate(data.reach))


class Column(nn.Module):
    """A network on slabs whose answer at a slice depends on the whole slab: a random mix of its slices."""

    def __init__(self, depth):
        super().__init__()
        self.depth = depth
        mix = torch.rand(3, depth, depth, generator=torch.Generator().manual_seed(0)) / depth
        self.register_buffer("mix", mix)

    def forward(self, images):
        return torch.einsum("cde,beyx->bcdyx", self.mix, images)


class Pixelwise(nn.Module):
    """Bone and soft tissue, each slice by itself; `depth` as given."""

    in_channels = 1

    def __init__(self, depth):
        super().__init__()
        self.depth = depth

    def forward(self, images):
        planes = torch.stack([images - 1.6, images + 0.5, images - 9], 1)  # (B, C, D, H, W)
        return planes if self.depth > 1 else planes[:, :, 0]


LABELS = {"bone": 0, "dense": 1, "nothing": 2}


def logits_of(predictor, subject, slices):
    return torch.stack([item for items, _ in predictor._logits(predictor.models[0], subject, slices) for item in items])


def test_windows_are_blended_as_monai_does_it(subject, monkeypatch):
    from monai.inferers import sliding_window_inference

    depth, total = 8, subject.shape[0]
    predictor = Predictor(Column(depth), LABELS, (32, 32), batch_size=5, device="cpu")
    monkeypatch.setattr("segkit.inference.precision", lambda *_: torch.float32)
    data = SliceDataset({subject.name: subject}, [Part(subject.name)], LABELS)
    [batch] = batches(data, range(total), total)
    images, _ = augment.to_network(batch, (32, 32))
    bell = torch.exp(-0.5 * ((torch.arange(depth) - 3.5) / 1) ** 2)[:, None, None].expand(depth, 32, 32)
    expected = sliding_window_inference(
        images[:, 0][None, None], (depth, 32, 32), 1, lambda slab: predictor.models[0](slab[:, 0]), 0.5,
        roi_weight_map=bell,
    )  # fmt: skip
    ours = logits_of(predictor, subject, list(range(total)))
    assert ours.shape == (total, 3, 32, 32)
    assert torch.allclose(ours, expected[0].movedim(1, 0), atol=1e-5)


def test_a_network_that_looks_at_single_slices_predicts_the_same_by_windows(subject):
    single, slab = (Predictor(Pixelwise(depth), LABELS, (32, 32), batch_size=3, device="cpu") for depth in (1, 8))
    for part in (None, Part(subject.name, ((2, 7), (11, 12)))):
        one, other = single.predict(subject, part), slab.predict(subject, part)
        assert one.codes.shape == other.codes.shape
        assert all((one.mask(name) != other.mask(name)).mean() < 1e-4 for name in LABELS)  # but for rounding
        assert one.mask("bone").any() and not other.mask("nothing").any()


def test_a_slice_gets_the_same_codes_whatever_is_predicted_with_it_also_after_pickling(subject):
    predictor = Predictor(Column(8), LABELS, (32, 32), threshold=0.4, batch_size=3, device="cpu")
    whole = predictor.predict(subject)
    assert whole.codes.shape == subject.shape and whole.mask("dense").any()
    there = pickle.loads(pickle.dumps(predictor))
    for z, codes in there.predict_slices(subject, [9, 0, subject.shape[0] - 1, 9]).items():
        assert all(np.array_equal(codes.mask(name), whole.mask(name)[z]) for name in LABELS)


def test_a_scan_shorter_than_a_slab(subject, monkeypatch):
    """The last slice is repeated for the network, and what is repeated does not count."""
    depth = 4 * (subject.shape[0] // 4 + 1)
    data = SlabDataset({subject.name: subject}, [Part(subject.name)], {"liver": 0}, depth, tiles)
    item = data[0]
    total = subject.shape[0]
    assert len(data) == 1 and item["counted"].tolist() == [True] * total + [False] * (depth - total)
    assert np.array_equal(item["hu"][-1], subject.hu(total - 1)) and not item["codes"][total:].any()
    predictor = Predictor(Column(depth), LABELS, (32, 32), device="cpu")
    assert predictor.predict(subject).codes.shape == subject.shape


def weights_of(folder, epoch):
    return load_checkpoint(folder / f"checkpoint_epoch{epoch}.pth").model.state_dict()


@pytest.mark.parametrize("model", ["attention_unet", "unet3d"])
def test_a_training_reloads_predicts_the_same_and_resumes_to_the_same_weights(few, tmp_path, stopped_after, model):
    settings = replace(SMALL, model=model, augmentation=replace(SMALL.augmentation, flip_left_right=True))
    history = train(few, settings, tmp_path / "whole", progress=False)
    assert [row["steps"] for row in history] == [2, 2] and history[1]["val_loss"] > 0
    loaded = load_checkpoint(tmp_path / "whole" / "checkpoint_epoch2.pth", few.label_map)
    assert loaded.network["model"] == model and type(loaded.model) is find(MODELS[model].where)
    learner = Learner(few, replace(settings, init_checkpoint=str(loaded.path)).checked(), Ranks(CPU))
    images = images_for(model)
    with torch.no_grad():
        assert torch.allclose(learner.network.eval()(images), loaded.model(images), atol=1e-5)
    with pytest.raises(SegkitError, match=rf"INIT_CHECKPOINT .*another network: expected MODEL.*'{model}'"):
        Learner(few, replace(SMALL, init_checkpoint=str(loaded.path)).checked(), Ranks(CPU))

    with stopped_after(3):
        train(few, settings, tmp_path / "parts", progress=False)
    train(few, settings, tmp_path / "parts", progress=False, resume=True)
    whole, parts = (weights_of(tmp_path / name, 2) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_an_epoch_sees_as_many_slices_as_there_are_and_a_batch_in_parts_is_the_whole(phantom_data):
    settings = replace(SMALL, model="unet3d", loss="bce", slices_per_epoch=None, augmentation=NO_AUGMENTATION).checked()
    trainer = Trainer(phantom_data, settings, Ranks(CPU), Path())
    slices = len(SliceDataset(phantom_data.staged, phantom_data.split.train, phantom_data.label_map))
    assert trainer.in_epoch == -(-slices // 4)
    [batch] = batches(trainer.train_slices, [5, 30, 60, 90], 4)
    learners = [Learner(phantom_data, replace(settings, accumulate=n), Ranks(CPU)) for n in (1, 4)]
    losses = [learner.step(batch, 1, 1e-3) for learner in learners]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # bfloat16 where the device is fast at it


def test_validation_of_slabs_scores_each_slice_once(phantom_data, monkeypatch):
    """A network of one answer everywhere: its loss does not depend on how slices are put together."""
    from segkit.validation import validate

    class Constant(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def decode(self, images):
            sides = images.shape[1:] if isinstance(self.head, nn.Conv3d) else images.shape[2:]
            return torch.ones(len(images), 1, *sides)

    labels = {"liver": 0, "aorta": 1}
    args = phantom_data.staged, phantom_data.split.val, labels
    results = []
    for head, data in ((nn.Conv2d(1, 2, 1), SliceDataset(*args)), (nn.Conv3d(1, 2, 1), SlabDataset(*args, 8, tiles))):
        nn.init.constant_(head.weight, 0.3)
        nn.init.constant_(head.bias, 0.5)
        model = ModelWithLoss(Constant(head), torch.tensor([3.0, 2.0]))
        results.append(validate(model, data, (32, 32), torch.float32, 8, progress=False))
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].dice == pytest.approx(results[1].dice, rel=1e-9) and results[0].dice > 0


def test_an_unknown_model_in_a_checkpoint_is_named(tmp_path):
    from segkit.checkpoints import save_checkpoint

    network = {"in_channels": 1, "out_channels": 2, "features": [4, 8]}
    for name in ("vnet", ["unet"]):
        named, labels = {"model": name, **network}, {"a": 0, "b": 1}
        path = save_checkpoint(tmp_path / "other.pth", build_network(**network), named, labels, {}, 1, {}, {})
        with pytest.raises(SegkitError, match=r"other\.pth"):
            load_checkpoint(path)


def test_a_training_from_before_there_were_models_resumes(phantom_data, tmp_path):
    from segkit.settings import changed

    stored = json.loads(json.dumps({name: value for name, value in vars(SMALL).items() if name != "augmentation"}))
    stored["augmentation"] = vars(SMALL.augmentation)
    del stored["model"], stored["patch_slices"]
    assert changed(replace(SMALL, patch_slices=16), stored) == []
    assert changed(replace(SMALL, patch_slices=16, model="unet3d"), stored) == ["model"]


def test_items_of_a_training_are_slices_or_slabs(phantom_data):
    args = phantom_data.staged, phantom_data.split.train, {"liver": 0}
    assert type(slabs.open_items(*args, SMALL)) is SliceDataset
    assert type(slabs.open_items(*args, replace(SMALL, model="unet3d"))) is SlabDataset
