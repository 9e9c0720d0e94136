"""What a result came from."""

import json
import shutil
import subprocess
from dataclasses import replace
from importlib.metadata import version

import torch
from conftest import ROOT

from segkit.checkpoints import load_checkpoint
from segkit.dataset import open_data
from segkit.ranks import Ranks
from segkit.record import data_fingerprint, git_state, make_record
from segkit.settings import TrainSettings
from segkit.training import train


def test_history_and_checkpoint_carry_the_record(phantom_data, tmp_path):
    settings = TrainSettings(
        epochs=1, batch_size=2, target_shape=(32, 32), features=(4, 8), slices_per_epoch=4, validation_slices=2,
        device="cpu", seed=5,
    )  # fmt: skip
    train(phantom_data, settings, tmp_path, progress=False)
    record = json.loads((tmp_path / "training_history.json").read_text())["record"]
    loaded = load_checkpoint(tmp_path / "checkpoint_epoch1.pth")
    assert loaded.record == record == make_record(phantom_data, Ranks(torch.device("cpu")))
    assert loaded.settings["seed"] == 5
    assert record["versions"]["torch"] == version("torch") and record["versions"]["numpy"] == version("numpy")
    assert record["processes"] == 1 and record["device"].startswith("cpu") and len(record["data"]) == 64


def test_the_fingerprint_follows_the_content_not_the_place(phantom_dir, phantom_data, tmp_path):
    copy = shutil.copytree(phantom_dir, tmp_path / "copy")
    copied = open_data(copy, tmp_path / "staged", progress=False)
    assert data_fingerprint(copied) == data_fingerprint(phantom_data)
    assert data_fingerprint(replace(copied, label_map={"liver": 0})) != data_fingerprint(phantom_data)
    other_split = replace(copied.split, train=copied.split.train[1:])
    assert data_fingerprint(replace(copied, split=other_split)) != data_fingerprint(phantom_data)
    subject = copy / copied.split.train[0].subject / "segmentations"
    shutil.copy(subject / "liver.nii.gz", subject / "spleen.nii.gz")
    changed = open_data(copy, tmp_path / "staged", progress=False)
    assert data_fingerprint(changed) != data_fingerprint(phantom_data)


def test_the_state_of_the_code_is_that_of_git(tmp_path):
    assert git_state(tmp_path) is None  # not a clone

    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path)["changed"]
    assert not git_state(tmp_path, ["elsewhere"])["changed"]
    shutil.rmtree(tmp_path / ".git")
    (tmp_path / ".git").mkdir()
    assert git_state(tmp_path) is None  # damaged
    assert (ROOT / ".git").exists() == (git_state(ROOT) is not None)
