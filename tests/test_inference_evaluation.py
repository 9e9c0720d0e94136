import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from segkit import evaluation
from segkit.codes import CodeVolume, encode
from segkit.errors import SegkitError
from segkit.evaluation import COLUMNS, score_subject
from segkit.inference import Predictor, round_trip
from segkit.settings import Scoring
from segkit.splits import Part
from segkit.summaries import summarize


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
        scored = score_subject(subject.name, "test", subject.labels(), back, subject.spacing_mm)
        scores[side] = summarize(scored.scores)["macro_dice"]
    assert scores[128] > 0.97 > scores[64] > scores[32]


def volume_of(**masks) -> CodeVolume:
    """Masks given as rows of voxels along x."""
    masks = {name: np.array(mask)[None, None] for name, mask in masks.items()}
    return encode(masks.items(), next(iter(masks.values())).shape)


SPACING = (5.0, 2.0, 1.0)  # z, y, x: a voxel has 0.01 ml


def example_scores() -> pd.DataFrame:
    """Two subjects by hand. liver: Dice 1 and 0.05; spleen: missed, correctly absent; aorta: a false alarm, absent."""
    first = score_subject(
        "s0", "test",
        volume_of(liver=[1, 1, 0, 0], spleen=[0, 0, 1, 0], aorta=[0, 0, 0, 0], mine=[1, 0, 0, 0]),
        volume_of(liver=[1, 1, 0, 0], spleen=[0, 0, 0, 0], aorta=[0, 0, 0, 1]), SPACING,
    )  # fmt: skip
    hit, reference, nothing = np.zeros(100), np.zeros(100), np.zeros(100)
    hit[:20], reference[19:49] = 1, 1
    second = score_subject(
        "s1", "test",
        volume_of(liver=reference, spleen=nothing, aorta=nothing),
        volume_of(liver=hit, spleen=nothing, aorta=nothing), SPACING,
    )  # fmt: skip
    return pd.concat([first.scores, second.scores], ignore_index=True)


def test_scores_by_hand():
    scores = example_scores()
    assert tuple(scores.columns) == COLUMNS and len(scores) == 6  # `mine` is not looked for: no row
    rows = {(row.subject, row.structure): row for row in scores.itertuples()}
    liver = rows["s1", "liver"]
    assert (liver.tp, liver.fp, liver.fn, liver.reference_voxels, liver.predicted_voxels) == (1, 19, 29, 30, 20)
    assert liver.dice == pytest.approx(2 / 50) and liver.iou == pytest.approx(1 / 49)
    assert liver.precision == pytest.approx(1 / 20) and liver.recall == pytest.approx(1 / 30)
    assert (liver.reference_ml, liver.predicted_ml) == pytest.approx((0.3, 0.2))
    assert liver.volume_error_ml == pytest.approx(-0.1)
    # along x: 0..19 and 19..48, so the ends are 19 and 29 mm from the other, the centres 9.5 and 33.5
    assert liver.hd_mm == 29 and liver.centroid_distance_mm == 24
    assert liver.present and not liver.detected and liver.detection == "missed"
    assert rows["s0", "spleen"].dice == 0 and rows["s0", "spleen"].detection == "missed"
    assert rows["s0", "aorta"].dice == 0 and rows["s0", "aorta"].detection == "false alarm"
    assert np.isnan(rows["s1", "aorta"].dice) and rows["s1", "aorta"].detection == "correctly absent"
    assert rows["s0", "liver"].detected and rows["s0", "liver"].group == "organs"
    assert set(scores["found_at_dice"]) == {0.1} and set(scores["nsd_tolerance_mm"]) == {3.0}


def test_the_rule_for_empty_masks_holds_in_every_column():
    rows = {(row.subject, row.structure): row for row in example_scores().itertuples()}
    spleen, aorta, absent = rows["s0", "spleen"], rows["s0", "aorta"], rows["s1", "spleen"]
    for row in (spleen, aorta):
        assert (row.dice, row.iou, row.nsd) == (0, 0, 0)
    for row in (spleen, aorta, absent):
        distances = [row.hd95_mm, row.hd_mm, row.assd_mm, row.centroid_distance_mm]
        assert np.isnan(distances).all()
    assert (spleen.volume_error_ml, aorta.volume_error_ml) == pytest.approx((-0.01, 0.01))
    assert spleen.recall == 0 and np.isnan(spleen.precision) and aorta.precision == 0 and np.isnan(aorta.recall)
    assert np.isnan(
        [absent.dice, absent.iou, absent.nsd, absent.precision, absent.recall, absent.volume_error_ml]
    ).all()


def test_no_common_structure_is_an_error_that_says_so():
    with pytest.raises(SegkitError, match="subject s0: none of the model's structures"):
        score_subject("s0", "test", volume_of(liver=[1]), volume_of(spleen=[1]), SPACING)


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
    scores = evaluation.evaluate(predictor, phantom_data.staged, [part], "test", progress=False).scores
    reference = subject.labels().mask("liver")[4:40]
    assert scores.set_index("structure").loc["liver", "reference_voxels"] == reference.sum()
    foreign = Predictor(Threshold(), {"mine": 0, "yours": 1, "ours": 2}, (64, 64), device="cpu")
    with pytest.warns(UserWarning, match="left out: subject"), pytest.raises(SegkitError, match="nothing to score"):
        evaluation.evaluate(foreign, phantom_data.staged, [part], "test", progress=False)


@pytest.mark.parametrize("wrong", [{"detected_dice": 0}, {"detected_dice": 1.5}, {"tolerance_mm": -1}, {"jobs": 0}])
def test_scoring_that_makes_no_sense_is_refused(phantom_data, wrong):
    predictor = Predictor(Threshold(), LABELS, (64, 64), device="cpu")
    with pytest.raises(SegkitError, match=f"{next(iter(wrong)).upper()} = "):
        evaluation.evaluate(predictor, phantom_data.staged, phantom_data.split.test, "test", scoring=Scoring(**wrong))


def test_slabs_keep_their_places_so_that_distances_stay_true():
    """Two slabs with a gap: what is missed beyond the gap is as far away as it is."""
    reference, prediction = np.zeros((2, 9, 4, 4))
    reference[[0, 8], 1:3, 1:3] = prediction[0, 1:3, 1:3] = 1
    volumes = [encode([("liver", mask)], mask.shape) for mask in (reference, prediction)]
    row = score_subject("s0", "val", *volumes, SPACING, slices=[0, 1, 7, 8]).scores.iloc[0]
    assert row.hd_mm == 8 * 5.0 and row.reference_voxels == 8


def test_a_table_of_scores_comes_back_from_its_file_and_another_one_is_refused(tmp_path):
    scores = example_scores()
    scores.to_csv(tmp_path / "scores.csv", index=False)
    pd.testing.assert_frame_equal(evaluation.load_scores(tmp_path / "scores.csv"), scores)
    (tmp_path / "other.csv").write_text("subject;structure\ns0;liver\n")
    with pytest.raises(SegkitError, match=r"other.csv: expected the columns of evaluation_results_<stamp>.csv"):
        evaluation.load_scores(tmp_path / "other.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00\x01")
    for name in ("bytes.csv", "none.csv"):
        with pytest.raises(SegkitError, match=name):
            evaluation.load_scores(tmp_path / name)
    pd.concat([scores, scores.iloc[:1]]).to_csv(tmp_path / "twice.csv", index=False)
    with pytest.raises(SegkitError, match="s0, liver comes twice"):
        evaluation.load_scores(tmp_path / "twice.csv")


def test_a_perfect_network_scores_one_on_its_own_predictions(subject):
    predictor = Predictor(Threshold(), LABELS, (64, 64), device="cpu")
    prediction = predictor.predict(subject)
    scores = score_subject(subject.name, "test", prediction, prediction, subject.spacing_mm).scores
    assert scores.loc[scores["present"], "dice"].tolist() == [1, 1]
