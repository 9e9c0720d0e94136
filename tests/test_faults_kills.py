"""Faults of time and place: staging, training, predicting and downloading, each killed at any moment.

After a restart the result is that of a run that nobody killed, and at no moment a file or folder is half there.
"""

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_nifti, write_subject
from fault_processes import Ended, files_of, left_over
from test_download import NAME, archive, server, source  # noqa: F401  fixtures
from test_predicting import Bright, scan_file

from segkit import trainer, training
from segkit.checkpoints import load_checkpoint
from segkit.dataset import open_data
from segkit.download import Release, download, fetching, unpacking
from segkit.ensemble import train_members
from segkit.inference import Predictor
from segkit.predicting import predict_scans
from segkit.scans import find_scans
from segkit.settings import TrainSettings
from segkit.staging import stage
from segkit.subjects import find_subjects
from segkit.training_state import load_state

SETTINGS = TrainSettings(
    epochs=2, batch_size=4, target_shape=(32, 32), features=(4, 8), slices_per_epoch=10, validation_slices=4,
    device="cpu",
)  # fmt: skip
FORMATS = ("nifti", "masks", "slicer", "csv", "stl")
EXPECTED = "after the restart all is as if nobody had killed it; nothing half written, no temporary files left"


def moments(whole: Ended, by_time: int, by_change: int) -> list[dict]:
    """When to kill: spread at random over the time that `whole` took, and before changes of files that it made."""
    assert whole.code == 0, whole.err
    rng = random.Random(whole.changes)
    times = [{"kill_after": whole.seconds * rng.uniform(part, part + 1) / by_time} for part in range(by_time)]
    changes = rng.sample(range(1, whole.changes + 1), min(by_change, whole.changes))
    return times + [{"kill_before": change} for change in sorted(changes)]


class Kills:
    """Counts what the kills of one row hit."""

    def __init__(self):
        self.hits = self.left = 0

    def hit(self, run: Callable[..., Ended], folder: Path, moment: dict, left: Callable[[Path], object] = left_over):
        """Let `run` begin anew in `folder` until it is killed there: on a busy machine a moment may come too late."""
        for _ in range(9):
            ended = run(folder, **moment)
            if ended.killed:
                self.hits += 1
                self.left += bool(left(folder))
                return
            assert ended.code == 0, ended.err
            shutil.rmtree(folder, ignore_errors=True)
            moment = {name: type(value)(value / 2) for name, value in moment.items()}
        raise AssertionError(f"never killed, the last time {moment}")

    def into(self, row) -> None:
        row.times = self.hits
        row.seen = f"as expected; {self.left} of the kills left temporary files, which the restart removed"


# --- staging


def stage_all(data: str, store: str, jobs: int) -> None:
    stage(find_subjects(data)[0], store, jobs, progress=False)


@pytest.mark.parametrize("jobs", [1, 2])
def test_staging(first, tmp_path, fault, many, jobs):
    """Into a store that holds one of the subjects as it was before its files changed, and lacks the others.

    Workers outlive the process that is killed, for a while.
    """
    by_time, by_change = (many(4, 25), many(6, 25)) if jobs == 1 else (many(0, 6), 0)
    if not by_time:
        pytest.skip("starting workers again and again takes long: make faults")
    what = "staging" if jobs == 1 else f"staging with {jobs} workers"
    row = fault(f"{what} killed at random moments and between changes of files", EXPECTED)
    rng = np.random.default_rng(0)
    for name in ("s0000", "s0001", "s0002"):
        masks = {organ: rng.random((60, 50, 40)) < 0.3 for organ in ("liver", "spleen", "aorta")}
        write_subject(tmp_path / "data" / name, masks)
    home = tmp_path / "before"
    stage(find_subjects(tmp_path / "data")[0][:1], home, progress=False)
    write_nifti(tmp_path / "data" / "s0000" / "segmentations" / "liver.nii.gz", np.ones((60, 50, 40), np.uint8))

    def run(store: Path, **how) -> Ended:
        if not store.exists():
            shutil.copytree(home, store)
        return first.run("test_faults_kills:stage_all", tmp_path / "data", store, jobs, **how)

    whole = run(tmp_path / "whole")
    older, expected = files_of(home), files_of(tmp_path / "whole")
    assert len(older) == 3 and len(expected) == 9 and len(older.keys() & expected.keys()) == 1  # subject.json
    kills = Kills()
    for number, moment in enumerate(moments(whole, by_time, by_change)):
        store = tmp_path / str(number)
        kills.hit(run, store, moment)
        if jobs == 1:  # else a worker may just be writing
            assert_whole_folders(files_of(store), older, expected)
        again = run(store)
        assert again.code == 0, again.err
        assert files_of(store) == expected
        started = time.monotonic()
        while jobs > 1 and left_over(store) and time.monotonic() < started + 30:
            time.sleep(0.1)
        assert left_over(store) == []
        shutil.rmtree(store)
    kills.into(row)


def assert_whole_folders(found: dict[str, bytes], *versions: dict[str, bytes]) -> None:
    """Each folder that is there has all files of one version."""
    for folder in {name.rpartition("/")[0] for name in found}:
        there = {name: content for name, content in found.items() if name.rpartition("/")[0] == folder}
        assert any(
            there == {name: content for name, content in version.items() if name.rpartition("/")[0] == folder}
            for version in versions
        ), folder


# --- training


def train_here(data: str, store: str, folder: str, members: int, resume: bool, epochs: int = 2) -> None:
    trainer.STATE_SECONDS = 0  # after every step
    opened = open_data(data, store, progress=False)
    settings = TrainSettings(**{**SETTINGS.__dict__, "epochs": epochs})
    train_members(opened, settings, folder, members, progress=False, resume=resume)


@pytest.mark.parametrize("members", [1, 2])
def test_training(first, phantom_data, tmp_path, fault, many, members):
    """Into a folder that holds an older run, which moves away first."""
    what = "training" if members == 1 else f"training of {members} members"
    row = fault(f"{what} killed at random moments and between changes of files", EXPECTED)
    store = next(iter(phantom_data.staged.values())).folder.parents[1]

    def run(folder: Path, resume: bool, epochs: int = 2, **how) -> Ended:
        if not folder.exists() and epochs == 2:
            shutil.copytree(tmp_path / "before", folder)
        function = "test_faults_kills:train_here"
        return first.run(function, phantom_data.folder, store, folder, members, resume, epochs, **how)

    assert run(tmp_path / "before", False, epochs=1).code == 0
    older = files_of(tmp_path / "before")
    whole = run(tmp_path / "whole", False)
    kills = Kills()
    by_time, by_change = (many(2, 25), many(2, 10)) if members == 1 else (many(1, 4), many(1, 4))
    for number, moment in enumerate(moments(whole, by_time, by_change)):
        folder = tmp_path / str(number)
        kills.hit(partial(run, resume=False), folder, moment)
        assert_readable(folder)
        begun = not older.items() <= files_of(folder).items()  # else nothing has happened yet
        if number % 2 and begun:  # the restart is killed, too
            run(folder, True, kill_after=whole.seconds / 8)
        again = run(folder, resume=begun)
        assert again.code == 0, again.err
        assert_same_run(folder, tmp_path / "whole")
        assert left_over(folder) == [] and moved(folder) == older
        shutil.rmtree(folder)
    kills.into(row)


def moved(folder: Path) -> dict[str, bytes]:
    """The files of the older run, from wherever they moved to; nothing where they are still in their place."""
    archives = list((folder / "runs").glob("[!.]*"))
    full = [each for each in archives if list(each.rglob("last_state.pth"))]
    assert len(full) <= 1
    return files_of(full[0]) if full else {}


def assert_readable(folder: Path) -> None:
    """What is there under its name can be read."""
    for path in folder.rglob("[!.]*"):
        if path.name.startswith("checkpoint_epoch"):
            load_checkpoint(path)
        elif path.name == training.STATE_FILE:
            load_state(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())


def assert_same_run(folder: Path, whole: Path) -> None:
    """The same files; the same weights, scores and settings."""
    names = [{name for name in files_of(each) if not name.startswith("runs/")} for each in (folder, whole)]
    assert names[0] == names[1] and len(names[0]) > 5
    for name in names[0]:
        pair = folder / name, whole / name
        if "checkpoint_epoch" in name:
            first, second = (load_checkpoint(path).model.state_dict() for path in pair)
            assert all(torch.equal(first[key], second[key]) for key in first)
        elif name.endswith("training_history.json"):
            first, second = (json.loads(path.read_text())["epochs"] for path in pair)
            assert [{**row, "seconds": 0} for row in first] == [{**row, "seconds": 0} for row in second]
        elif name.endswith(".json"):
            assert pair[0].read_bytes() == pair[1].read_bytes()


# --- predicting


def predict_all(scans: str, out: str) -> None:
    predictor = Predictor(Bright(), {"liver": 0, "spleen": 1}, (20, 20), device="cpu")
    list(predict_scans(predictor, find_scans(scans), out, FORMATS, progress=False, resume=True))


def test_predicting(first, tmp_path, fault, many):
    row = fault("predicting three scans killed at random moments and between changes of files", EXPECTED)
    for seed, name in enumerate("abc"):
        scan_file(tmp_path / "in" / f"{name}.nii.gz", seed=seed)

    def run(out: Path, **how) -> Ended:
        return first.run("test_faults_kills:predict_all", tmp_path / "in", out, **how)

    whole = run(tmp_path / "whole")
    expected = files_of(tmp_path / "whole")
    assert len(expected) == 3 * 8
    kills = Kills()
    for number, moment in enumerate(moments(whole, many(4, 25), many(6, 25))):
        out = tmp_path / str(number)
        kills.hit(run, out, moment)
        found = files_of(out)
        tops = {name.split("/")[0] for name in found}
        assert found == {name: content for name, content in expected.items() if name.split("/")[0] in tops}
        again = run(out)
        assert again.code == 0, again.err
        assert files_of(out) == expected and left_over(out) == []
    kills.into(row)


# --- downloading


def fetch(folder: str, url: str, size: int, md5: str, keep: bool) -> None:
    fetching.BLOCK = unpacking.BLOCK = 1 << 14
    download(folder, Release("tiny", url, size, md5), keep_archive=keep, progress=False, wait=0.01)


@pytest.mark.parametrize("keep", [True, False])
def test_downloading(first, server, source, archive, tmp_path, fault, many, keep):  # noqa: F811
    row = fault(
        f"downloading {'and keeping the archive ' * keep}killed at random moments and before changes of files", EXPECTED
    )
    server.pause = 0.0005  # after each 8 kB

    def run(folder: Path, **how) -> Ended:
        digest = hashlib.md5(archive).hexdigest()
        return first.run("test_faults_kills:fetch", folder, server.url(), len(archive), digest, keep, **how)

    whole = run(tmp_path / "whole")
    expected = {**files_of(source), **({NAME: archive} if keep else {})}
    assert files_of(tmp_path / "whole") == expected
    kills = Kills()
    stages = set()
    for number, moment in enumerate(moments(whole, many(6, 25), many(10, whole.changes))):
        folder = tmp_path / str(number)
        kills.hit(run, folder, moment, left=lambda folder: list(folder.glob(".download/unpacking")))
        found = files_of(folder)
        tops = {name.split("/")[0] for name in found}
        assert found == {name: content for name, content in expected.items() if name.split("/")[0] in tops}
        stages.add(len(tops))
        again = run(folder)
        assert again.code == 0, again.err
        assert files_of(folder) == expected
        assert sorted(path.name for path in (folder / ".download").iterdir()) == ["lock", "state.json"]
    assert not many(False, True) or {0, 1, 2, 3, 4, 5} <= stages  # with each number of subjects in place
    kills.into(row)
