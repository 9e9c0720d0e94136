"""Batches that do not fit: computed in parts, said aloud, and learned from as a whole."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segkit import losses, memory, training
from segkit.checkpoints import load_checkpoint, load_checkpoints
from segkit.errors import SegkitError
from segkit.inference import Predictor
from segkit.settings import TrainSettings
from segkit.training_state import load_state
from segkit.unet import UNet2D

SETTINGS = TrainSettings(
    epochs=1, batch_size=8, target_shape=(32, 32), features=(4, 8), slices_per_epoch=20, validation_slices=4,
    device="cpu",
)  # fmt: skip


def test_the_message_says_what_is_not_the_same():
    assert "the result is the same." in memory.message(8, 8, 2, "why", [])
    both = memory.message(8, 8, 4, "why", ["batch normalisation", "the Dice term"])
    assert "but batch normalisation and the Dice term see one part at a time" in both
    assert "BATCH_SIZE = 8: why; each batch is computed in 4 parts of at most 2 slices" in both


@given(st.integers(1, 100), st.integers(1, 10**9), st.integers(0, 10**10), st.integers(1, 4))
def test_parts_are_the_fewest_doublings_that_fit(slices, slice_bytes, free, parts):
    found = memory.parts_that_fit(slices, slice_bytes, free, parts)

    def fits(number):
        return -(-slices // number) * slice_bytes <= memory.USABLE * free

    assert found >= parts and (fits(found) or found >= slices)
    if found > parts:
        fewer = max(number for number in (parts * 2**k for k in range(8)) if number < found)
        assert not fits(fewer)


def test_a_container_has_less_than_its_machine(tmp_path):
    machine = memory.free_bytes(tmp_path)  # no control groups there
    assert machine > 0
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 500\nactive_file 10\ninactive_file 400\n")
    assert memory.free_bytes(tmp_path) == 2000410  # files that were read take memory only as long as nobody needs it
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(tmp_path) == pytest.approx(machine, rel=0.2)


def test_a_device_that_runs_out_of_memory_gets_half_as_much_until_it_fits():
    tried = []

    def attempt(parts):
        tried.append(parts)
        if 12 / parts > 2:
            raise torch.OutOfMemoryError("out of memory\nmany lines")

    assert memory.halve_until_it_fits(attempt, 12, 1) == 8 and tried == [1, 2, 4, 8]
    with pytest.raises(SegkitError, match=r"a single slice does not fit .*out of memory.*lower TARGET_SHAPE"):
        memory.halve_until_it_fits(lambda parts: attempt(0.1), 12, 1)


def weights(folder):
    model = load_checkpoint(folder / "checkpoint_epoch1.pth").model
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_little_memory_on_a_cpu_is_seen_beforehand(phantom_data, tmp_path, monkeypatch, capsys):
    """The same training as with ACCUMULATE = 4, bit for bit, and it says so."""
    training.train(phantom_data, replace(SETTINGS, accumulate=4), tmp_path / "asked", progress=False)
    assert capsys.readouterr().out == ""
    slice_bytes = []

    def counted(slices, bytes_a_slice, free, parts=1):
        slice_bytes.append(bytes_a_slice)
        return original(slices, bytes_a_slice, 2.5 * bytes_a_slice / memory.USABLE, parts)

    original = memory.parts_that_fit
    with monkeypatch.context() as patched:
        patched.setattr(memory, "parts_that_fit", counted)
        training.train(phantom_data, SETTINGS, tmp_path / "needed", progress=False)
    said = capsys.readouterr().out
    assert "BATCH_SIZE = 8" in said and "4 parts of at most 2 slices" in said and "the Dice term sees one part" in said
    assert torch.equal(weights(tmp_path / "needed"), weights(tmp_path / "asked"))
    # 32 x 32 pixels in eight maps of 4 float32 channels are 131 kB; the two levels below and the head add to that
    assert len(slice_bytes) == 1 and 2e5 < slice_bytes[0] < 5e6
    # once in parts, a training that is resumed stays so: the same steps whatever else the machine does then
    state = load_state(tmp_path / "needed" / "last_state.pth")
    assert state.learner["parts"] == 4


@pytest.mark.parametrize("at", [1, 2])
def test_memory_that_runs_out_in_a_step_loses_no_slice(phantom_data, tmp_path, monkeypatch, capsys, at):
    """After `at` forward passes, of which the first one looks at the memory, only two slices fit."""
    original, learned = losses.head_loss, []

    def small_device(features, *args, **kwargs):
        if torch.is_grad_enabled():
            if len(learned) >= at and len(features) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            learned.append(len(features))
        return original(features, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(losses, "head_loss", small_device)
        [row] = training.train(phantom_data, SETTINGS, tmp_path, progress=False)
    assert row["steps"] == 3 and sum(learned) == 1 + 20
    assert "the memory ran out; each batch is computed in 4 parts" in capsys.readouterr().out
    if at == 1:  # from the first step on: the same weights as when it had been asked for
        training.train(phantom_data, replace(SETTINGS, accumulate=4), tmp_path / "asked", progress=False)
        assert torch.equal(weights(tmp_path), weights(tmp_path / "asked"))


PEAK = """
import torch
from test_memory import a_step
from segkit import memory
def resident(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
step, forward = a_step(1)
step()
estimate = memory.step_bytes(forward)
step, _ = a_step(16)
before = resident("VmRSS")
step(); step()
print(16 * estimate / (resident("VmHWM") - before))
"""


def a_step(slices: int):
    """A step in float32 and its forward pass alone."""
    from segkit.slices import Targets
    from segkit.unet import UNet2D

    model = losses.ModelWithLoss(UNet2D(1, 117, (8, 16, 32)), torch.ones(117)).to(memory_format=torch.channels_last)
    images = torch.randn(slices, 1, 128, 128).contiguous(memory_format=torch.channels_last)
    codebook = torch.eye(117, dtype=torch.bool)[None].expand(slices, -1, -1)
    targets = Targets(torch.randint(0, 117, (slices, 128, 128)), codebook, torch.ones(slices, 117, dtype=torch.bool))

    def forward():
        return model(images, targets)

    return lambda: forward().backward(), forward


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_estimate_is_near_what_a_process_really_takes():
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(__file__).rsplit('/', 1)[0]!r})\n{PEAK}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0.7 < float(done.stdout) < 2


def test_float16_scales_its_gradients(phantom_data, tmp_path, monkeypatch):
    """Older GPUs: without a scale the gradients of float16 vanish; its state goes on with a resumed training."""
    from segkit import steps

    monkeypatch.setattr(steps, "precision", lambda model, device: torch.float16)
    training.train(phantom_data, SETTINGS, tmp_path, progress=False)
    state = load_state(tmp_path / "last_state.pth")
    assert state.learner["scaler"]["scale"] >= 1 and state.learner["scaler"]["_growth_tracker"] >= 1
    history = training.train(phantom_data, replace(SETTINGS, epochs=2), tmp_path, progress=False, resume=True)
    assert [row["steps"] for row in history] == [3, 3]


@pytest.mark.parametrize(
    "text",
    [
        "MPS backend out of memory (MPS allocated: 9 GB)",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_memory_that_runs_out_has_many_words(text):
    def attempt(parts):
        if parts < 3:
            raise RuntimeError(text)

    assert memory.halve_until_it_fits(attempt, 8, 1) == 4
    # SegkitError is no RuntimeError; what cudnn says of engines may have another reason
    engine = "engine" in text
    with pytest.raises(
        *((RuntimeError,) if engine else (SegkitError,)), match=text[:8] if engine else "a single slice"
    ):
        memory.halve_until_it_fits(attempt, 2, 1)


def test_an_error_of_another_kind_is_not_tried_again():
    tried = []

    def attempt(parts):
        tried.append(parts)
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        memory.halve_until_it_fits(attempt, 8, 1)
    assert tried == [1]


def test_validation_and_prediction_go_on_with_parts_of_a_batch(phantom_data, tmp_path, monkeypatch):
    """Where dense logits of three slices are too many: the same scores and codes as with room for all.

    And the same loss, but for a Dice term: that is of a part.
    """
    trained, settings = tmp_path / "run", replace(SETTINGS, loss="bce", validation_slices=20)
    [row] = training.train(phantom_data, settings, trained, progress=False)
    predictor = Predictor.of(load_checkpoints(trained), device="cpu")
    subject = next(iter(phantom_data.staged.values()))
    whole = predictor.predict(subject).codes
    tried, original = [], UNet2D.decode

    def small_device(self, images):
        if not torch.is_grad_enabled():
            tried.append(len(images))
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, images)

    monkeypatch.setattr(UNet2D, "decode", small_device)
    assert np.array_equal(predictor.predict(subject).codes, whole)
    assert tried[:4] == [8, 4, 2, 2] and max(tried[3:]) == 2  # tried once, not for every batch
    tried.clear()
    [again] = training.train(phantom_data, settings, tmp_path / "small", progress=False)
    assert tried and max(tried[3:]) <= 2
    for name in ("val_dice", "val_threshold", "val_dice_of"):
        assert again[name] == row[name]
    assert again["val_loss"] == pytest.approx(row["val_loss"], rel=1e-5)
