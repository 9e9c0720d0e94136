import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from segkit import steps, training, validation
from segkit.checkpoints import best_checkpoint, load_checkpoint
from segkit.dataset import open_data
from segkit.errors import SegkitError
from segkit.evaluation import evaluate
from segkit.inference import Predictor
from segkit.ranks import Ranks
from segkit.segmenting import WayBack
from segkit.settings import NO_AUGMENTATION, TrainSettings, from_notebook
from segkit.sharing import export_model
from segkit.slices import SliceBatch, collate
from segkit.summaries import summarize
from segkit.training import train
from segkit.validation import THRESHOLDS, choose_thresholds

CPU = Ranks(torch.device("cpu"))
SMALL = TrainSettings(
    epochs=2,
    batch_size=4,
    target_shape=(32, 32),
    features=(4, 8),
    slices_per_epoch=12,
    validation_slices=10,
    device="cpu",
)


def test_a_run_writes_what_the_readme_names(phantom_data, tmp_path):
    seen = []
    history = train(phantom_data, SMALL, tmp_path, on_epoch=lambda h: seen.append(len(h)), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock", ".predictions.lock", "checkpoint_epoch1.pth", "checkpoint_epoch2.pth", "label_map.json",
        "last_state.pth", "settings.json", "split.json", "training_history.json",
    ]  # fmt: skip
    assert seen == [1, 2] and [row["steps"] for row in history] == [3, 3]
    assert json.loads((tmp_path / "training_history.json").read_text())["epochs"] == history
    assert json.loads((tmp_path / "label_map.json").read_text()) == phantom_data.label_map
    assert history[0]["learning_rate"] == pytest.approx(4e-3)
    assert history[1]["learning_rate"] == pytest.approx(4e-3 * 0.5**0.9)
    assert json.loads((tmp_path / "settings.json").read_text())["target_shape"] == [32, 32]


def test_the_same_seed_gives_the_same_weights(phantom_data, tmp_path):
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        settings = TrainSettings(**{**SMALL.__dict__, "epochs": 1, "seed": seed})
        folder = tmp_path / str(number)
        folder.mkdir()
        train(phantom_data, settings, folder, progress=False)
        weights.append(load_checkpoint(folder / "checkpoint_epoch1.pth").model.head.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_it_learns_the_real_torso(torso_dir, tmp_path):
    """A few large structures of a real scan, well above chance on slabs that were left out, in seconds."""
    large = ["liver", "urinary_bladder", "autochthon_left", "gluteus_maximus_right"]
    data = open_data(torso_dir, tmp_path / "staged", structures=large, progress=False)
    settings = TrainSettings(
        epochs=3, target_shape=(64, 64), features=(8, 16, 32, 32), slices_per_epoch=240, learning_rate=5e-3,
        augmentation=NO_AUGMENTATION,
    )  # fmt: skip
    train(data, settings, tmp_path, progress=False)
    best = load_checkpoint(best_checkpoint(tmp_path), data.label_map)
    predictor = Predictor(best.model, best.label_map, best.target_shape)
    scores = evaluate(predictor, data.staged, data.split.test, "test", progress=False).scores
    summary = summarize(scores)
    assert summary["structures"] == 4 and summary["macro_dice"] > 0.5


def batch_of(codes: torch.Tensor, codebook: torch.Tensor, annotated: torch.Tensor, spacing=(1.0, 1.0)) -> SliceBatch:
    """Slices (B, Y, X), or slabs, of codes; nothing of their HU is looked at."""
    items = [
        {"hu": torch.zeros(1, *own.shape[-2:], dtype=torch.int16), "codes": own.int(), "spacing_mm": spacing,
         "codebook": table, "annotated": known}
        for own, table, known in zip(codes, codebook, annotated, strict=True)
    ]  # fmt: skip
    return collate(list(enumerate(items)))


def test_validation_counts_by_hand():
    batch = batch_of(
        torch.tensor([[[0, 1], [2, 2]]]),
        torch.tensor([[[0, 0, 0], [1, 0, 0], [1, 1, 0]]]).bool(),
        torch.tensor([[True, True, False]]),
    )
    predicted = torch.tensor([[[[1, 1], [0, 0]], [[0, 0], [1, 1]], [[1, 1], [1, 1]]]]).bool()
    at = validation.LEVELS.tolist().index(0)
    counts = validation.count_slices(torch.where(predicted, 0.1, -0.1), batch)[0]
    assert counts[at].tolist() == [[1, 2, 0], [1, 0, 0], [2, 0, 0]]
    assert counts[at + 1].tolist() == [[0, 0, 0], [0, 0, 0], [3, 2, 0]]  # 0.1 is below the next level, 0.25
    assert counts[at - 1].tolist() == [[3, 2, 0], [1, 2, 0], [0, 0, 0]]  # and -0.1 above the one before
    # two subjects: structure 0 has Dice 0.5 and 1, structure 1 is held by one of them and missed, 2 by nobody
    two = np.array([[[1, 0, 0], [1, 3, 0], [1, 0, 0]], [[2, 0, 0], [0, 0, 5], [0, 4, 0]]])
    mean, number = validation.macro_dice(two)
    assert mean == pytest.approx((0.75 + 0) / 2) and number == 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(4, 7), (9, 5)]), st.sampled_from([1, 50, 1 << 23]))
def test_validation_counts_equal_those_of_dense_planes(seed, size, together):
    """On slices of their own sizes and spacings, padded in a batch: as WayBack brings each plane back by itself."""
    g = torch.Generator().manual_seed(seed)
    table = torch.rand(2, 6, 5, generator=g) < 0.3
    table[:, 0] = False
    codes = [torch.randint(0, 6, shape, generator=g) for shape in (size, (6, 6))]
    batch = batch_of(codes, table, torch.rand(2, 5, generator=g) < 0.7, (1.0, 1.5))
    logits = 5 * torch.randn(2, 5, 4, 8, generator=g)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(validation, "TOGETHER", together)
        counts = validation.count_slices(logits, batch)
    for sample, own in enumerate(codes):
        way = WayBack(batch.at([sample]), (4, 8))
        planes = torch.stack([torch.from_numpy(way.whole(plane.numpy())) for plane in logits[sample]])
        inside = table[sample].T[:, own]
        near = (planes[:, None] - torch.from_numpy(validation.LEVELS)[:, None, None]).abs().flatten(2).amin(2) < 1e-4
        for place, level in enumerate(validation.LEVELS):
            predicted = planes > level
            expected = [predicted & inside, predicted & ~inside, ~predicted & inside]
            expected = torch.stack([of.sum((1, 2)) for of in expected]) * batch.annotated[sample]
            sure = ~near[:, place]  # rounding may decide what lies at a level
            assert torch.equal(counts[sample, place][:, sure], expected[:, sure])


def test_validation_is_of_the_scans_own_grid(phantom_data, tmp_path):
    """The Dice that training reports is the one that evaluation finds on the same subjects at the same threshold."""
    small = {"liver": 0, "lung_lower_lobe_left": 1, "heart": 2, "spleen": 3}
    data = replace(phantom_data, label_map=small)
    chosen = TrainSettings(
        epochs=1, target_shape=(32, 48), features=(8, 16), slices_per_epoch=400, batch_size=4, device="cpu"
    )
    [row] = train(data, chosen, tmp_path, progress=False)
    checkpoint = load_checkpoint(tmp_path / "checkpoint_epoch1.pth")
    predictor = Predictor(checkpoint.model, small, (32, 48), row["val_threshold"], device="cpu")
    scores = evaluate(predictor, data.staged, data.split.val, "val", progress=False).scores
    assert row["val_dice"] == pytest.approx(summarize(scores)["macro_dice"], abs=1e-3) and row["val_dice"] > 0.2
    assert row["val_structures"] == summarize(scores)["structures"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 2.5},
        {"learning_rate": 0},
        {"target_shape": (30, 32)},
        {"positive_weight_cap": 0.5},
        {"slices_per_epoch": 0},
        {"features": 32},
        {"features": (8, 0)},
        {"target_shape": 256},
        {"target_shape": (48, 48), "features": (4, 4, 4, 4, 4)},
        {"seed": -1},
        {"loss": "bce "},
        {"schedule": "step"},
        {"context": -1},
        {"balance": 1.5},
        {"accumulate": 99},
        {"gradient_clip": -1.0},
        {"early_stopping": 0},
        {"learning_rate": float("nan")},
    ],
)
def test_settings_that_make_no_sense_are_named(wrong):
    with pytest.raises(SegkitError, match=next(iter(wrong)).upper()):
        TrainSettings(**wrong).checked()


def test_a_notebooks_settings_are_read_anew_and_none_is_left_out(tmp_path, monkeypatch):
    # what the configuration cells say is the default of each setting, so that a notebook's run is a shell's run
    notebook = json.loads((ROOT / "notebooks" / "train_unet.ipynb").read_text())
    names = {}
    for cell in notebook["cells"]:
        if cell["id"] in ("configuration-details", "cell-10"):
            exec("".join(cell["source"]), names)
    assert from_notebook(names) == TrainSettings()
    names |= {"EPOCHS": 7, "TARGET_SHAPE": [64, 96], "AUGMENTATION": {"noise_hu": 3}, "INIT_CHECKPOINT": "a/b.pth"}
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "segkit").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    chosen = from_notebook(names)
    assert (chosen.epochs, chosen.target_shape, chosen.augmentation.noise_hu) == (7, (64, 96), 3.0)
    assert chosen.init_checkpoint == str(tmp_path / "a" / "b.pth")
    assert from_notebook({**names, "AUGMENT": False}).augmentation.rotation_degrees == 0
    with pytest.raises(SegkitError, match="BATCH_SIZE = 0"):
        from_notebook({**names, "BATCH_SIZE": 0})
    del names["EPOCHS"], names["AUGMENT"]
    with pytest.raises(SegkitError, match="EPOCHS, AUGMENT: not set; run the configuration cells first"):
        from_notebook(names)


def test_settings_that_stop_a_run_leave_the_older_one_in_place(phantom_data, tmp_path):
    (tmp_path / "checkpoint_epoch1.pth").write_text("older")
    with pytest.raises(SegkitError, match="DEVICE = 'cuda:77'"):
        train(phantom_data, TrainSettings(device="cuda:77"), tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_epoch1.pth"]


def test_a_diverged_model_is_not_saved(phantom_data, tmp_path):
    wild = TrainSettings(**{**SMALL.__dict__, "learning_rate": 1e30, "slices_per_epoch": 4})
    with pytest.raises(SegkitError, match="LEARNING_RATE"):
        train(phantom_data, wild, tmp_path, progress=False)
    assert not list(tmp_path.glob("checkpoint*"))


def test_the_threshold_is_one_half_where_nothing_was_scored(phantom_data):
    from segkit.losses import ModelWithLoss
    from segkit.slices import SliceDataset
    from segkit.unet import UNet2D
    from segkit.validation import validate

    data = SliceDataset(phantom_data.staged, phantom_data.split.val, {"my_own": 0})
    model = ModelWithLoss(UNet2D(1, 1, (2, 2)), torch.ones(1))
    result = validate(model, data, (32, 32), torch.float32, 4, slices=4, progress=False)
    assert result.threshold == 0.5 and np.isnan(result.dice) and result.structures == 0


def test_textbook_starts_from_default_weights_without_help(phantom_data):
    learners = [steps.Learner(phantom_data, replace(SMALL, loss=loss).checked(), CPU) for loss in ("textbook", "bce")]
    assert (learners[0].model.pos_weight == 1).all() and (learners[1].model.pos_weight > 1).any()
    assert learners[0].network.head.bias.abs().max() < 1 and learners[1].network.head.bias.mean() < -3


def test_starting_from_another_model_matches_channels_by_name(phantom_data, tmp_path):
    train(phantom_data, replace(SMALL, epochs=1), tmp_path / "first", progress=False)
    path = tmp_path / "first" / "checkpoint_epoch1.pth"
    names = ["spleen", "liver", "aorta"]
    smaller = replace(phantom_data, label_map={name: channel for channel, name in enumerate(names)})
    learner = steps.Learner(smaller, replace(SMALL, init_checkpoint=str(path)).checked(), CPU)
    first = load_checkpoint(path)
    assert torch.equal(learner.network.down[0][0].weight, first.model.down[0][0].weight)
    for channel, name in enumerate(names):
        assert torch.equal(learner.network.head.weight[channel], first.model.head.weight[first.label_map[name]])
    with pytest.raises(SegkitError, match=r"INIT_CHECKPOINT .*another network"):
        steps.Learner(smaller, replace(SMALL, features=(4, 8, 16), init_checkpoint=str(path)).checked(), CPU)


def curves(*best: float, subjects=2, pixels=900) -> np.ndarray:
    """Counts (T, subjects, 3, C) of channels whose Dice is highest at these logits, and falls alike to both sides."""
    logits = np.log(THRESHOLDS) - np.log1p(-np.array(THRESHOLDS))
    wrong = np.rint(pixels / 10 * np.abs(logits[:, None] - np.array(best))).astype(int)
    counts = np.zeros((len(THRESHOLDS), subjects, 3, len(best)), int)
    counts[:, :, 0], counts[:, :, 1] = pixels, wrong[:, None]
    return counts


def logits_of(thresholds) -> list[float]:
    return [np.log(p / (1 - p)) for p in thresholds]


def test_thresholds_are_chosen_by_hand():
    # two of three are best at -1, and so is their group, and all; two subjects of 900 pixels weigh 2 * 1800 / 1900, the
    # group 4. What nobody holds gets the threshold of its group, a group that nobody holds that of all
    counts = np.concatenate([curves(-1, -1, 0.5), 0 * curves(0, 0)], 3)
    best, thresholds = choose_thresholds(counts, ["one", "one", "one", "one", "other"])
    assert logits_of([THRESHOLDS[best]]) == pytest.approx([-1])
    weight = 2 * 1800 / 1900
    assert logits_of(thresholds) == pytest.approx([-1, -1, (weight * 0.5 - 4) / (weight + 4), -1, -1])


def test_a_few_pixels_of_one_subject_do_not_choose_a_threshold():
    many, few = curves(0, 0, 0), curves(3, subjects=2, pixels=900)
    few[:, 0], few[:, 1] = 0, few[:, 1] // 9  # one subject
    few[:, 1, 0] = 10
    counts = np.concatenate([many, few, few * 0], 3)
    _, thresholds = choose_thresholds(counts, ["one"] * 5)
    weight = 1 * 10 / 110
    assert logits_of(thresholds) == pytest.approx([0, 0, 0, 3 * weight / (weight + 4), 0])
    assert logits_of(thresholds)[3] < 0.15


def test_what_was_never_found_gets_the_threshold_of_its_group_and_a_plateau_its_middle():
    """At no threshold is a Dice of 0 better than at another; the lowest one would call half of the scan by its name."""
    counts = np.concatenate([curves(-1, -1, -1), curves(0, 0)], 3)
    counts[:, :, 0, 3], counts[:, :, 2, 3] = 0, 900
    flat = (np.array(logits_of(THRESHOLDS)) >= 0.99) & (np.array(logits_of(THRESHOLDS)) <= 3.01)
    counts[:, :, 1, 4] = np.where(flat, 0, 900)[:, None]
    _, thresholds = choose_thresholds(counts, ["one"] * 4 + ["other"])
    found = logits_of(thresholds)
    assert found[:4] == pytest.approx([-1] * 4)
    weight = 2 * 1800 / 1900
    assert found[4] == pytest.approx((weight * 2 + 4 * 1) / (weight + 4))  # 1 to 3; its group, with all others: 1


def test_the_best_threshold_may_lie_far_below_one_half():
    """Of a loss without positive weights it does: 0.02 was best where no less than 0.3 had been tried."""
    best, thresholds = choose_thresholds(curves(-3.5, -3.5), ["one", "one"])
    assert THRESHOLDS[best] == pytest.approx(0.0293, abs=1e-4) and logits_of(thresholds) == pytest.approx([-3.5] * 2)
    assert THRESHOLDS[0] < 0.02 and THRESHOLDS[-1] > 0.98
    best, _ = choose_thresholds(curves(-7), ["one"])
    assert best == 0 and "lowest" in training.at_an_edge(THRESHOLDS[best])
    assert training.at_an_edge(THRESHOLDS[1]) is None and "highest" in training.at_an_edge(THRESHOLDS[-1])


def test_calibration_uses_what_was_counted():
    """Pixels by hand: their logits, and which are inside, through counts at the levels, as if fitted directly."""
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(0, 3, (1, 1, 400, 400)).astype(np.float32))
    inside = torch.from_numpy(random.random((1, 400, 400))) < torch.sigmoid(0.5 * (logits[:, 0] - 1) - 0.4)
    batch = batch_of(inside, torch.tensor([[[0], [1]]]).bool(), torch.ones(1, 1, dtype=torch.bool))
    counts = validation.count_slices(logits, batch).sum(0).numpy()
    found = validation.calibrate(counts, [float(torch.sigmoid(torch.tensor(1.0)))], ["one"], np.array([160_000]))
    assert found.slope == pytest.approx([0.5], abs=0.02) and found.offset == pytest.approx([-0.4], abs=0.04)


def test_a_training_starts_from_a_folder_with_one_network(phantom_data, tmp_path):
    """Of a run the best checkpoint, of a shared model its file; of an ensemble nobody knows which."""
    for member in (1, 2):
        train(phantom_data, replace(SMALL, seed=member), tmp_path / f"member_{member}", progress=False)
    run = tmp_path / "member_1"
    export_model(run, tmp_path / "shared", "CC BY 4.0")
    wanted = load_checkpoint(best_checkpoint(run)).model.state_dict()
    for source in (run, tmp_path / "shared", tmp_path / "shared" / "model.safetensors"):
        learner = steps.Learner(phantom_data, replace(SMALL, init_checkpoint=str(source)).checked(), CPU)
        assert all(torch.equal(value, wanted[name]) for name, value in learner.network.state_dict().items())
    with pytest.raises(SegkitError, match=r"INIT_CHECKPOINT .*holds 2 networks; name one of them: .*member_1"):
        steps.Learner(phantom_data, replace(SMALL, init_checkpoint=str(tmp_path)).checked(), CPU)
