"""Training that was interrupted or killed ends with the weights of one that never stopped."""

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from segkit import losses, steps, trainer, training
from segkit.checkpoints import load_checkpoint
from segkit.dataset import open_data
from segkit.ensemble import train_members
from segkit.errors import DivergedError, SegkitError
from segkit.interrupts import Interrupts
from segkit.ranks import Ranks
from segkit.seen import read_split
from segkit.settings import TrainSettings, changed
from segkit.slices import SliceDataset, batches
from segkit.training import train
from segkit.training_state import load_state

SETTINGS = TrainSettings(
    epochs=3, batch_size=4, target_shape=(32, 32), features=(4, 8), slices_per_epoch=14, validation_slices=6,
    balance=0.5, schedule="plateau", warmup_steps=3, gradient_clip=1.0, device="cpu",
)  # fmt: skip

SIXTH = 7
"""Which forward pass is the sixth step's: one before the first step finds out how much memory it takes."""


def weights_of(folder: Path, epoch: int = 3) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / f"checkpoint_epoch{epoch}.pth").model.state_dict()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def uninterrupted(phantom_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(phantom_data, SETTINGS, folder, progress=False)
    return folder


def without_times(folder: Path) -> list[dict]:
    rows = json.loads((folder / "training_history.json").read_text())["epochs"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("stop_after", [1, 3, 4, 6, 11])
def test_an_interrupted_training_goes_on_to_the_same_weights(
    phantom_data, uninterrupted, tmp_path, stopped_after, stop_after
):
    with stopped_after(stop_after):
        history = train(phantom_data, SETTINGS, tmp_path, progress=False)
    # an epoch has 4 steps; where it stopped inside of one, that one's weights are kept without a score
    assert len(history) == -(-stop_after // 4) and bool(history[-1].get("interrupted")) == bool(stop_after % 4)
    assert load_checkpoint(tmp_path / f"checkpoint_epoch{len(history)}.pth").thresholds[0] > 0
    train(phantom_data, SETTINGS, tmp_path, progress=False, resume=True)
    assert same(weights_of(tmp_path), weights_of(uninterrupted))
    assert without_times(tmp_path) == without_times(uninterrupted)


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_an_interrupt_within_a_step_waits_for_its_end(phantom_data, uninterrupted, tmp_path, monkeypatch, moment):
    """As the stop button does it: a SIGINT while the network computes, when half of a step is done."""
    done = []
    original = losses.head_loss

    def signalling(*args, **kwargs):
        if torch.is_grad_enabled():
            done.append(1)
            if len(done) == SIXTH and moment == "forward":
                os.kill(os.getpid(), signal.SIGINT)
        loss = original(*args, **kwargs)
        if len(done) == SIXTH and moment == "backward" and torch.is_grad_enabled():
            loss.register_hook(lambda grad: os.kill(os.getpid(), signal.SIGINT))
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(losses, "head_loss", signalling)
        history = train(phantom_data, SETTINGS, tmp_path, progress=False)
    assert history[-1]["interrupted"] and history[-1]["steps"] == 2  # the sixth step, of epochs of four
    train(phantom_data, SETTINGS, tmp_path, progress=False, resume=True)
    assert same(weights_of(tmp_path), weights_of(uninterrupted))


def test_more_epochs_can_be_added_but_nothing_else_may_change(phantom_data, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    longer = replace(SETTINGS, epochs=4)
    assert len(train(phantom_data, longer, tmp_path / "run", progress=False, resume=True)) == 4
    assert same(weights_of(tmp_path / "run"), weights_of(uninterrupted))  # of epoch 3: what was there stays
    for other, says in ((replace(SETTINGS, seed=1), "SEED"), (replace(SETTINGS, loss="focal"), "LOSS")):
        with pytest.raises(SegkitError, match=f"cannot be resumed, these differ: {says}"):
            train(phantom_data, other, tmp_path / "run", progress=False, resume=True)
    other_split = replace(phantom_data, split=replace(phantom_data.split, train=phantom_data.split.train[1:]))
    with pytest.raises(SegkitError, match="cannot be resumed, these differ: the subjects"):
        train(other_split, SETTINGS, tmp_path / "run", progress=False, resume=True)


def test_a_training_that_is_done_says_so_and_stays_as_it_is(uninterrupted, phantom_data, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    for epochs in (3, 2):
        history = train(phantom_data, replace(SETTINGS, epochs=epochs), tmp_path / "run", resume=True)
        assert f"3 epochs are done, EPOCHS = {epochs}: nothing to go on with" in capsys.readouterr().out
        assert len(history) == 3 and same(weights_of(tmp_path / "run"), weights_of(uninterrupted))


def test_a_state_that_is_none_is_named(tmp_path):
    path = tmp_path / "last_state.pth"
    path.write_bytes(b"nonsense")
    with pytest.raises(SegkitError, match=r"last_state\.pth: no readable state"):
        load_state(path)
    torch.save({"format": 2, "settings": {}}, path)
    with pytest.raises(SegkitError, match=r"last_state\.pth: no state of a training"):
        load_state(path)


def test_where_there_is_nothing_to_resume_a_training_starts(phantom_data, tmp_path):
    history = train(phantom_data, replace(SETTINGS, epochs=1), tmp_path, progress=False, resume=True)
    assert len(history) == 1


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_a_batch_computed_in_parts_gives_the_same_training(phantom_data, tmp_path, loss):
    """It is the same arithmetic, in another order."""
    weights = []
    for parts in (1, 4):
        settings = replace(SETTINGS, accumulate=parts, loss=loss).checked()
        learner = steps.Learner(phantom_data, settings, Ranks(torch.device("cpu")))
        slices = SliceDataset(phantom_data.staged, phantom_data.split.train, phantom_data.label_map)
        assert learner.step(next(iter(batches(slices, [5, 60, 30, 90], 4))), 1, 1e-3) == pytest.approx(0.02, abs=0.5)
        weights.append(torch.cat([p.grad.flatten() for p in learner.model.parameters()]))
    assert torch.allclose(*weights, rtol=2e-2, atol=2e-2 * weights[0].abs().max())


def test_an_epoch_after_a_resume_counts_its_own_time_alone(phantom_data, tmp_path, monkeypatch):
    train(phantom_data, replace(SETTINGS, epochs=1), tmp_path, progress=False)
    state = load_state(tmp_path / "last_state.pth")
    assert state.place == 0 and 0 <= state.seconds < state.history[0]["seconds"]
    (tmp_path / "other").mkdir()
    resumed = trainer.Trainer(phantom_data, SETTINGS.checked(), Ranks(torch.device("cpu")), tmp_path, fresh=False)
    resumed.restore(replace(state, seconds=1000.0), tmp_path)  # of a running epoch that took so long before
    resumed.epoch(lambda: None, Interrupts(), False)
    assert resumed.history[-1]["seconds"] > 1000 and resumed.state().seconds < 100


def test_a_training_that_came_apart_names_what_to_start_from(phantom_data, tmp_path, monkeypatch):
    train(phantom_data, replace(SETTINGS, epochs=1), tmp_path / "run", progress=False)
    monkeypatch.setattr(steps.Learner, "_move", lambda self: (_ for _ in ()).throw(DivergedError("the loss is nan")))
    with pytest.raises(SegkitError, match="in another OUTPUT_DIR with INIT_CHECKPOINT = ") as error:
        train(phantom_data, SETTINGS, tmp_path / "run", progress=False, resume=True)
    monkeypatch.undo()
    named = str(error.value).partition("INIT_CHECKPOINT = ")[2].partition(", a lower")[0]
    anew = replace(SETTINGS, epochs=1, init_checkpoint=named)
    assert len(train(phantom_data, anew, tmp_path / "again", progress=False)) == 1


def test_a_stop_between_epochs_ends_the_training_and_loses_nothing(phantom_data, uninterrupted, tmp_path, monkeypatch):
    """While an epoch's picture is drawn, and while its checkpoint is written: nothing is unfinished then."""

    def stop(history):
        assert not history.interrupted
        if len(history) == 2:
            raise KeyboardInterrupt

    history = train(phantom_data, SETTINGS, tmp_path / "drawn", stop, progress=False)
    assert history.interrupted and len(history) == 2 and "interrupted" not in history[-1]
    original, written = training.save_checkpoint, []

    def stopping(*args):
        written.append(args[0].name)
        if written.count("checkpoint_epoch2.pth") == 1 and args[0].name == "checkpoint_epoch2.pth":
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(training, "save_checkpoint", stopping)
        assert len(train(phantom_data, SETTINGS, tmp_path / "written", progress=False)) == 2
    for name in ("drawn", "written"):
        assert same(weights_of(tmp_path / name, 2), weights_of(uninterrupted, 2))
        assert not train(phantom_data, SETTINGS, tmp_path / name, progress=False, resume=True).interrupted
        assert same(weights_of(tmp_path / name), weights_of(uninterrupted))


def test_a_second_stop_within_a_step_leaves_a_state_that_is_whole(phantom_data, uninterrupted, tmp_path, monkeypatch):
    done = []
    original = steps.Learner._accumulate

    def impatient(self, *args):
        result = original(self, *args)
        done.append(1)
        if len(done) == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(steps.Learner, "_accumulate", impatient)
        assert train(phantom_data, SETTINGS, tmp_path, progress=False).interrupted
    assert len(load_state(tmp_path / training.STATE_FILE).history) == 1
    train(phantom_data, SETTINGS, tmp_path, progress=False, resume=True)
    assert same(weights_of(tmp_path), weights_of(uninterrupted))


def test_what_a_training_started_from_stays_known(phantom_data, uninterrupted, tmp_path, stopped_after, capsys):
    start = uninterrupted / "checkpoint_epoch1.pth"
    with stopped_after(6):  # in the second epoch: there is a state to go on from
        train(phantom_data, replace(SETTINGS, init_checkpoint=str(start)), tmp_path, progress=False)
    train(phantom_data, SETTINGS, tmp_path, progress=False, resume=True)
    assert load_checkpoint(tmp_path / "checkpoint_epoch3.pth").settings["init_checkpoint"] == str(start)
    assert "left out" not in capsys.readouterr().out
    assert read_split(tmp_path / "split.json").earlier == (read_split(uninterrupted / "split.json").own,)
    shutil.copytree(uninterrupted, tmp_path / "run")
    longer = replace(SETTINGS, epochs=4, init_checkpoint=str(start))
    train(phantom_data, longer, tmp_path / "run", progress=False, resume=True)
    assert load_checkpoint(tmp_path / "run" / "checkpoint_epoch4.pth").settings["init_checkpoint"] is None
    assert f"INIT_CHECKPOINT = {start}: left out" in capsys.readouterr().out


def test_a_second_stop_in_a_first_step_changes_no_checkpoint(phantom_data, uninterrupted, tmp_path, monkeypatch):
    """Epochs have four steps; after the fifth the weights are no longer those that the first epoch was scored with."""
    done, original = [], steps.Learner._move

    def impatient(self):
        original(self)
        done.append(1)
        if len(done) == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(steps.Learner, "_move", impatient)
        assert train(phantom_data, SETTINGS, tmp_path, progress=False).interrupted
    assert same(weights_of(tmp_path, 1), weights_of(uninterrupted, 1))


def test_a_stop_in_the_last_validation_of_a_member_stops_the_ensemble(phantom_data, tmp_path, monkeypatch):
    """Several ranks hold a stop back: nothing looks for it after the last step, but the next member must not start."""
    original = trainer.validate

    def stopping(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, "validate", stopping)
    monkeypatch.setattr(training, "Interrupts", lambda always=False: Interrupts(always=True))
    histories = train_members(phantom_data, replace(SETTINGS, epochs=1), tmp_path, members=2, progress=False)
    assert len(histories) == 1 and histories[0].interrupted and len(histories[0]) == 1


def test_an_entry_of_augmentation_that_was_not_there_yet_had_its_default():
    stored = asdict(SETTINGS)
    del stored["augmentation"]["blur_pixels"]
    assert changed(SETTINGS, stored) == []
    other = replace(SETTINGS, augmentation=replace(SETTINGS.augmentation, blur_pixels=0.9))
    assert changed(other, stored) == ["augmentation"]
    del stored["augmentation"]
    assert changed(SETTINGS, stored) == [] and changed(other, stored) == ["augmentation"]


def test_changed_data_are_named_and_not_gone_on_with(phantom_dir, tmp_path):
    """Liver and spleen exchanged in one subject, a scan of another shifted by one HU; the test subject may change."""
    shutil.copytree(phantom_dir, tmp_path / "data")
    small = replace(SETTINGS, epochs=1)

    def opened():
        return open_data(tmp_path / "data", tmp_path / "staged", progress=False)

    data = opened()
    train(data, small, tmp_path / "run", progress=False)
    first, second = (part.subject for part in data.split.train[:2])
    masks = tmp_path / "data" / first / "segmentations"
    liver, spleen, aside = (masks / f"{name}.nii.gz" for name in ("liver", "spleen", "aside"))
    for source, target in ((liver, aside), (spleen, liver), (aside, spleen)):
        source.rename(target)
    change_scan(tmp_path / "data" / second)
    change_scan(tmp_path / "data" / data.split.test[0].subject)
    expected = f"the data have changed since: the labels of {first}, the CT of {second}; put the files back"
    with pytest.raises(SegkitError, match=expected):
        train(opened(), replace(small, epochs=2), tmp_path / "run", progress=False, resume=True)
    for source, target in ((liver, aside), (spleen, liver), (aside, spleen)):
        source.rename(target)
    change_scan(tmp_path / "data" / second, -1)
    assert len(train(opened(), replace(small, epochs=2), tmp_path / "run", progress=False, resume=True)) == 2


def change_scan(folder: Path, by: int = 1) -> None:
    path = folder / "ct.nii.gz"
    image = nib.load(path)
    changed = (np.asarray(image.dataobj) + by).astype(image.get_data_dtype())
    nib.save(nib.Nifti1Image(changed, image.affine, image.header), path)


def test_a_state_of_an_earlier_version_goes_on_and_says_what_is_not_known(phantom_data, tmp_path, capsys):
    train(phantom_data, replace(SETTINGS, epochs=1), tmp_path, progress=False)
    path = tmp_path / "last_state.pth"
    content = torch.load(path, weights_only=True)
    del content["contents"], content["calibration"]
    torch.save(content, path)
    history = train(phantom_data, replace(SETTINGS, epochs=2), tmp_path, progress=False, resume=True)
    assert len(history) == 2 and "whether the data are those that it began with is not known" in capsys.readouterr().out
