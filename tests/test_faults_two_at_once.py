"""Faults of company: two processes that stage, train, evaluate, predict or download into the same folder.

One waits or is refused with a message; what comes out is of one of them. A lock goes with the process that held it.
"""

import errno
import os
import time
from copy import copy
from pathlib import Path

import filelock
import numpy as np
import pytest
from conftest import write_nifti, write_subject
from fault_processes import files_of, left_over
from test_download import archive, server, source, tree_of  # noqa: F401  fixtures
from test_faults_kills import SETTINGS, assert_same_run, predict_all
from test_ranks import launch

from segkit import evaluation, predicting, staging, training
from segkit.dataset import open_data
from segkit.download import Release, download
from segkit.errors import SegkitError
from segkit.locks import alone
from segkit.runs import PREDICTIONS_LOCK, RUN_LOCK
from segkit.splits import Part
from segkit.staging import stage
from segkit.subjects import find_subjects

TAKEN = "another process is {} "


def wait_for(path: Path) -> None:
    started = time.monotonic()
    while not path.exists():
        assert time.monotonic() - started < 60, f"{path} never came"
        time.sleep(0.005)


# --- staging


def stage_telling(data: str, store: str, begun: str, go: str) -> None:
    """Stage, which leaves a file `begun`; prints what is not in the store yet, and waits for a file `go` with it."""
    original = staging._write_store

    def write(subject, folder, *more):
        print("staging", subject.name, flush=True)
        wait_for(Path(go))
        return original(subject, folder, *more)

    staging._write_store = write
    Path(begun).touch()
    stage(find_subjects(data)[0], store, progress=False)


@pytest.fixture
def data(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("s0000", "s0001", "s0002"):
        write_subject(tmp_path / "data" / name, {organ: rng.random((60, 50, 40)) < 0.3 for organ in ("liver", "aorta")})
    return tmp_path / "data"


def test_staging(first, second, data, tmp_path, fault, many):
    row = fault("two processes stage the same data into the same store", "one waits for the other, and stages nothing")
    stage(find_subjects(data)[0], tmp_path / "whole", progress=False)
    for number in range(many(1, 10)):
        store, begun, go = (tmp_path / f"{number}{end}" for end in ("", ".begun", ".go"))
        first.start("test_faults_two_at_once:stage_telling", data, store, begun, go)
        time.sleep(0.02 * number)
        second.start("test_faults_two_at_once:stage_telling", data, store, f"{begun}2", go)
        for file in (begun, Path(f"{begun}2")):
            wait_for(file)
        time.sleep(0.5)  # for both to come to the lock
        go.touch()
        both = first.wait(), second.wait()
        assert [each.code for each in both] == [0, 0], both
        staged = sorted(line for each in both for line in each.out.splitlines() if line.startswith("staging"))
        assert staged == ["staging s0000", "staging s0001", "staging s0002"]
        assert sum("another process stages into it, waiting" in each.out for each in both) == 1
        assert files_of(store) == files_of(tmp_path / "whole") and left_over(store) == []
        row.times += 1


def test_a_lock_goes_with_a_killed_process(first, second, data, tmp_path, fault, many):
    row = fault("staging killed while another process waits for it", "the other one goes on at once")
    for number in range(many(1, 10)):
        store, begun, never, go = (tmp_path / f"{number}{end}" for end in ("", ".begun", ".never", ".go"))
        go.touch()
        first.start("test_faults_two_at_once:stage_telling", data, store, begun, never)
        wait_for(begun)
        time.sleep(0.5)
        second.start("test_faults_two_at_once:stage_telling", data, store, f"{begun}2", go)
        wait_for(Path(f"{begun}2"))
        time.sleep(0.5 + 0.1 * number)
        first.kill()
        killed, done = first.wait(), second.wait()
        assert killed.killed and done.code == 0 and "another process stages into it, waiting" in done.out
        assert len(files_of(store)) == 9 and left_over(store) == []
        row.times += 1


def test_what_is_staged_is_read_while_others_stage(first, data, tmp_path, fault):
    """Its store is locked for as long as somebody stages; a training on what is there need not wait."""
    row = fault("opening staged data while another process stages more into the same store", "no waiting")
    stage(find_subjects(data)[0][:2], tmp_path / "store", progress=False)
    [home] = (tmp_path / "store").iterdir()
    with alone(home / ".lock", "taken"):
        done = first.run("test_faults_two_at_once:open_two", data, tmp_path / "store")
    assert done.code == 0 and done.out == "2\n"
    row.times += 1


def open_two(data: str, store: str) -> None:
    print(len(open_data(data, store, exclude=["s0002"], progress=False).staged))


def test_who_reads_a_store_never_gets_half_of_another(data, tmp_path, fault):
    """A source changes and its subject is staged anew; a training that began before reads on."""
    row = fault(
        "a subject is staged anew while another process reads it", "that reads what it was, or an error says so"
    )
    [reading, *_], _ = stage(find_subjects(data)[0], tmp_path / "store", progress=False)
    [unopened, *_], _ = stage(find_subjects(data)[0], tmp_path / "store", progress=False)
    for _ in range(100):  # as many other subjects as there are files that blosc2 keeps open, and more
        copy(unopened).hu(0)
    before, codes = reading.hu(), reading.labels().codes
    changed = np.full((60, 50, 40), 7, np.int16)
    changed[0] = -1000
    write_nifti(data / "s0000" / "ct.nii.gz", changed)
    write_nifti(data / "s0000" / "segmentations" / "liver.nii.gz", (changed == 7).astype(np.uint8))
    [anew, *_], _ = stage(find_subjects(data)[0], tmp_path / "store", progress=False)
    assert anew.hu(30).max() == 7 and anew.labels(30).voxels()["liver"] == 59 * 50
    for z in range(40):  # the files that it has open are gone from their folder, and still there to be read
        assert np.array_equal(reading.hu(z), before[z]) and np.array_equal(reading.labels(z).codes, codes[z])
        for read in (unopened.hu, unopened.labels):
            with pytest.raises(SegkitError, match=r"s0000.*start again"):
                read(z)
        row.times += 4


# --- training


def train_telling(data: str, store: str, folder: str, members: int = 1, resume: bool = False, seed: int = 0) -> None:
    """Train; a little longer than it would, so that another one comes in between."""
    from dataclasses import replace

    from segkit.ensemble import train_members

    opened = open_data(data, store, progress=False)
    settings = replace(SETTINGS, seed=seed)
    train_members(opened, settings, folder, members, lambda _: lambda _: time.sleep(0.5), progress=False, resume=resume)


@pytest.mark.parametrize("members", [1, 2])
def test_training(first, second, phantom_data, tmp_path, fault, many, members):
    what = "train" if members == 1 else "train an ensemble"
    row = fault(f"two processes {what} into the same folder", "the second is refused, the first is not disturbed")
    store = next(iter(phantom_data.staged.values())).folder.parents[1]
    function, inputs = "test_faults_two_at_once:train_telling", (phantom_data.folder, store)
    assert first.run(function, *inputs, tmp_path / "whole", members).code == 0
    for number in range(many(1, 6)):
        folder = tmp_path / str(number)
        first.start(function, *inputs, folder, members)
        wait_for(folder / "label_map.json")
        time.sleep(0.15 * number)
        resume = number % 2 == 1  # what goes on has as many members; a new training has one
        refused = second.run(function, *inputs, folder, members if resume else 1, resume, 7)
        assert refused.code == 1 and f"{folder}: another process is training into it; wait until" in refused.err
        done = first.wait()
        assert done.code == 0, done.err
        assert_same_run(folder, tmp_path / "whole")
        assert left_over(folder) == [] and not (folder / "runs").exists()
        row.times += 1


def test_a_training_whose_loaders_outlive_it(first, second, phantom_data, tmp_path, fault, many):
    row = fault("a training with processes that load its slices is killed", "the next one starts at once")
    store = next(iter(phantom_data.staged.values())).folder.parents[1]
    for number in range(many(1, 5)):
        folder = tmp_path / str(number)
        first.start("test_faults_two_at_once:train_with_workers", phantom_data.folder, store, folder)
        wait_for(folder / training.STATE_FILE)
        first.kill()
        assert first.wait().killed
        again = second.run("test_faults_two_at_once:train_telling", phantom_data.folder, store, folder)
        assert again.code == 0, again.err
        row.times += 1


def train_with_workers(data: str, store: str, folder: str) -> None:
    from dataclasses import replace

    opened = open_data(data, store, progress=False)
    training.train(opened, replace(SETTINGS, epochs=100_000, workers=2), folder, progress=False)


def test_a_kernel_that_goes_on_holds_nothing(second, phantom_data, tmp_path, fault, stopped_after):
    row = fault("a training in a notebook ends, is stopped or fails; the kernel goes on", "another process may train")
    store = next(iter(phantom_data.staged.values())).folder.parents[1]

    def fail(history):
        with pytest.raises(SegkitError, match="taken"), alone(tmp_path / RUN_LOCK, "taken"):
            pass
        raise RuntimeError("a figure")

    with stopped_after(2):
        assert training.train(phantom_data, SETTINGS, tmp_path, progress=False).interrupted
    with alone(tmp_path / RUN_LOCK, "taken"):
        row.times += 1
    training.train(phantom_data, SETTINGS, tmp_path, progress=False)
    with alone(tmp_path / RUN_LOCK, "taken"):
        row.times += 1
    with pytest.raises(RuntimeError, match="a figure") as kept:  # the traceback holds every frame, as a notebook does
        training.train(phantom_data, SETTINGS, tmp_path, fail, progress=False)
    done = second.run("test_faults_two_at_once:train_telling", phantom_data.folder, store, tmp_path)
    assert done.code == 0 and kept.tb, done.err
    row.times += 1


def test_several_ranks_are_one_training(phantom_data, tmp_path, fault, many):
    row_of = ("a training of two ranks into a folder that is taken", "all ranks end, with the message")
    if not many(False, True):
        pytest.skip("launching several processes takes long: make faults")
    row = fault(*row_of)
    store = next(iter(phantom_data.staged.values())).folder.parents[1]
    command = ["-m", "segkit", "train", phantom_data.folder, "--output-dir", tmp_path, "--stage-dir", store,
               "--epochs", "1", "--batch-size", "4", "--target-shape", "32", "32", "--features", "4", "8",
               "--slices-per-epoch", "8", "--validation-slices", "4", "--device", "cpu"]  # fmt: skip
    with alone(tmp_path / RUN_LOCK, "taken"):
        running = launch(*command)
        output, _ = running.communicate(timeout=300)
    assert running.returncode != 0 and "another process is training into it" in output
    running = launch(*command)
    output, _ = running.communicate(timeout=300)
    assert running.returncode == 0, output
    row.times += 1


# --- evaluating


def test_evaluating(first, phantom_data, tmp_path, fault):
    """Two would mix their kept predictions; a new run would move them away under the first one's hands."""
    row = fault("a run that is being evaluated is evaluated again, or a new run starts in its folder", "refused")
    store = next(iter(phantom_data.staged.values())).folder.parents[1]
    training.train(phantom_data, SETTINGS, tmp_path, progress=False)
    before = files_of(tmp_path)
    with alone(tmp_path / PREDICTIONS_LOCK, "taken"):
        with pytest.raises(SegkitError, match="another process is evaluating the run in it"):
            evaluation.evaluate(None, {}, [Part("s0000")], "test", tmp_path / "predictions", progress=False)
        refused = first.run("test_faults_two_at_once:train_telling", phantom_data.folder, store, tmp_path)
        assert refused.code == 1 and "another process is evaluating the run in it; wait" in refused.err
        assert files_of(tmp_path) == before
        resumed = first.run("test_faults_two_at_once:train_telling", phantom_data.folder, store, tmp_path, 1, True)
        assert resumed.code == 0, resumed.err  # a run is evaluated while it goes on
    row.times += 2


# --- predicting


def test_predicting(first, second, tmp_path, fault, many):
    from test_predicting import scan_file

    row = fault("two processes predict the same scans into the same folder", "the second is refused, or leaves out "
                "what is done; the results are whole")  # fmt: skip
    for seed, name in enumerate("abc"):
        scan_file(tmp_path / "in" / f"{name}.nii.gz", seed=seed)
    function = "test_faults_kills:predict_all"
    assert first.run(function, tmp_path / "in", tmp_path / "whole").code == 0
    for number in range(many(2, 20)):
        out = tmp_path / str(number)
        first.start(function, tmp_path / "in", out)
        time.sleep(0.02 * number)
        second.start(function, tmp_path / "in", out)
        both = first.wait(), second.wait()
        assert 0 in (both[0].code, both[1].code)
        assert all(each.code == 0 or "another process is segmenting this scan" in each.err for each in both), both
        again = first.run(function, tmp_path / "in", out)
        assert again.code == 0 and files_of(out, hidden=True) == files_of(tmp_path / "whole")
        row.times += 1


def test_predicting_other_scans_beside(tmp_path, fault):
    row = fault("another process predicts other scans into the same folder", "both do their work")
    from test_predicting import scan_file

    scan_file(tmp_path / "in" / "a.nii.gz")
    out = tmp_path / "out"
    draft = out / f".{os.getpid() + 1}.segkit.b"
    draft.mkdir(parents=True)
    with alone(predicting.lock_of(out / "b"), "taken"):
        predict_all(str(tmp_path / "in"), str(out))
        assert draft.is_dir()  # not swept: its process lives
    predict_all(str(tmp_path / "in"), str(out))
    assert sorted(path.name for path in out.iterdir()) == ["a"]
    row.times += 1


# --- downloading


def fetch(folder: str, url: str, size: int, md5: str) -> None:
    download(folder, Release("tiny", url, size, md5), progress=False, wait=0.01, timeout=1.0)


def test_downloading(first, second, server, source, tmp_path, fault, many):  # noqa: F811
    row = fault("two processes download into the same folder", "the second is refused, the first is not disturbed")
    release = server.release()
    inputs = (release.url, release.size, release.md5)
    for number in range(many(1, 10)):
        folder = tmp_path / str(number)
        server.stalls, server.cut, server.requests = True, [10_000 + 9_000 * number], []
        sent = server.sent
        first.start("test_faults_two_at_once:fetch", folder, *inputs)
        while server.sent == sent:
            time.sleep(0.01)
        refused = second.run("test_faults_two_at_once:fetch", folder, *inputs)
        assert refused.code == 1 and "another process is downloading into it" in refused.err
        assert len(server.requests) == 1
        done = first.wait()
        assert done.code == 0, done.err
        assert tree_of(folder) == tree_of(source)
        row.times += 1


# --- where there are no locks


def test_without_locks_it_warns(tmp_path, monkeypatch, fault):
    row = fault("a file system that has no locks", "a warning, and the work is done")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked"), alone(tmp_path / ".lock", "taken"):
        row.times += 1
