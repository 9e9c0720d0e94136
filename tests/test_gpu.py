"""On a GPU, where nothing but the device itself can tell: the same results as on a CPU, and memory that runs out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from segkit import losses, steps
from segkit.checkpoints import load_checkpoint, load_checkpoints
from segkit.inference import Predictor
from segkit.settings import TrainSettings
from segkit.slices import Targets
from segkit.training import train
from segkit.training_state import load_state
from segkit.unet import UNet2D

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")

SETTINGS = TrainSettings(
    epochs=2, batch_size=4, target_shape=(64, 64), features=(8, 16), patch_slices=4, slices_per_epoch=20,
    validation_slices=8, device="cuda",
)  # fmt: skip


@pytest.fixture
def exact(monkeypatch):
    """Computes in float32 on every device, not in what the device is fast at."""
    monkeypatch.setattr(steps, "precision", lambda model, device: torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_the_first_steps_are_those_of_the_cpu(phantom_data, tmp_path, exact):
    """Batches, augmentation, loss, gradients and validation: all of it is in the history."""
    # but noise, which each device draws itself
    settings = replace(SETTINGS, epochs=1, augmentation=replace(SETTINGS.augmentation, noise_hu=0))
    rows = [
        train(phantom_data, replace(settings, device=device), tmp_path / device, progress=False)[0]
        for device in ("cpu", "cuda")
    ]
    for name in ("train_loss", "val_loss"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-3)
    assert rows[0]["val_structures"] == rows[1]["val_structures"] > 0


@pytest.mark.parametrize("model", ["unet", "attention_unet", "unet3d"])
def test_a_training_goes_on_where_it_stopped_and_its_checkpoint_loads_anywhere(
    phantom_data, tmp_path, stopped_after, model
):
    settings = replace(SETTINGS, model=model)
    whole = train(phantom_data, settings, tmp_path / "whole", progress=False)
    with stopped_after(7):
        train(phantom_data, settings, tmp_path / "parts", progress=False)
    parts = train(phantom_data, settings, tmp_path / "parts", progress=False, resume=True)
    assert [row["steps"] for row in parts] == [row["steps"] for row in whole] == [5, 5]
    # sums of a GPU are in no fixed order, and the last bits differ from run to run
    for name in ("train_loss", "val_loss"):
        assert parts[-1][name] == pytest.approx(whole[-1][name], rel=0.02)
    weights = load_checkpoint(tmp_path / "parts" / "checkpoint_epoch2.pth").model.state_dict()
    assert all(value.device.type == "cpu" for value in weights.values())


def test_the_same_voxels_as_on_the_cpu(phantom_data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    train(phantom_data, replace(SETTINGS, epochs=1, slices_per_epoch=200), tmp_path, progress=False)
    checkpoints = load_checkpoints(tmp_path)
    [subject, *_] = phantom_data.staged.values()
    on_cpu, on_gpu = (
        Predictor.of(checkpoints, device=device).predict(subject) for device in ("cpu", "cuda")
    )  # fmt: skip
    held = [sum(volume.voxels().values()) for volume in (on_cpu, on_gpu)]
    assert held[0] > 1000 and held[1] == pytest.approx(held[0], rel=0.02)
    # in bfloat16 and in what the CPU is fast at; only pixels near a threshold may fall to its other side
    alike = np.mean([np.array_equal(a, b) for a, b in zip(_sets(on_cpu), _sets(on_gpu), strict=True)])
    assert alike > 0.98


def _sets(volume):
    """Which structures each voxel of the middle slice is in."""
    return volume.codebook[volume.codes[len(volume.codes) // 2].ravel()]


def test_memory_that_really_runs_out_is_said_and_nothing_is_lost(phantom_data, tmp_path, capsys):
    settings = replace(SETTINGS, batch_size=32, slices_per_epoch=32, target_shape=(512, 512), epochs=1)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    try:
        [row] = train(phantom_data, settings, tmp_path, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    said = capsys.readouterr().out
    assert "BATCH_SIZE = 32: more than the memory holds" in said and "the Dice term sees one part" in said
    assert row["steps"] == 1 and np.isfinite([row["train_loss"], row["val_loss"]]).all()
    assert load_state(tmp_path / "last_state.pth").learner["parts"] > 1


def test_planes_of_all_structures_never_exist():
    slices, side = 64, 256
    model = losses.ModelWithLoss(UNet2D(1, 117, (8, 16)), torch.ones(117)).to("cuda", memory_format=torch.channels_last)
    codebook = torch.eye(117, dtype=torch.bool, device="cuda")[None].expand(slices, -1, -1)
    codes = torch.randint(0, 117, (slices, side, side), device="cuda")
    targets = Targets(codes, codebook, torch.ones(slices, 117, dtype=torch.bool, device="cuda"))
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        model(torch.randn(slices, 1, side, side, device="cuda"), targets).backward()
    plane = slices * 117 * side**2 * 4  # of which dense needs four: logits, targets, loss and gradient
    assert torch.cuda.max_memory_allocated() < 2 * plane
