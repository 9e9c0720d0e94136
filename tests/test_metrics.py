import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segkit import metrics
from segkit.codes import encode


def volume_of(masks: dict) -> object:
    return encode(masks.items(), next(iter(masks.values())).shape)


def test_counts_and_ratios_by_hand():
    reference = volume_of({"a": np.array([1, 1, 1, 0, 0]), "b": np.array([1, 0, 0, 0, 1])})
    prediction = volume_of({"a": np.array([1, 1, 0, 1, 0]), "b": np.array([1, 1, 0, 0, 0]), "c": np.ones(5)})
    counts = metrics.code_pairs(reference, prediction).counts()
    assert counts.loc["a"].tolist() == [2, 1, 1] and counts.loc["b"].tolist() == [1, 1, 1] and "c" not in counts.index
    assert metrics.dice(2, 1, 1) == pytest.approx(4 / 6) and metrics.iou(2, 1, 1) == pytest.approx(2 / 4)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 0.8), st.floats(0, 0.8))
def test_counts_with_overlaps_equal_those_of_the_single_masks_and_monai_agrees(seed, p, q):
    from monai.metrics import DiceMetric, MeanIoU

    random = np.random.default_rng(seed)
    names = [f"s{i}" for i in range(5)]
    ref, pred = (dict(zip(names, random.random((5, 4, 5, 3)) < density, strict=True)) for density in (p, q))
    counts = metrics.code_pairs(volume_of(ref), volume_of(pred)).counts()
    for name in names:
        r, s = ref[name], pred[name]
        assert counts.loc[name].tolist() == [(r & s).sum(), (s & ~r).sum(), (r & ~s).sum()]
    ours = metrics.dice(*counts.to_numpy().T)
    planes = [torch.from_numpy(np.stack(list(masks.values()))[None]).float() for masks in (pred, ref)]
    for values, monai_metric in (
        (ours, DiceMetric(include_background=True, ignore_empty=True)),
        (metrics.iou(*counts.to_numpy().T), MeanIoU(include_background=True, ignore_empty=True)),
    ):
        theirs = monai_metric(*planes)[0].numpy()
        held = np.array([ref[name].any() for name in names])  # MONAI has NaN for every empty reference
        assert np.allclose(values[held], theirs[held])
    assert np.allclose(metrics.iou(*counts.to_numpy().T), ours / (2 - ours), equal_nan=True)


def test_the_rule_for_empty_masks():
    # tp, fp, fn of: both empty, false alarm, missed, perfect
    tp, fp, fn = np.array([0, 0, 0, 5]), np.array([0, 3, 0, 0]), np.array([0, 0, 4, 0])
    expected = [np.nan, 0, 0, 1]
    assert np.array_equal(metrics.dice(tp, fp, fn), expected, equal_nan=True)
    assert np.array_equal(metrics.iou(tp, fp, fn), expected, equal_nan=True)
    words = metrics.detection(tp + fn > 0, tp + fp > 0, metrics.dice(tp, fp, fn), 0.1)
    assert words.tolist() == ["correctly absent", "false alarm", "missed", "found"]


def test_found_needs_the_threshold_itself():
    one = np.array([True])
    assert metrics.detection(one, one, np.array([0.1]), 0.1)[0] == "found"
    assert metrics.detection(one, one, np.array([0.0999]), 0.1)[0] == "missed"


def test_means_say_their_number_and_leave_nan_out():
    mean, number = metrics.nan_mean(np.array([[1, np.nan], [0, np.nan]]), axis=0)
    assert mean[0] == 0.5 and np.isnan(mean[1]) and number.tolist() == [2, 0]
    assert np.isnan(metrics.nan_mean(np.array([]))[0])


def test_success_rate_by_hand():
    values = np.array([0.5, 0.49, 0.9, np.nan])
    assert metrics.success_rate(values, 0.5) == pytest.approx(2 / 3)
    assert np.isnan(metrics.success_rate(np.array([np.nan]), 0.5))


def test_precision_and_recall_by_hand():
    tp, fp, fn = np.array([3, 0, 0]), np.array([1, 2, 0]), np.array([0, 0, 4])
    assert np.array_equal(metrics.precision(tp, fp), [0.75, 0, np.nan], equal_nan=True)
    assert np.array_equal(metrics.recall(tp, fn), [1, np.nan, 0], equal_nan=True)


@pytest.mark.parametrize("dense", [0, 10**6])
def test_pairs_are_the_same_in_slabs_and_with_codebooks_too_large_for_a_table(monkeypatch, dense):
    random = np.random.default_rng(0)
    names = [f"s{k}" for k in range(6)]
    ref, pred = (dict(zip(names, random.random((6, 7, 5, 3)) < 0.4, strict=True)) for _ in range(2))
    monkeypatch.setattr(metrics, "_SLAB_VOXELS", 10)
    monkeypatch.setattr(metrics, "_DENSE_PAIRS", dense)
    prediction = volume_of(pred)
    prediction = prediction.with_codes(np.asfortranarray(prediction.codes))  # whatever the layout in memory
    pairs = metrics.code_pairs(volume_of(ref), prediction)
    assert pairs.voxels.sum() == 7 * 5 * 3 and (pairs.voxels > 0).all()
    for name, row in pairs.counts().iterrows():
        r, p = ref[name], pred[name]
        assert row.tolist() == [(r & p).sum(), (p & ~r).sum(), (r & ~p).sum()]


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        metrics.code_pairs(volume_of({"a": np.ones(3)}), volume_of({"a": np.ones(4)}))
