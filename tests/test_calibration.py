"""Probabilities: fitted by hand-made laws, kept in checkpoints, and measured where unseen."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from test_ensemble import stored
from test_inference_evaluation import LABELS, Threshold
from torch import nn

from segkit import calibration
from segkit.calibration import Calibration, Reliability, fit_calibration
from segkit.checkpoints import load_checkpoint, save_checkpoint
from segkit.errors import SegkitError
from segkit.inference import Calibrated, Predictor
from segkit.reliability import measure_reliability
from segkit.settings import TrainSettings
from segkit.training import train

BINS = np.arange(-7.875, 8, 0.25)


def counted(slope: float, offset: float, pixels: float = 1e6) -> tuple[np.ndarray, np.ndarray]:
    """Pixels inside and outside in each bin of the distance, by a law."""
    total = pixels * np.exp(-0.5 * (BINS / 3) ** 2)
    inside = np.rint(total * expit(slope * BINS + offset)).astype(np.int64)
    return inside, np.rint(total).astype(np.int64) - inside


@settings(max_examples=20, deadline=None)
@given(st.floats(0.2, 3), st.floats(-2, 2))
def test_a_law_is_found_again(slope, offset):
    inside, outside = counted(slope, offset)
    found = fit_calibration(inside[None], outside[None], BINS[None], ["one"])
    assert found.slope == pytest.approx([slope], rel=0.02) and found.offset == pytest.approx([offset], abs=0.03)


def test_groups_have_their_own_and_few_pixels_follow_all_the_others():
    laws = [counted(1.0, 0.0), counted(0.4, -1.0), counted(2.0, 1.5, pixels=2), (0 * BINS, 0 * BINS)]
    inside, outside = (np.array(each, int) for each in zip(*laws, strict=True))
    found = fit_calibration(inside, outside, np.tile(BINS, (4, 1)), ["one", "other", "few", "none"])
    both = fit_calibration(inside[:2], outside[:2], np.tile(BINS, (2, 1)), ["one", "one"])
    assert found.slope[:2] == pytest.approx([1, 0.4], rel=0.02) and found.offset[:2] == pytest.approx([0, -1], abs=0.03)
    assert found.slope[3] == pytest.approx(both.slope[0], rel=1e-3)
    assert found.slope[2] == pytest.approx(both.slope[0], rel=0.25)  # two pixels a bin say little
    nothing = fit_calibration(0 * inside, outside, np.tile(BINS, (4, 1)), ["a"] * 4)
    assert nothing == Calibration((1.0,) * 4, (0.0,) * 4)


def test_what_lies_far_below_the_threshold_does_not_decide():
    """Of a million pixels far outside some belong to a missed structure, whatever the law near the threshold is."""
    inside, outside = counted(0.8, -0.3)
    inside[-calibration.NEAR > BINS] += 5000
    outside[-calibration.NEAR > BINS] += 10**6
    found = fit_calibration(inside[None], outside[None], BINS[None], ["one"])
    assert found.slope == pytest.approx([0.8], rel=0.03) and found.offset == pytest.approx([-0.3], abs=0.03)


def test_the_expected_calibration_error_by_hand():
    # 100 pixels said 0.2 of which 30 are inside, 300 said 0.9 of which 240 are: (100 * 0.1 + 300 * 0.1) / 400
    sums = np.array([[100.0, 0, 300], [20, 0, 270], [30, 0, 240]])
    found = Reliability.of(sums, np.array([0, 0.4, 0.6, 1]))
    assert found.expected_error == pytest.approx(0.1)
    assert found.said.tolist() == pytest.approx([0.2, np.nan, 0.9], nan_ok=True)
    assert np.isnan(Reliability.of(0 * sums, found.edges).expected_error)


def test_probabilities_and_thresholds_are_each_others_reverse():
    calibrated = Calibrated(np.array([0.5, 0.9]), np.array([0.5, 2.0]), np.array([-0.4, 0.3]))
    at_threshold = torch.tensor(logit(calibrated.threshold), dtype=torch.float32)[:, None, None]
    assert calibrated.probability(at_threshold).flatten().tolist() == pytest.approx(expit([-0.4, 0.3]).tolist())
    for probability in (0.1, 0.5, 0.97):
        limits = torch.tensor(calibrated.logit_of(logit(np.full(2, probability))), dtype=torch.float32)
        assert calibrated.probability(limits[:, None]).flatten().tolist() == pytest.approx([probability] * 2)


def with_scores(checkpoint, tmp_path, name="c.pth", **scores):
    path = tmp_path / name
    return load_checkpoint(save_checkpoint(
        path, checkpoint.model, checkpoint.network, checkpoint.label_map, checkpoint.settings, 1,
        {**checkpoint.scores, **scores}, {},
    ))  # fmt: skip


def test_a_threshold_that_is_asked_for_is_of_the_calibrated_probability(tmp_path):
    content = {"slope": [0.5, 2.0], "offset": [-0.4, 0.3]}
    one = with_scores(stored(tmp_path / "a.pth", thresholds=[0.5, 0.9]), tmp_path, calibration=content)
    expected = logit(np.array([0.5, 0.9])) + (logit(0.3) - np.array(content["offset"])) / np.array(content["slope"])
    assert Predictor.of([one], 0.3).logit_thresholds.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert torch.sigmoid(Predictor.of([one]).logit_thresholds).tolist() == pytest.approx([0.5, 0.9])  # as validated
    other = stored(tmp_path / "b.pth", thresholds=[0.5, 0.5])  # without a calibration its outputs are taken for them
    both = Predictor.of([one, other], [0.3, 0.3]).logit_thresholds.tolist()
    assert both == pytest.approx(((expected + logit(0.3)) / 2).tolist(), rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        3.0, {}, {"slope": [1.0, 1.0]}, {"slope": [1.0], "offset": [0.0]}, {"slope": [1.0, -1.0], "offset": [0.0, 0.0]},
        {"slope": [1.0, float("nan")], "offset": [0.0, 0.0]}, {"slope": [1.0, "1"], "offset": [0.0, 0.0]},
        {"slope": [1.0, 1.0], "offset": [0.0, 1e9]},
    ],
)  # fmt: skip
def test_a_damaged_calibration_is_refused(tmp_path, wrong):
    with pytest.raises(SegkitError, match=r"c\.pth: damaged checkpoint: calibration: expected"):
        with_scores(stored(tmp_path / "a.pth"), tmp_path, calibration=wrong)


class Ramp(nn.Module):
    """A network whose logit is HU / 50 - 4 everywhere, so that its sigmoid is known."""

    in_channels = 1

    def forward(self, images):
        return (torch.sinh(images) * 60 + 40) / 50 - 4


class Planted:
    """A scan of noise in which a pixel is inside with a probability by its HU; as `StagedSubject` is read."""

    name, shape, spacing_mm, structures = "planted", (4, 96, 96), (3.0, 1.0, 1.0), ("liver",)

    def __init__(self, slope: float, offset: float):
        from segkit.codes import encode

        random = np.random.default_rng(0)
        # pixels of 4 x 4 voxels, so that each is one of the network's
        self._hu = random.integers(-300, 700, (4, 24, 24)).astype(np.int16).repeat(4, 1).repeat(4, 2)
        logits = self._hu / 50 - 4
        inside = random.random((4, 24, 24)).repeat(4, 1).repeat(4, 2) < expit(slope * logits + offset)
        self._volume = encode([("liver", inside)], self.shape)
        self.codebook = self._volume

    def hu(self, z=slice(None)):
        return self._hu[z]

    def labels(self, z=slice(None)):
        return self._volume.at(z)


def test_reliability_of_a_known_law():
    """Pixels are inside as a law of the logit says: outputs miss it, probabilities by that law meet it."""
    from segkit.splits import Part

    law = Calibrated(np.array([0.5]), np.array([0.5]), np.array([-1.0]))
    predictor = Predictor(Ramp(), {"liver": 0}, (96, 96), device="cpu", calibrations=[law])
    found = measure_reliability(predictor, {"planted": Planted(0.5, -1.0)}, [Part("planted")])
    assert found["probability"].expected_error < 0.03 and found["output"].expected_error > 0.1
    number = found["probability"].number
    assert number.sum() <= 4 * 96 * 96 and (number > 0).all()


def test_training_leaves_probabilities_that_hold_where_unseen(phantom_data, tmp_path):
    """On the phantoms that neither trained nor validated: calibrated ones are nearer to what is so than outputs are."""
    settings = TrainSettings(
        epochs=1, target_shape=(48, 64), features=(8, 16, 32), slices_per_epoch=1200, batch_size=4, device="cpu"
    )
    data = replace(phantom_data, label_map={"liver": 0, "lung_lower_lobe_left": 1, "heart": 2, "spleen": 3, "aorta": 4})
    train(data, settings, tmp_path, progress=False)
    [path] = sorted(tmp_path.glob("checkpoint_epoch1.pth"))
    checkpoint = load_checkpoint(path)
    assert checkpoint.calibration is not None and min(checkpoint.calibration.slope) > 0
    found = measure_reliability(Predictor.of([checkpoint]), data.staged, data.split.test)
    assert found["probability"].expected_error < 0.6 * found["output"].expected_error


def test_uncertainty_without_calibration_is_said_once_asked_for(phantom_data, tmp_path):
    subject = next(iter(phantom_data.staged.values()))
    older = Predictor.of([stored(tmp_path / "older.pth")], device="cpu")
    with pytest.warns(UserWarning, match=r"older\.pth: has no calibrated probabilities"):
        older.segment(subject, uncertainty=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        older.segment(subject)
        Predictor(Threshold(), LABELS, (64, 64), device="cpu").segment(subject, uncertainty=True)


def test_mirroring_a_model_that_never_saw_mirrored_slices_is_refused(phantom_data, tmp_path):
    subject = next(iter(phantom_data.staged.values()))
    plain = stored(tmp_path / "plain.pth")
    with pytest.raises(SegkitError, match=r"plain\.pth: trained without mirrored slices.*flip_left_right"):
        Predictor.of([plain], device="cpu").segment(subject, mirror=True)
    flipped = {**plain.settings, "augmentation": {"flip_left_right": True}}
    path = save_checkpoint(tmp_path / "f.pth", plain.model, plain.network, plain.label_map, flipped, 1, {}, {})
    assert Predictor.of([load_checkpoint(path)], device="cpu").segment(subject, mirror=True).codes.codes.any() in (0, 1)
    with pytest.raises(SegkitError, match=r"plain\.pth"):
        Predictor.of([load_checkpoint(path), plain], device="cpu").check_mirror()
