"""Several networks: their mean worked out by hand, and trained, found, resumed and evaluated as one run."""

import json
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from segkit import __main__
from segkit.checkpoints import best_checkpoint, load_checkpoint, load_checkpoints, save_checkpoint
from segkit.dataset import open_run
from segkit.ensemble import train_members
from segkit.errors import SegkitError
from segkit.inference import Predictor
from segkit.networks import build_network
from segkit.settings import TrainSettings
from segkit.splits import Part
from segkit.training import train

LABELS = {"bone": 0, "dense": 1}
SETTINGS = TrainSettings(
    epochs=1, batch_size=4, target_shape=(32, 32), features=(4, 8), slices_per_epoch=8, validation_slices=6,
    device="cpu",
)  # fmt: skip


class Limits(nn.Module):
    """Logits that rise with HU, 0 at the given limits; of slices or of slabs of `depth`."""

    in_channels = 1

    def __init__(self, bone, dense, depth=1):
        super().__init__()
        self.limits, self.depth = (bone, dense), depth

    def forward(self, images):
        hu = torch.sinh(images) * 60 + 40
        planes = torch.stack([hu - limit for limit in self.limits], 1) / 128
        return planes if self.depth > 1 else planes[:, :, 0]


@pytest.fixture(scope="module")
def subject(phantom_data):
    return next(iter(phantom_data.staged.values()))


def predict(models, subject, threshold=0.5):
    part = Part(subject.name, ((10, 20),))
    volume = Predictor(models, LABELS, (32, 32), threshold, device="cpu").predict(subject, part)
    return {name: volume.mask(name) for name in LABELS}


def alike(a, b):
    return all((a[name] != b[name]).mean() < 1e-3 and a[name].any() for name in LABELS)  # but for rounding


def test_the_mean_of_logits_by_hand(subject):
    single = predict(Limits(200, 0), subject)
    same = predict([Limits(200, 0), Limits(200, 0)], subject)
    assert all(np.array_equal(single[name], same[name]) for name in LABELS)
    # logits that are linear in HU: the mean of two has its limit in the middle of theirs
    assert alike(predict([Limits(100, -200), Limits(300, 200)], subject), single)
    assert alike(predict([Limits(100, 0), Limits(100, 0), Limits(400, 0)], subject), single)
    assert not alike(predict([Limits(100, -200), Limits(400, 200)], subject), single)
    # slices and slabs may be averaged too
    assert alike(predict([Limits(100, -200), Limits(300, 200, depth=8)], subject), single)


def stored(path, labels=LABELS, thresholds=None, shape=(32, 32), seed=0):
    torch.manual_seed(seed)
    network = {"model": "unet", "in_channels": 1, "out_channels": len(labels), "features": [4, 8]}
    scores = {"thresholds": thresholds} if thresholds else {}
    return load_checkpoint(
        save_checkpoint(path, build_network(**network), network, labels, {"target_shape": list(shape)}, 1, scores, {})
    )


def test_of_checkpoints_one_is_itself_and_thresholds_are_averaged_as_logits(subject, tmp_path):
    one, other = stored(tmp_path / "a.pth", thresholds=[0.5, 0.4]), stored(tmp_path / "b.pth", thresholds=[0.9, 0.4])
    alone, direct = Predictor.of([one]), Predictor(one.model, LABELS, (32, 32), one.thresholds)
    assert torch.equal(alone.logit_thresholds, direct.logit_thresholds)
    part = Part(subject.name, ((10, 20),))
    assert np.array_equal(alone.predict(subject, part).codes, direct.predict(subject, part).codes)
    both = Predictor.of([one, other])
    # by hand: logits 0 and ln 9 have the mean ln 3, a probability of 3 / 4
    assert torch.sigmoid(both.logit_thresholds).tolist() == pytest.approx([0.75, 0.4])
    assert torch.sigmoid(Predictor.of([one, other], 0.3).logit_thresholds).tolist() == pytest.approx([0.3, 0.3])


def test_members_that_do_not_fit_together_are_named(tmp_path):
    one = stored(tmp_path / "a.pth")
    for other, what in (
        (stored(tmp_path / "b.pth", labels={"bone": 1, "dense": 0}), "structures"),
        (stored(tmp_path / "c.pth", shape=(64, 32)), "TARGET_SHAPE"),
    ):
        with pytest.raises(SegkitError, match=rf"a\.pth and .*{other.path.name}: trained with different {what}"):
            Predictor.of([one, other])


@pytest.fixture(scope="module")
def few(phantom_data):
    """The phantoms with few structures, which takes less time."""
    return replace(phantom_data, label_map={"liver": 0, "aorta": 1, "spleen": 2})


def head_of(folder, epoch=1):
    return load_checkpoint(folder / f"checkpoint_epoch{epoch}.pth").model.head.weight


@pytest.fixture(scope="module")
def trained(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    watched = []

    def watch(folder):
        return lambda history: watched.append((folder, len(history)))

    histories = train_members(few, replace(SETTINGS, seed=3), folder, 2, watch, progress=False)
    return folder, histories, watched


def test_members_are_trainings_of_their_seed_on_one_split_and_are_found_as_one_run(few, trained, tmp_path):
    folder, histories, watched = trained
    assert [len(history) for history in histories] == [1, 1]
    assert watched == [(folder / f"member_{n}", 1) for n in (1, 2)]
    train(few, replace(SETTINGS, seed=4), tmp_path, progress=False)
    assert torch.equal(head_of(folder / "member_2"), head_of(tmp_path))
    splits = [json.loads((each / "split.json").read_text()) for each in (folder, *folder.glob("member_*"))]
    assert splits[0] == splits[1] == splits[2]
    data = open_run(folder, tmp_path / "staged", few.folder, 1, progress=False)
    loaded = load_checkpoints(folder, data.label_map)
    assert [each.path.parent.name for each in loaded] == ["member_1", "member_2"]
    scores = {each.path: each.scores["val_dice"] or 0.0 for each in loaded}
    assert scores[best_checkpoint(folder)] == max(scores.values())
    [single] = load_checkpoints(folder / "member_2", data.label_map)
    assert single.settings["seed"] == 4 and load_checkpoints(single.path)[0].path == single.path


def test_an_interrupted_ensemble_goes_on_and_grows(few, trained, tmp_path, stopped_after):
    settings = replace(SETTINGS, seed=3)
    with stopped_after(1):
        [history] = train_members(few, settings, tmp_path, 2, progress=False)
    assert history[-1]["interrupted"] and not (tmp_path / "member_2").exists()
    histories = train_members(few, settings, tmp_path, 2, progress=False, resume=True)
    assert [len(history) for history in histories] == [1, 1]
    for name in ("member_1", "member_2"):
        assert torch.equal(head_of(tmp_path / name), head_of(trained[0] / name))
    for members in (1, 0, True):
        with pytest.raises(SegkitError, match=rf"MEMBERS = {members}"):
            train_members(few, settings, tmp_path, members, progress=False, resume=True)
    with pytest.raises(SegkitError, match=r"INIT_CHECKPOINT .*checkpoint_epoch1\.pth: the files of .* move"):
        inside = replace(settings, init_checkpoint=str(tmp_path / "member_1" / "checkpoint_epoch1.pth"))
        train_members(few, inside, tmp_path, 2, progress=False)
    # one network in the same folder: the ensemble moves away whole, and is not found any more
    train_members(few, settings, tmp_path, 1, progress=False)
    assert len(load_checkpoints(tmp_path)) == 1 and len(list(tmp_path.glob("runs/*/member_2"))) == 1
    with pytest.raises(SegkitError, match="training of one network, MEMBERS = 2"):
        train_members(few, settings, tmp_path, 2, progress=False, resume=True)


def test_the_verbs_train_and_evaluate_an_ensemble(phantom_data, phantom_dir, tmp_path, monkeypatch):
    def verb(*arguments):
        stage_dir = next(iter(phantom_data.staged.values())).folder.parent
        more = ["--output-dir", str(tmp_path), "--stage-dir", str(stage_dir), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["segkit", *map(str, arguments), *more])
        __main__.main()
        plt.close("all")  # a shell's process ends here

    verb("train", phantom_dir, "--structures", "liver", "aorta", "--members", 2, "--epochs", 1,
         "--target-shape", 32, 32, "--features", 4, 8, "--slices-per-epoch", 4, "--validation-slices", 4)  # fmt: skip
    verb("evaluate", "--max-subjects", 1)
    summary = json.loads(next(tmp_path.glob("evaluation_summary_*.json")).read_text())
    assert [path.split("/")[-2] for path in summary["checkpoints"]] == ["member_1", "member_2"]
    assert len(list(tmp_path.glob("member_*/training_history.png"))) == 2


def test_a_stop_ends_the_ensemble_and_members_without_a_score_are_left_out(few, tmp_path, capsys):
    def watch(folder):
        def stop(history):
            if folder.name == "member_2":
                raise KeyboardInterrupt

        return stop

    histories = train_members(few, SETTINGS, tmp_path, 3, watch, progress=False)
    assert [history.interrupted for history in histories] == [False, True] and not (tmp_path / "member_3").exists()
    path = tmp_path / "member_2" / "training_history.json"
    content = json.loads(path.read_text())
    content["epochs"][-1]["val_dice"] = None  # as of one that was stopped within its first epoch
    path.write_text(json.dumps(content))
    (tmp_path / "member_3").mkdir()
    assert [each.path.parent.name for each in load_checkpoints(tmp_path)] == ["member_1"]
    assert "2 of 3 members have no finished epoch: left out" in capsys.readouterr().out
