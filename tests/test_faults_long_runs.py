"""Faults of time: what grows from epoch to epoch, or from subject to subject, ends a run of days."""

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import test_resume
from conftest import write_subject

from segkit.checkpoints import best_checkpoint
from segkit.errors import SegkitError
from segkit.settings import TrainSettings
from segkit.training import train

SMALL = TrainSettings(
    batch_size=4, target_shape=(32, 32), features=(4, 8), slices_per_epoch=4, validation_slices=2, balance=0.5,
    keep_checkpoints=5, device="cpu",
)  # fmt: skip

MEASURE = """
import gc, json, os, sys, time, tracemalloc
from pathlib import Path
import psutil
from segkit.runs import left_behind
sys.path.insert(0, {tests!r})
process, rows = psutil.Process(), []
def measure(**more):
    gc.collect()
    python = tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0
    rows.append(dict(rss=process.memory_info().rss, files=process.num_fds(), threads=process.num_threads(),
                     python=python, at=time.perf_counter(), **more))
"""

TRAINING = (
    MEASURE
    + """
from dataclasses import replace
from segkit import training
from segkit.dataset import open_data
from test_faults_long_runs import SMALL
writing = [0.0]
original = training.write_json
def write_json(*args):
    started = time.perf_counter()
    original(*args)
    writing.append(time.perf_counter() - started)
training.write_json = write_json
folder = Path({folder!r})
def after(history):
    measure(left=len(list(left_behind(folder))), history=(folder / "training_history.json").stat().st_size,
            bytes=sum(path.stat().st_size for path in folder.iterdir()), writing=writing[-1])
if {traced}:
    tracemalloc.start()
data = open_data({data!r}, {stage!r}, progress=False)
training.train(data, replace(SMALL, epochs={epochs}), folder, after, progress=False)
print(json.dumps(rows))
"""
)

SUBJECTS = (
    MEASURE
    + """
import torch
from segkit import evaluation, staging
from segkit.dataset import open_data
from segkit.inference import Predictor
from segkit.networks import build_network
from segkit.splits import Part
staging.MOST_OPEN = 16
torch.manual_seed(0)
data = open_data({data!r}, {stage!r}, progress=False)
predictor = Predictor(build_network(features=[4, 8], out_channels=3), data.label_map, (32, 32), device="cpu")
folder = Path({folder!r})
def predict(subject, original=predictor.predict):
    prediction = original(subject)
    measure(left=len(list(left_behind(folder))))
    return prediction
predictor.predict = predict
found = evaluation.evaluate(predictor, data.staged, [Part(name) for name in data.staged], "test", folder,
                            progress=False)
assert found.scores["subject"].nunique() == len(data.staged) == len(rows)
print(json.dumps(rows))
"""
)


def measured(program: str, **values) -> list[dict]:
    """What a program, run as a process of its own, measured after each epoch or subject."""
    code = program.format(tests=str(Path(__file__).parent), **values)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def quarters(rows: list[dict], column: str) -> tuple[float, float]:
    """The medians of the second quarter, when all that is made once is there, and of the last one."""
    quarter = len(rows) // 4
    values = [row[column] for row in rows]
    return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])


def seconds(rows: list[dict]) -> list[dict]:
    return [{"seconds": after["at"] - before["at"]} for before, after in pairwise(rows)]


def flat(rows: list[dict], growth_mb: float) -> str:
    """Nothing is left open or lying about, the memory stays; says by how much it grew."""
    assert len({each["files"] for each in rows[len(rows) // 4 :]}) == 1, [each["files"] for each in rows]
    assert len({each["threads"] for each in rows[len(rows) // 4 :]}) == 1
    assert all(each["left"] == 0 for each in rows)
    early, late = quarters(rows, "rss")
    assert (late - early) / 2**20 < growth_mb, (early, late)
    return f"memory {early / 2**20:.0f} MB, {(late - early) / 2**20:+.1f} MB at the end; {rows[-1]['files']} open files"


def test_many_epochs(phantom_data, tmp_path, fault, many):
    epochs = many(16, 200)
    row = fault(
        f"{epochs} epochs in one process",
        "memory and open files flat, no temporary files, less than twice the time at the end; disk and history",
    )
    stage_dir = next(iter(phantom_data.staged.values())).folder.parents[1]
    rows = measured(
        TRAINING, data=str(phantom_data.folder), stage=str(stage_dir), folder=str(tmp_path), epochs=epochs, traced=False
    )
    row.times = len(rows)
    assert row.times == epochs
    seen = flat(rows, 12)
    kept = {int(path.stem.removeprefix("checkpoint_epoch")) for path in tmp_path.glob("checkpoint*")}
    last = set(range(epochs - 4, epochs + 1))
    assert last <= kept and len(kept) <= 6 and kept - last <= {int(best_checkpoint(tmp_path).stem[16:])}
    history = json.loads((tmp_path / "training_history.json").read_text())["epochs"]
    assert [each["epoch"] for each in history] == list(range(1, epochs + 1))
    # linear: the second half of the epochs adds what the first did, and a thing that grows would add three times that
    half, whole = rows[epochs // 2 - 1]["history"], rows[-1]["history"]
    assert whole - half == pytest.approx(half - rows[0]["history"], rel=0.3)
    early, late = quarters(seconds(rows), "seconds")
    row.seen = (
        f"{seen}; {len(kept)} checkpoints, {rows[-1]['bytes'] / 2**20:.1f} MB on disk; history {whole / 1000:.0f} kB, "
        f"written in {rows[-1]['writing'] / late:.0%} of an epoch of {1000 * late:.0f} ms; an epoch at the end takes "
        f"{late / early:.2f} times one of the second quarter"
    )
    if many(False, True):
        assert late < 2 * early


def test_python_objects_of_many_epochs(phantom_data, tmp_path, fault, many):
    epochs = many(0, 80)
    if not epochs:
        pytest.skip("counting every object takes long: make faults")
    row = fault(f"{epochs} epochs, every Python object counted", "what stays of an epoch is its row of the history")
    stage_dir = next(iter(phantom_data.staged.values())).folder.parents[1]
    rows = measured(
        TRAINING, data=str(phantom_data.folder), stage=str(stage_dir), folder=str(tmp_path), epochs=epochs, traced=True
    )
    row.times = len(rows)
    early, late = quarters(rows, "python")
    grown = (late - early) / (epochs / 2)
    assert grown < 40_000  # a row names the Dice of each structure
    row.seen = f"{grown / 1000:.1f} kB an epoch"


def test_many_subjects(tmp_path, fault, many):
    number = many(40, 100)
    row = fault(
        f"{number} subjects predicted and scored in one process",
        "memory and open files flat, no temporary files, less than twice the time at the end",
    )
    random = np.random.default_rng(0)
    for subject in range(number):
        masks = {name: random.random((20, 18, 12)) < 0.2 for name in ("liver", "spleen", "stomach")}
        write_subject(tmp_path / "data" / f"s{subject:03}", masks)
    rows = measured(
        SUBJECTS, data=str(tmp_path / "data"), stage=str(tmp_path / "stage"), folder=str(tmp_path / "predictions")
    )
    row.times = len(rows)
    assert row.times == number
    seen = flat(rows, 12)
    early, late = quarters(seconds(rows), "seconds")
    row.seen = f"{seen}; a subject at the end takes {late / early:.2f} times one of the second quarter"
    if many(False, True):
        assert late < 2 * early


def test_figures_are_closed(phantom_data, tmp_path):
    import matplotlib.pyplot as plt

    from segkit.progress import Progress

    before = plt.get_fignums()
    train(phantom_data, replace(SMALL, epochs=3), tmp_path, Progress(phantom_data, tmp_path, "cpu"), progress=False)
    assert plt.get_fignums() == before


@pytest.mark.parametrize("keep", [1, 2, 5, None])
def test_the_newest_checkpoints_and_the_best_one_are_kept(phantom_data, tmp_path, monkeypatch, keep):
    """With validation scores that were chosen here: epoch 2 is the best, then 5, then nothing better."""
    from segkit import trainer

    scores = iter([0.1, 0.5, 0.2, 0.3, 0.6, 0.1, 0.2])
    original = trainer.as_row
    monkeypatch.setattr(trainer, "as_row", lambda *args: {**original(*args), "val_dice": next(scores)})
    there = []
    settings = replace(SMALL, epochs=7, keep_checkpoints=keep)
    train(
        phantom_data, settings, tmp_path, progress=False,
        on_epoch=lambda _: there.append({int(path.stem[16:]) for path in tmp_path.glob("checkpoint*")}),
    )  # fmt: skip
    best = [1, 2, 2, 2, 5, 5, 5]
    for epoch, found in enumerate(there, 1):
        newest = range(max(1, epoch + 1 - (keep or 7)), epoch + 1)
        assert found == {*newest, best[epoch - 1]}
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoint_epoch5.pth"


def test_pruning_is_asked_for_in_whole_numbers_and_may_change_on_resuming(phantom_data, tmp_path, stopped_after):
    with pytest.raises(SegkitError, match="KEEP_CHECKPOINTS = 0: expected a whole number"):
        replace(SMALL, keep_checkpoints=0).checked()
    with stopped_after(6):
        train(phantom_data, replace(SMALL, epochs=4, slices_per_epoch=8), tmp_path, progress=False)
    again = replace(SMALL, epochs=4, slices_per_epoch=8, keep_checkpoints=1)
    history = train(phantom_data, again, tmp_path, progress=False, resume=True)
    assert len(history) == 4 and test_resume.weights_of(tmp_path, 4)
    assert len(list(tmp_path.glob("checkpoint*"))) <= 2
