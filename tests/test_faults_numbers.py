"""Faults: numbers that are none, or far out.

A training stops and says where, what was saved stays, and a scan is never silently empty.
"""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import write_subject
from test_ranks import SETTINGS as OF_RANKS
from test_ranks import launch
from test_resume import SETTINGS, same, weights_of

from segkit import augment, inference, losses, steps, trainer, training
from segkit.checkpoints import load_checkpoint, save_checkpoint
from segkit.codes import encode
from segkit.dataset import open_data
from segkit.errors import Findings, SegkitError
from segkit.evaluation import score_subject
from segkit.inference import Predictor
from segkit.networks import build_network
from segkit.ranks import Ranks
from segkit.reading import read_ct
from segkit.settings import NO_AUGMENTATION, Augmentation, TrainSettings
from segkit.slices import SliceDataset, batches, collate
from segkit.splits import Part
from segkit.subjects import find_subjects
from segkit.training import train
from segkit.training_state import load_state, save_state

STEPS = 4
"""Of an epoch of SETTINGS."""


@pytest.fixture(scope="module")
def uninterrupted(phantom_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(phantom_data, SETTINGS, folder, progress=False)
    return folder


@pytest.fixture
def slices_read(monkeypatch) -> list[tuple[str, int]]:
    """(subject, slice) of each item that is read, in this order."""
    read, original = [], SliceDataset.__getitem__

    def reading(self, index):
        read.append(self.where[index])
        return original(self, index)

    monkeypatch.setattr(SliceDataset, "__getitem__", reading)
    return read


def named_in(message: str) -> set[tuple[str, int]]:
    """What a message says of subjects and their slices: "at the slices s1: 2, 3; s2: 4; what was saved ..."."""
    found = re.search(r"at the slices ((?:\S+: \d+(?:, \d+)*(?:; )?)+)", message)
    pairs = [part.split(": ") for part in found[1].removesuffix("; ").split("; ")]
    return {(subject, int(z)) for subject, zs in pairs for z in zs.split(", ")}


class Spoiled:
    """Spoils step number `at` (from 1) in one of several ways, as `with Spoiled(monkeypatch, way, at):`."""

    def __init__(self, monkeypatch, way: str, at: int):
        self.patch, self.way, self.at, self.steps, self.out_of_memory = monkeypatch, way, at, 0, False

    def __enter__(self):
        self.context = self.patch.context()
        patched = self.context.__enter__()
        step, head_loss = steps.Learner.step, losses.head_loss

        def stepping(learner, *args):
            self.steps += 1
            self.parts = 0
            if self.steps == self.at and self.way == "NaN weight":
                learner.network.down[0][0].weight.data[0, 0, 0, 0] = torch.nan
            return step(learner, *args)

        def spoiling(*args, **kwargs):
            loss = head_loss(*args, **kwargs)
            if self.steps != self.at or not torch.is_grad_enabled():
                return loss
            self.parts += 1
            if self.way == "out of memory, then NaN in the second part":
                if self.parts == 1:
                    raise torch.OutOfMemoryError("out of memory")
                return loss * (torch.nan if self.parts == 3 else 1)
            if self.way == "NaN in the second of two parts":
                return loss * (torch.nan if self.parts == 2 else 1)
            if self.way == "infinite gradient":
                loss.register_hook(lambda gradient: gradient * torch.inf)
                return loss
            return loss * (torch.inf if self.way == "infinite loss" else torch.nan if self.way == "NaN loss" else 1)

        patched.setattr(steps.Learner, "step", stepping)
        patched.setattr(losses, "head_loss", spoiling)

    def __exit__(self, *error):
        return self.context.__exit__(*error)


WAYS = (
    "NaN weight", "NaN loss", "infinite loss", "infinite gradient", "NaN in the second of two parts",
    "out of memory, then NaN in the second part",
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_no_number(phantom_data, uninterrupted, tmp_path, monkeypatch, slices_read, fault, many, way):
    row = fault(
        f"training: {way} at a step",
        "stops and names the batch's subjects and slices; checkpoints and state stay as they were; resumed without the "
        "fault, the weights of a training that never had it",
    )
    settings = replace(SETTINGS, accumulate=2 if way == "NaN in the second of two parts" else 1)
    monkeypatch.setattr(trainer, "STATE_SECONDS", 0)  # the state is saved after every step
    if settings.accumulate == 2:
        train(phantom_data, settings, tmp_path / "whole", progress=False)
        uninterrupted = tmp_path / "whole"
    for at in many([6], range(1, 3 * STEPS + 1)):
        folder, epochs = tmp_path / str(at), (at - 1) // STEPS
        with Spoiled(monkeypatch, way, at), pytest.raises(SegkitError, match=f"epoch {epochs + 1}: ") as stop:
            train(phantom_data, settings, folder, progress=False)
        size = 4 if at % STEPS else 2  # 14 slices an epoch: the last batch has two
        assert named_in(str(stop.value)) == set(slices_read[-size:])
        assert sorted(path.name for path in folder.glob("checkpoint*")) == [
            f"checkpoint_epoch{n + 1}.pth" for n in range(epochs)
        ]
        for epoch in range(1, epochs + 1):
            assert same(weights_of(folder, epoch), weights_of(uninterrupted, epoch))
        if at > 1:
            state = load_state(folder / training.STATE_FILE)
            assert (len(state.history), len(state.seen)) == (epochs, (at - 1) % STEPS)
        if way != "out of memory, then NaN in the second part":  # parts change how sums are rounded
            train(phantom_data, settings, folder, progress=False, resume=True)
            assert same(weights_of(folder), weights_of(uninterrupted))
        row.times += 1


def test_an_infinite_learning_rate_and_one_that_overflows(phantom_data, tmp_path, fault):
    row = fault(
        "training: LEARNING_RATE infinite, NaN, or so high that the weights overflow",
        "refused, or stopped before a checkpoint is written",
    )
    for rate in (np.inf, np.nan, 1e31):
        with pytest.raises(SegkitError, match=r"LEARNING_RATE = .*: expected a number"):
            train(phantom_data, replace(SETTINGS, learning_rate=rate), tmp_path, progress=False)
        row.times += 1
    for rate in (1e20, 1e25, 1e30):
        with pytest.raises(SegkitError, match=r"epoch 1: the .* is (nan|inf) at the slices"):
            train(phantom_data, replace(SETTINGS, learning_rate=rate, warmup_steps=0), tmp_path, progress=False)
        assert not list(tmp_path.glob("checkpoint*"))
        row.times += 1


def test_a_validation_loss_that_is_no_number(
    phantom_data, uninterrupted, tmp_path, monkeypatch, slices_read, fault, many
):
    row = fault(
        "validation: a loss of NaN or infinity at a batch",
        "stops and names the batch's subjects and slices; checkpoints and state of the epochs before stay",
    )
    original = losses.head_loss
    for bad, epoch, batch in many([(torch.nan, 2, 1)], [(b, e, n) for b in (torch.nan, torch.inf) for e in (1, 2, 3)
                                                        for n in (1, 2)]):  # fmt: skip
        folder, seen, expected = tmp_path / f"{bad}{epoch}{batch}", [], []

        def spoiled(*args, at=(epoch - 1) * 2 + batch, value=bad, seen=seen, expected=expected, **kwargs):
            loss = original(*args, **kwargs)
            if torch.is_grad_enabled() or len(args[2].codes) == 1:  # a single slice: how much memory a step takes
                return loss
            seen.append(1)
            if len(seen) != at:
                return loss
            expected += slices_read[-len(args[2].codes) :]
            return loss * value

        with monkeypatch.context() as patched:
            patched.setattr(losses, "head_loss", spoiled)
            with pytest.raises(SegkitError, match=f"epoch {epoch}: the validation loss is ") as stop:
                train(phantom_data, SETTINGS, folder, progress=False)
        assert named_in(str(stop.value)) == set(expected) and expected
        assert len(list(folder.glob("checkpoint*"))) == epoch - 1
        for before in range(1, epoch):
            assert same(weights_of(folder, before), weights_of(uninterrupted, before))
        train(phantom_data, SETTINGS, folder, progress=False, resume=True)
        assert same(weights_of(folder), weights_of(uninterrupted))
        row.times += 1


SPOILED_RANK = """
import sys
sys.path.insert(0, {tests!r})
from test_ranks import SETTINGS
from segkit import losses
from segkit.dataset import open_data
from segkit.errors import SegkitError
from segkit.ranks import join_ranks
from segkit.training import train
ranks, original = join_ranks("cpu"), losses.head_loss
calls = []
def spoiled(*args, **kwargs):
    loss = original(*args, **kwargs)
    calls.append(1)
    return loss * float("nan") if len(calls) == 4 and ranks.rank == 1 else loss
losses.head_loss = spoiled
data = open_data({data!r}, {stage!r}, progress=False)
try:
    train(data, SETTINGS, {out!r}, progress=False, ranks=ranks)
except SegkitError as error:
    open({out!r} + "/stopped_" + str(ranks.rank), "w").write(str(error))
"""


def test_of_two_ranks_both_stop(phantom_data, tmp_path, fault, many):
    if not many(0, 1):
        pytest.skip("launches two processes: make faults")
    row = fault("training on two ranks: NaN on one of them", "both stop, and name all slices of the batch")
    stage_dir = next(iter(phantom_data.staged.values())).folder.parents[1]
    script = tmp_path / "spoiled.py"
    script.write_text(SPOILED_RANK.format(
        tests=str(Path(__file__).parent), data=str(phantom_data.folder), stage=str(stage_dir), out=str(tmp_path),
    ))  # fmt: skip
    running = launch(script, cwd=Path(__file__).parents[1])
    try:
        output, _ = running.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        running.kill()
        raise
    assert running.returncode == 0, output
    first, second = ((tmp_path / f"stopped_{rank}").read_text() for rank in range(2))
    slices, s = SliceDataset(phantom_data.staged, phantom_data.split.train, phantom_data.label_map), OF_RANKS
    order = slices.order(s.seed, 1, s.slices_per_epoch, s.balance)
    third = order[2 * s.batch_size : 3 * s.batch_size]  # the memory of a step was tried with the first call
    assert first == second and named_in(first) == {slices.where[item] for item in third}
    row.times += 1


def test_weights_that_are_not_finite_are_neither_written_nor_read(phantom_data, uninterrupted, tmp_path, fault, many):
    row = fault(
        "NaN or infinity in one weight, in each tensor of a network: saved as checkpoint, state and shared model; read "
        "from a checkpoint and a state",
        "not written, the file of before stays; refused with the file named",
    )
    path, state_path = tmp_path / "checkpoint_epoch3.pth", tmp_path / "last_state.pth"
    good, state = load_checkpoint(uninterrupted / path.name), load_state(uninterrupted / state_path.name)
    parts = (good.network, good.label_map, good.settings, 3, good.scores, good.record)
    shared = tmp_path / "model.safetensors"
    for target in (path, shared):
        save_checkpoint(target, good.model, *parts)
    save_state(state_path, state)
    before = [each.read_bytes() for each in (path, shared, state_path)]
    names = list(good.model.state_dict())
    for name, bad in [(name, bad) for name in many(names[::12], names) for bad in (np.nan, np.inf, -np.inf)]:
        spoiled = {key: tensor.clone() for key, tensor in good.model.state_dict().items()}
        spoiled[name].view(-1)[-1] = bad
        model = build_network(**good.network)
        model.load_state_dict(spoiled)
        for target in (path, shared):
            with pytest.raises(SegkitError, match=re.escape(f"{target}: not written: 1 of {len(spoiled)}")):
                save_checkpoint(target, model, *parts)
        wrong_state = replace(state, learner={**state.learner, "model": spoiled})
        with pytest.raises(SegkitError, match=re.escape(f"{state_path}: not written")):
            save_state(state_path, wrong_state)
        assert [each.read_bytes() for each in (path, shared, state_path)] == before
        for original, load in ((path, load_checkpoint), (state_path, load_state)):
            content = torch.load(original, weights_only=True)
            place = content if load is load_checkpoint else content["learner"]
            place["weights" if load is load_checkpoint else "model"] = spoiled
            torch.save(content, tmp_path / f"bad_{original.name}")
            with pytest.raises(SegkitError, match=rf"bad_{original.name}: damaged .*weights that are not finite"):
                load(tmp_path / f"bad_{original.name}")
        row.times += 5


# --- HU ---


def ct_values(*values: float) -> np.ndarray:
    """A volume (6, 5, 4) of HU between -1000 and 400, with `values` in its first voxels."""
    volume = np.random.default_rng(0).integers(-1000, 400, (6, 5, 4)).astype(float)
    volume.reshape(-1)[: len(values)] = values
    return volume


HU_CASES = {  # name: (volume as stored, slope and intercept, HU expected in the first voxels, kinds of findings)
    "lowest int16": (ct_values(-32768).astype(np.int16), (1, 0), [-32768], ["HU range"]),
    "highest int16": (ct_values(32767).astype(np.int16), (1, 0), [32767], ["HU range"]),
    "1e6 as float": (ct_values(1e6, -1e6).astype(np.float32), (1, 0), [32767, -32768], ["HU range"]),
    "1e300 as float64": (ct_values(1e300).astype(np.float64), (1, 0), [32767], ["HU range"]),
    "halves as float": (ct_values(10.5, 11.5, -3.4).astype(np.float32), (1, 0), [10, 12, -3], []),
    "HU + 1024 as uint16": ((ct_values(3000) + 1024).astype(np.uint16), (1, 0), [4024], ["no air"]),
    "HU + 1024 as uint16 with its intercept": ((ct_values(3000) + 1024).astype(np.uint16), (1, -1024), [3000], []),
    "negative HU in uint16": (ct_values(-5).astype(np.int16).view(np.uint16), (1, 0), [32767], ["HU range", "no air"]),
    "metal of 20,000 HU": (ct_values(20_000).astype(np.int16), (1, 0), [20_000], []),
    "int32 beyond int16": (ct_values(2**31 - 1).astype(np.int32), (1, 0), [32767], ["HU range"]),
    "padding of -3024": (ct_values(-3024).astype(np.int16), (1, 0), [-3024], []),
    "slope that makes HU of 1e9": (ct_values(1000).astype(np.int16), (1e6, 0), [32767], ["HU range"]),
    "slope of 3e38": (ct_values(1000).astype(np.int16), (3e38, 0), [32767], ["HU range"]),
    "NaN": (ct_values(np.nan).astype(np.float32), (1, 0), None, ["NaN"]),
    "infinity": (ct_values(-np.inf).astype(np.float32), (1, 0), None, ["NaN"]),
    "one value": (np.full((6, 5, 4), -1000, np.int16), (1, 0), None, ["empty CT"]),
    "unit range": ((ct_values() / 1000).astype(np.float32), (1, 0), None, ["scaled CT"]),
}


def write_scaled(path: Path, stored: np.ndarray, slope: float, intercept: float) -> None:
    """A NIfTI file that holds `stored` as it is, and its scaling beside."""
    image = nib.Nifti1Image(stored, np.diag([2.0, 2.0, 3.0, 1.0]))
    image.header.set_slope_inter(slope, intercept)
    write_plain(path, image.header, stored)


def write_plain(path: Path, header: nib.Nifti1Header, stored: np.ndarray) -> None:
    """A `.nii` file with this header as it is, which nibabel may refuse to write."""
    header["vox_offset"] = 352
    path.write_bytes(header.binaryblock + bytes(4) + stored.tobytes(order="F"))


def test_hu_outliers(tmp_path, fault):
    row = fault(
        f"CT: {', '.join(HU_CASES)}",
        "found as what it is; staged as int16, clipped where it must be; the network's input finite",
    )
    for number, case in enumerate(HU_CASES):
        check_hu(tmp_path / str(number), *HU_CASES[case])
        row.times += 1


def check_hu(folder: Path, stored: np.ndarray, scaling, expected: list[int] | None, kinds: list[str]) -> None:
    """One subject with this CT beside one that is as it should be: what is read, reported, staged and learned from."""
    for name in ("s1", "s2"):
        write_subject(folder / "data" / name, {"liver": np.ones((6, 5, 4)), "spleen": np.zeros((6, 5, 4))})
    (folder / "data" / "s1" / "ct.nii.gz").unlink()
    write_scaled(folder / "data" / "s1" / "ct.nii", stored, *scaling)
    subject = find_subjects(folder / "data")[0][0]
    findings = Findings("s1")
    read = read_ct(subject, findings)
    assert [finding.kind for finding in findings] == kinds
    assert all(re.match(r"subject s1: .*ct\.nii: ", str(finding)) for finding in findings)
    if expected is None:
        assert read is None and findings.errors
        with pytest.raises(SegkitError, match=r"subject s1: .*ct\.nii: "):
            open_data(folder / "data", folder / "stage", progress=False, strict=True)
        return
    assert not findings.errors
    assert read[0].dtype == np.int16 and read[0].reshape(-1)[: len(expected)].tolist() == expected
    data = open_data(folder / "data", folder / "stage", progress=False)
    assert [note for note in data.staged["s1"].info["notes"] if "ct.nii" in note] == [str(f) for f in findings]
    assert np.array_equal(data.staged["s1"].hu(), read[0].transpose(2, 1, 0))
    slices = SliceDataset(data.staged, [Part("s1")], data.label_map)
    batch = collate([(n, slices[n]) for n in range(len(slices))])
    wild = Augmentation(intensity_scale=0.9, intensity_shift_hu=1e4, noise_hu=1e4, gamma=5, blur_pixels=5)
    for seed in range(20):
        images, _ = augment.to_network(batch, (32, 32), augment.draw(wild, seed, 1, range(len(batch))))
        assert images.isfinite().all()
        # by hand: HU from -1000 to 1500, arcsinh((HU - 40) / 60)
        assert images.min() > -3.5467 and images.max() < 3.8855


# --- float16 ---


@pytest.fixture
def float16(monkeypatch):
    """Compute in float16, as on the GPUs before Ampere, on the CPU."""
    for module in (steps, inference):
        monkeypatch.setattr(module, "precision", lambda *_: torch.float16)


class Overflowing:
    """A loss whose gradient is `factor` times as large in the first `times` backward passes of training."""

    def __init__(self, monkeypatch, factor: float, times: int):
        self.original, self.factor, self.left = losses.head_loss, factor, times
        monkeypatch.setattr(losses, "head_loss", self)

    def __call__(self, *args, **kwargs):
        loss = self.original(*args, **kwargs)
        if torch.is_grad_enabled() and self.left:
            self.left -= 1
            loss.register_hook(lambda gradient: gradient * self.factor)
        return loss


def test_a_float16_gradient_that_overflows_is_left_out_and_scaled_less(phantom_data, monkeypatch, float16, fault, many):
    row = fault(
        "training in float16: gradients overflow for n steps",
        "weights stay in those steps, each halves the scale; then it learns",
    )
    slices = SliceDataset(phantom_data.staged, phantom_data.split.train, phantom_data.label_map)
    batch = next(iter(batches(slices, [5, 60, 30, 90], 4)))
    for n in many([2], range(1, 16)):
        with monkeypatch.context() as patched:
            learner = steps.Learner(phantom_data, SETTINGS.checked(), Ranks(torch.device("cpu")))
            learner.prepare(batch)
            before = {name: weight.clone() for name, weight in learner.network.state_dict().items()}
            Overflowing(patched, 1e30, n)
            for step in range(n):
                assert np.isfinite(learner.step(batch, 1, 1e-3))
                assert same(before, learner.network.state_dict())
                assert learner.scaler.get_scale() == 65536 / 2 ** (step + 1)
            learner.step(batch, 1, 1e-3)
            assert not same(before, learner.network.state_dict())
            assert all(weight.isfinite().all() for weight in learner.network.state_dict().values())
        row.times += 1


def test_float16_that_does_not_recover_stops(phantom_data, uninterrupted, tmp_path, monkeypatch, float16, fault):
    row = fault(
        "training in float16: the gradient overflows at every step",
        "stops with a message once nothing is scaled any more, not after hours without learning",
    )
    Overflowing(monkeypatch, 1e30, 10**9)
    with pytest.raises(SegkitError, match=r"epoch \d+: the gradient overflows float16 .* at the slices s\d+: \d"):
        train(phantom_data, replace(SETTINGS, slices_per_epoch=400), tmp_path, progress=False)
    row.times += 1


def test_float16_trains(phantom_data, tmp_path, float16):
    [*_, last] = train(phantom_data, SETTINGS, tmp_path, progress=False)
    assert np.isfinite(last["val_loss"]) and load_state(tmp_path / training.STATE_FILE).learner["scaler"]["scale"] > 1


FOUR = {"liver": 0, "kidney_left": 1, "kidney_right": 2, "spleen": 3}


def overflowing_network(channels: int, factor: float) -> torch.nn.Module:
    """Logits of +-`factor` and more, from features of ordinary size."""
    torch.manual_seed(0)
    network = build_network(features=[4, 8], out_channels=channels)
    with torch.no_grad():
        network.head.weight *= factor
    return network.eval()


@pytest.mark.parametrize("mirror", [False, True])
def test_logits_that_overflow_float16_are_computed_again(phantom_data, monkeypatch, float16, fault, mirror):
    row = fault(
        f"predicting in float16{', mirrored too' if mirror else ''}: logits beyond 65,504",
        "the same structures as computed in float32",
    )
    subject = phantom_data.staged[phantom_data.split.test[0].subject]
    for factor in (1e5, 1e8):
        predictor = Predictor(overflowing_network(4, factor), FOUR, (32, 32), device="cpu")
        found = predictor.segment(subject, mirror=mirror)
        with monkeypatch.context() as patched:
            patched.setattr(inference, "precision", lambda *_: torch.float32)
            exact = predictor.segment(subject, mirror=mirror)
        assert exact.codes.codes.any()
        assert np.array_equal(found.codes.codes, exact.codes.codes) and np.array_equal(found.best, exact.best)
        row.times += 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_network_that_gives_no_numbers_is_no_empty_scan(phantom_data, fault, bad):
    row = fault(
        f"predicting: a network whose logits of one structure are {bad}",
        "stops and names the slices: NaN is above no threshold, the scan would seem empty",
    )
    network = overflowing_network(4, 1)
    with torch.no_grad():
        network.head.bias[2] = bad
    part = phantom_data.split.test[0]
    predictor = Predictor(network, FOUR, (32, 32), device="cpu", batch_size=2)
    subject = phantom_data.staged[part.subject]
    for predict in (lambda: predictor.predict(subject), lambda: predictor.segment(subject),
                    lambda: predictor.predict_slices(subject, [3, 5])):  # fmt: skip
        with pytest.raises(SegkitError, match="output is not finite") as stop:
            predict()
        assert named_in(str(stop.value)) in [{(part.subject, z) for z in zs} for zs in ((0, 1), (3, 5))]
        row.times += 1


# --- shapes and sizes at the edge ---


def test_empty_and_constant_slices_and_structures_of_one_voxel(tmp_path, fault):
    row = fault(
        "training and predicting on empty slices, slices of one value, structures of one voxel",
        "finite losses and scores; one voxel is found, and one beside it is as far as the voxels are apart",
    )
    shape = (20, 18, 12)
    ct = np.full(shape, -1000, np.int16)
    ct[5:15, 5:15, 4:6] = np.random.default_rng(0).integers(-100, 300, (10, 10, 2))
    ct[:, :, 8] = 40
    for name in ("s1", "s2", "s3"):
        masks = {structure: np.zeros(shape, np.uint8) for structure in ("liver", "spleen", "stomach")}
        masks["liver"][7, 8, 4] = masks["spleen"][:, :, 8] = 1  # one voxel, a whole slice; of the stomach nothing
        write_subject(tmp_path / "data" / name, masks, ct)
    data = open_data(tmp_path / "data", tmp_path / "stage", progress=False)
    for loss in ("bce", "bce_dice", "dice", "focal", "textbook"):
        settings = TrainSettings(
            epochs=1, batch_size=4, target_shape=(32, 32), features=(4, 8), loss=loss, device="cpu",
            augmentation=NO_AUGMENTATION if loss == "dice" else Augmentation(),
        )  # fmt: skip
        [history] = train(data, settings, tmp_path / loss, progress=False)
        assert np.isfinite([history["train_loss"], history["val_loss"]]).all()
        checkpoint = load_checkpoint(tmp_path / loss / "checkpoint_epoch1.pth")
        subject = data.staged[data.split.test[0].subject]
        Predictor.of([checkpoint], device="cpu").segment(subject, uncertainty=True)
        row.times += 1
    one, beside = (np.zeros((4, 5, 6), bool) for _ in range(2))
    one[1, 2, 3] = beside[1, 2, 4] = True
    for predicted, dice, hd95 in ((one, 1, 0), (beside, 0, 2.5)):
        reference, prediction = (encode([("liver", mask)], mask.shape) for mask in (one, predicted))
        scores = score_subject("s1", "test", reference, prediction, (3.0, 1.0, 2.5)).scores.iloc[0]
        assert (scores["dice"], scores["hd95_mm"]) == (dice, hd95)
        row.times += 1


AFFINES = {
    "spacing of 1e-6 mm": np.diag([1e-6, 1e-6, 1e-6, 1]),
    "spacing of 1e-6 mm on one axis": np.diag([1, 1, 1e-6, 1]),
    "spacing of 1e6 mm": np.diag([1e6, 1e6, 1e6, 1]),
    "spacing of 1e6 mm on one axis": np.diag([1, 1e6, 1, 1]),
    "metres for mm": np.diag([0.0015, 0.0015, 0.0015, 1]),
    "zero": np.diag([0, 0, 0, 1.0]),
    "zero on one axis": np.diag([2, 0, 2, 1.0]),
    "two axes the same": np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
    "NaN": np.diag([np.nan, 1, 1, 1]),
    "NaN origin": np.array([[1, 0, 0, np.nan], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
    "infinite": np.diag([np.inf, 1, 1, 1]),
    "largest float32": np.diag([3e38, 3e38, 3e38, 1]),
}


def test_affines_that_place_no_scan(tmp_path, fault):
    row = fault(f"affine of CT and masks: {', '.join(AFFINES)}", "an error that names the file; the others are used")
    data_dir = tmp_path / "data"
    for number, affine in enumerate(AFFINES.values()):
        for path in write_subject(data_dir / f"bad{number:02}", {"liver": np.ones((6, 5, 4))}).rglob("*.nii.gz"):
            image = nib.load(path)
            header, stored = image.header.copy(), np.asanyarray(image.dataobj)
            header.set_qform(None, 0)
            header["sform_code"] = 1
            for line, values in zip(("srow_x", "srow_y", "srow_z"), affine, strict=False):
                header[line] = values
            path.unlink()
            write_plain(path.with_suffix(""), header, stored)
    for name in ("s1", "s2"):
        write_subject(data_dir / name, {"liver": np.ones((6, 5, 4))})
    data = open_data(data_dir, tmp_path / "stage", progress=False)
    assert list(data.staged) == ["s1", "s2"] and len(data.problems) == len(AFFINES)
    for number, problem in enumerate(data.problems):
        assert re.search(rf"subject bad{number:02}: .*ct\.nii: .*(affine|voxel sides)", str(problem))
        row.times += 1
