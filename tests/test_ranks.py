"""Several processes train as one: launched as a user launches them, on two CPU processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segkit import memory
from segkit.checkpoints import load_checkpoint
from segkit.choices import LOSSES
from segkit.dataset import open_data
from segkit.errors import SegkitError
from segkit.interrupts import Interrupts
from segkit.losses import ModelWithLoss, positive_weights, structure_frequencies
from segkit.ranks import Ranks, join_ranks
from segkit.runs import left_behind
from segkit.settings import TrainSettings
from segkit.slices import SliceDataset, batches
from segkit.steps import Learner, train_voxels
from segkit.trainer import Trainer
from segkit.validation import validate

CPU = torch.device("cpu")
SETTINGS = TrainSettings(
    epochs=2, batch_size=4, target_shape=(32, 32), features=(4, 8), slices_per_epoch=13, validation_slices=11,
    device="cpu", learning_rate=5e-3,
)  # fmt: skip
FLAGS = [
    "--epochs", "2", "--batch-size", "4", "--target-shape", "32", "32", "--features", "4", "8",
    "--slices-per-epoch", "13", "--validation-slices", "11", "--device", "cpu", "--learning-rate", "5e-3",
]  # fmt: skip


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_the_shares_of_all_ranks_are_the_batches(slices, batch_size, world, skipped):
    plan = [range(at, min(at + batch_size, slices)) for at in range(skipped * batch_size, slices, batch_size)]
    ranks = [Ranks(CPU, rank, world) for rank in range(world)]
    each = [rank.share_each(plan) for rank in ranks]
    for place, batch in enumerate(plan):
        counted = [n for rank, share in zip(ranks, each, strict=True) for n in share[place]
                   if rank.mine(share[place], batch_size)]  # fmt: skip
        assert sorted(counted) == list(batch)
        assert all(share[place] for share in each)  # none is left without a slice: all must take part in a step
    whole = [batch for rank in ranks for batch in rank.share_whole(plan)]
    assert sorted(n for batch in whole for n in batch) == [n for batch in plan for n in batch]


def launch(*arguments, processes=2, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", str(free_port())]  # fmt: skip
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}  # a process that dies says where it was
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment, **kwargs
    )  # fmt: skip


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def two_processes(phantom_data, tmp_path_factory) -> tuple[Path, Path]:
    folder, stage_dir = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("staged by two")
    running = launch(
        "-m", "segkit", "train", phantom_data.folder, "--output-dir", folder, "--stage-dir", stage_dir, *FLAGS
    )
    output, _ = running.communicate(timeout=300)
    assert running.returncode == 0, output
    assert output.count("epoch 1/2: loss") == 1 and output.count("validation loss") == 2  # one process speaks
    return folder, stage_dir


def test_one_process_writes_all_files(two_processes):
    folder, stage_dir = two_processes
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", ".predictions.lock", "checkpoint_epoch1.pth", "checkpoint_epoch2.pth", "label_map.json",
        "last_state.pth", "sample_predictions.png", "settings.json", "split.json", "training_history.json",
        "training_history.png",
    ]  # fmt: skip
    assert len(list(stage_dir.glob("*/*/subject.json"))) == 5 and not list(left_behind(folder))
    history = json.loads((folder / "training_history.json").read_text())
    assert history["record"]["processes"] == 2
    assert [row["steps"] for row in history["epochs"]] == [4, 4]  # of 13 slices in batches of 4 over both


def test_validation_is_that_of_one_process_on_the_same_weights(two_processes, phantom_data):
    folder, _ = two_processes
    rows = json.loads((folder / "training_history.json").read_text())["epochs"]
    data = SliceDataset(phantom_data.staged, phantom_data.split.val, phantom_data.label_map)
    frequencies = structure_frequencies(train_voxels(phantom_data), phantom_data.label_map)
    weights = positive_weights(frequencies, SETTINGS.positive_weight_cap).float()
    for row in rows:
        loaded = load_checkpoint(folder / f"checkpoint_epoch{row['epoch']}.pth")
        model = ModelWithLoss(loaded.model, weights, LOSSES[SETTINGS.loss]).to(memory_format=torch.channels_last)
        alone = validate(model, data, (32, 32), Learner(phantom_data, SETTINGS, Ranks(CPU)).dtype, 4, 11, 0, False)
        assert row["val_loss"] == pytest.approx(alone.loss, rel=1e-4)
        assert row["val_dice"] == pytest.approx(alone.dice, abs=1e-4)
        assert row["val_structures"] == alone.structures and row["val_threshold"] == alone.threshold
        assert loaded.thresholds == pytest.approx(alone.thresholds)


STEPPING = """
import sys, pickle, torch
sys.path.insert(0, {tests!r})
from test_ranks import SETTINGS, steps_of
from segkit.dataset import open_data
from segkit.ranks import join_ranks, leave_ranks
ranks = join_ranks("cpu")
data = open_data({data!r}, {stage!r}, progress=False)
result = steps_of(data, ranks, {loss!r}, {accumulate})
if ranks.first:
    torch.save(result, {out!r})
leave_ranks(ranks)
"""


def steps_of(data, ranks: Ranks, loss: str, accumulate: int) -> dict:
    """Losses and gradients of the steps of 13 slices, and the weights after them."""
    settings = replace(SETTINGS, loss=loss, accumulate=accumulate, balance=0.0).checked()
    learner = Learner(data, settings, ranks)
    learner.dtype = torch.float32  # the order of sums differs; bfloat16 would show that
    slices = SliceDataset(data.staged, data.split.train, data.label_map)
    losses, gradients = [], []
    for batch in batches(slices, range(0, 13 * 5, 5), 4, share=ranks.share_each):
        if not learner.prepared:
            learner.prepare(batch)
        losses.append(learner.step(batch, 1, 1e-3))
        gradients.append(torch.cat([p.grad.flatten() for p in learner.network.parameters()]))
    weights = torch.cat([p.detach().flatten() for p in learner.network.parameters()])
    return {"losses": losses, "gradients": gradients, "weights": weights}


@pytest.mark.parametrize(("loss", "accumulate"), [("bce_dice", 1), ("bce", 1), ("bce", 2)])
def test_two_processes_learn_what_one_learns(phantom_data, tmp_path, loss, accumulate):
    """The Dice of a structure is over both shares of a batch: half of it would have another gradient. The last batch
    has one slice: the second process has nothing to add to it, and adds nothing."""
    stage_dir = next(iter(phantom_data.staged.values())).folder.parents[1]
    script, out = tmp_path / "stepping.py", tmp_path / "result.pt"
    script.write_text(STEPPING.format(
        tests=str(Path(__file__).parent), data=str(phantom_data.folder), stage=str(stage_dir), out=str(out),
        loss=loss, accumulate=accumulate,
    ))  # fmt: skip
    running = launch(script, cwd=Path(__file__).parents[1])
    output, _ = running.communicate(timeout=300)
    assert running.returncode == 0, output
    together = torch.load(out)
    alone = steps_of(open_data(phantom_data.folder, stage_dir, progress=False), Ranks(CPU), loss, 1)
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    first, expected = together["gradients"][0], alone["gradients"][0]  # the same weights still: the same gradient
    assert torch.allclose(first, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
    # Adam divides by the size of the gradient: where that is next to nothing its sign decides, so few may differ
    close = torch.isclose(together["weights"], alone["weights"], rtol=1e-3, atol=1e-5)
    assert close.float().mean() > 0.99


def test_several_ranks_save_before_they_validate(phantom_data, tmp_path, monkeypatch):
    """Who launched them kills them half a minute after Ctrl-C; a validation may take longer."""
    saved, order = [], []
    alone, several = Ranks(CPU), Ranks(CPU, 0, 2)
    monkeypatch.setattr("segkit.trainer.validate", lambda *_, **__: order.append("validated") or 1 / 0)
    for ranks in (alone, several):
        trainer = Trainer(phantom_data, SETTINGS.checked(), alone, tmp_path)
        monkeypatch.setattr(trainer, "_learn", lambda *_: None)
        monkeypatch.setattr(ranks.__class__, "align", lambda *_: None)
        trainer.ranks = ranks
        with pytest.raises(ZeroDivisionError):
            trainer.epoch(lambda: saved.append(order.count("validated")), Interrupts(), False)
    assert saved == [1]  # only of several, and before the second validation


def test_memory_that_runs_out_among_several_says_how_to_go_on():
    with pytest.raises(SegkitError, match="ACCUMULATE = 4 and RESUME = True"), memory.no_second_try(2):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="another"), memory.no_second_try(2):
        raise RuntimeError("another error")


def test_of_several_processes_none_touches_the_first_gpu_before_it_has_its_own(monkeypatch):
    import accelerate

    state = SimpleNamespace(device=torch.device("cuda:1"), process_index=1, num_processes=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: pytest.fail("computed on the first GPU"))
    monkeypatch.setattr(accelerate, "PartialState", lambda **_: state)
    assert join_ranks() == Ranks(torch.device("cuda:1"), 1, 2)


def test_an_interrupt_ends_both_in_order(phantom_data, two_processes, tmp_path):
    _, stage_dir = two_processes
    long = [flag if flag != "13" else "100000" for flag in FLAGS]
    running = launch(
        "-m", "segkit", "train", phantom_data.folder, "--output-dir", tmp_path / "run", "--stage-dir", stage_dir, *long,
        start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "run" / "settings.json").exists() and running.poll() is None:
        time.sleep(0.1)
    time.sleep(3)
    os.killpg(running.pid, signal.SIGINT)  # Ctrl-C reaches the launcher and both processes
    output, _ = running.communicate(timeout=120)
    assert "interrupted in epoch 1 after" in output, output
    assert load_checkpoint(tmp_path / "run" / "checkpoint_epoch1.pth").epoch == 1
