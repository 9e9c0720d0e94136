import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from segkit import evaluation
from segkit.codes import CodeVolume, encode
from segkit.errors import SegkitError
from segkit.evaluation import COLUMNS, per_structure, score_subject, success_rates, summarize
from segkit.inference import Predictor, round_trip
from segkit.subjects import Part


class Threshold(nn.Module):
    """A network whose answer is known: channel 0 is bone above 200 HU, channel 1 everything above 0, 2 nothing."""

    in_channels = 1

    def forward(self, images):
        hu = torch.sinh(images) * 60 + 40
        return torch.cat([hu - 200, hu, hu - 1e4], 1) / 100


LABELS = {"bone": 0, "dense": 1, "nothing": 2}


@pytest.fixture(scope="module")
def subject(phantom_data):
    """The phantom whose files are turned most."""
    return max(phantom_data.staged.values(), key=lambda s: s.grid.orientation != "RAS")


def test_a_volume_comes_back_on_the_scans_own_grid(subject):
    volume = Predictor(Threshold(), LABELS, (256, 256), device="cpu").predict(subject)
    assert volume.codes.shape == subject.shape and volume.structures == tuple(LABELS)
    hu = subject.hu().astype(float)
    for name, limit in (("bone", 200), ("dense", 0)):
        predicted, expected = volume.mask(name), hu > limit

        # resampling there and back smooths edges; at its right place the agreement is high, a voxel off it is not
        def agreement(a, b):
            return 2 * (a & b).sum() / (a.sum() + b.sum())

        here = agreement(predicted, expected)
        moved = [agreement(np.roll(predicted, 1, axis), expected) for axis in range(3)]
        assert here > 0.85 and here > max(moved) + 0.02
    assert not volume.mask("nothing").any()
    assert not (volume.mask("bone") & ~volume.mask("dense")).any()  # overlapping channels stay overlapping


def test_parts_and_single_slices_equal_the_whole(subject):
    predictor = Predictor(Threshold(), LABELS, (64, 64), batch_size=3, device="cpu")
    whole = predictor.predict(subject)
    part = Part(subject.name, ((2, 6), (9, 11)))
    some = predictor.predict(subject, part)
    assert np.array_equal(some.mask("dense"), whole.mask("dense")[part.slices(subject.shape[0])])
    singles = predictor.predict_slices(subject, [7, 3])
    assert all(np.array_equal(singles[z].mask("bone"), whole.mask("bone")[z]) for z in (7, 3))


def test_a_higher_threshold_gives_less(subject):
    low, high = (
        Predictor(Threshold(), LABELS, (64, 64), threshold=t, device="cpu").predict(subject).mask("dense")
        for t in (0.3, 0.9)
    )
    assert not (high & ~low).any() and high.sum() < low.sum()
    for wrong in (0, 1, -1):
        with pytest.raises(SegkitError, match="THRESHOLD"):
            Predictor(Threshold(), LABELS, (64, 64), threshold=wrong)


def test_the_reference_through_a_fine_grid_is_almost_itself_and_through_a_coarse_one_less(subject):
    structures = subject.structures
    scores = {}
    for side in (128, 64, 32):
        back = round_trip(subject, structures, (side, side))
        scores[side] = summarize(score_subject(subject.name, "test", subject.labels(), back))["macro_dice"]
    assert scores[128] > 0.97 > scores[64] > scores[32]


def volume_of(**masks) -> CodeVolume:
    masks = {name: np.array(mask) for name, mask in masks.items()}
    return encode(masks.items(), next(iter(masks.values())).shape)


def example_scores() -> pd.DataFrame:
    """Two subjects by hand. liver: Dice 1 and 0.05; spleen: missed, correctly absent; aorta: a false alarm, absent."""
    first = score_subject(
        "s0", "test",
        volume_of(liver=[1, 1, 0, 0], spleen=[0, 0, 1, 0], aorta=[0, 0, 0, 0], mine=[1, 0, 0, 0]),
        volume_of(liver=[1, 1, 0, 0], spleen=[0, 0, 0, 0], aorta=[0, 0, 0, 1]),
    )  # fmt: skip
    hit, reference = np.zeros(100), np.zeros(100)
    hit[:20], reference[19:39] = 1, 1
    second = score_subject(
        "s1", "test",
        encode([("liver", reference), ("spleen", 0 * hit), ("aorta", 0 * hit)], (100,)),
        encode([("liver", hit), ("spleen", 0 * hit), ("aorta", 0 * hit)], (100,)),
    )  # fmt: skip
    return pd.concat([first, second], ignore_index=True)


def test_scores_by_hand():
    scores = example_scores()
    assert tuple(scores.columns) == COLUMNS and len(scores) == 6  # `mine` is not looked for: no row
    rows = {(row.subject, row.structure): row for row in scores.itertuples()}
    liver = rows["s1", "liver"]
    assert (liver.tp, liver.fp, liver.fn, liver.reference_voxels, liver.predicted_voxels) == (1, 19, 19, 20, 20)
    assert liver.dice == pytest.approx(0.05) and liver.iou == pytest.approx(1 / 39)
    assert liver.present and not liver.detected and liver.detection == "missed"
    assert rows["s0", "spleen"].dice == 0 and rows["s0", "spleen"].detection == "missed"
    assert rows["s0", "aorta"].dice == 0 and rows["s0", "aorta"].detection == "false alarm"
    assert np.isnan(rows["s1", "aorta"].dice) and rows["s1", "aorta"].detection == "correctly absent"
    assert rows["s0", "liver"].detected and rows["s0", "liver"].group == "organs"


def test_tables_and_headline_by_hand():
    scores = example_scores()
    table = per_structure(scores).set_index("structure")
    assert table.loc["liver", "dice"] == pytest.approx(0.525) and table.loc["liver", "n"] == 2
    assert table.loc["liver", ["found", "missed", "false_alarms", "correctly_absent"]].tolist() == [1, 1, 0, 0]
    assert table.loc["aorta", "n"] == 0 and np.isnan(table.loc["aorta", "dice"])
    assert list(table.index) == ["liver", "spleen", "aorta"]
    assert summarize(scores) == {
        "macro_dice": pytest.approx((0.525 + 0) / 2), "structures": 2, "subjects": 2,
        "found": 1, "missed": 2, "false_alarms": 1, "correctly_absent": 2,
    }  # fmt: skip
    rates = success_rates(scores, (0.05, 0.5))
    assert rates.loc["organs"].tolist() == pytest.approx([2 / 3, 1 / 3, 3]) and list(rates.index) == ["organs", "all"]


def test_no_common_structure_is_an_error_that_says_so():
    with pytest.raises(SegkitError, match="subject s0: none of the model's structures"):
        score_subject("s0", "test", volume_of(liver=[1]), volume_of(spleen=[1]))


def test_kept_predictions_come_back_and_missing_ones_are_named(subject, tmp_path):
    predictor = Predictor(Threshold(), LABELS, (64, 64), device="cpu")
    prediction = predictor.predict(subject)
    evaluation.save_prediction(tmp_path, subject, prediction)
    back = evaluation.load_prediction(tmp_path, subject)
    assert np.array_equal(back.codes, prediction.codes) and back.structures == prediction.structures
    with pytest.raises(SegkitError, match="no prediction of"):
        evaluation.load_prediction(tmp_path / "none", subject)


def test_a_part_is_scored_on_its_slices_and_a_subject_without_common_structures_is_left_out(phantom_data):
    subject = next(iter(phantom_data.staged.values()))
    labels = {"liver": 0, "spleen": 1, "brain": 2}
    predictor = Predictor(Threshold(), labels, (64, 64), device="cpu")
    part = Part(subject.name, ((4, 40),))
    scores = evaluation.evaluate(predictor, phantom_data.staged, [part], "test", progress=False)
    reference = subject.labels().mask("liver")[4:40]
    assert scores.set_index("structure").loc["liver", "reference_voxels"] == reference.sum()
    foreign = Predictor(Threshold(), {"mine": 0, "yours": 1, "ours": 2}, (64, 64), device="cpu")
    with pytest.warns(UserWarning, match="left out: subject"), pytest.raises(SegkitError, match="nothing to score"):
        evaluation.evaluate(foreign, phantom_data.staged, [part], "test", progress=False)


def test_a_test_set_that_holds_nothing_has_no_score_and_says_so(tmp_path):
    from segkit.report import Report, headline

    scores = score_subject("s0", "test", volume_of(prostate=[0, 0]), volume_of(prostate=[0, 1]))
    summary = Report(scores, "test", tmp_path).summary(scores, [tmp_path / "x.pth"])
    assert summary["prediction"]["macro_dice"] is None and "macro Dice no score" in headline(summary)


@pytest.mark.parametrize("value", [0, -0.1, 1.5])
def test_a_detection_threshold_that_finds_everything_is_refused(value):
    with pytest.raises(SegkitError, match="DETECTED_DICE"):
        score_subject("s0", "test", volume_of(liver=[1]), volume_of(liver=[1]), value)


def test_a_perfect_network_scores_one_on_its_own_predictions(subject):
    predictor = Predictor(Threshold(), LABELS, (64, 64), device="cpu")
    prediction = predictor.predict(subject)
    scores = score_subject(subject.name, "test", prediction, prediction)
    assert scores.loc[scores["present"], "dice"].tolist() == [1, 1]
