import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from segkit import cases
from segkit.codes import encode
from segkit.splits import Part


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def volume_of(**masks):
    return encode(masks.items(), next(iter(masks.values())).shape)


def table_of(*rows):
    return pd.DataFrame(rows, columns=["subject", "structure", "dice", "present"])


def test_cases_are_picked_by_dice_among_those_that_the_reference_holds():
    scores = table_of(
        ("s2", "liver", 0.9, True), ("s1", "spleen", 0.2, True), ("s1", "liver", 0.9, True), ("s1", "aorta", 0.5, True),
        ("s2", "aorta", 0.0, False), ("s3", "liver", np.nan, False), ("s2", "colon", 0.2, True),
    )  # fmt: skip
    picked = cases.pick_cases(scores)
    # by Dice, subject, structure: s1 spleen .2, s2 colon .2, s1 aorta .5, s1 liver .9, s2 liver .9
    assert picked[["case", "subject", "structure"]].to_numpy().tolist() == [
        ["worst", "s1", "spleen"], ["median", "s1", "aorta"], ["best", "s2", "liver"],
    ]  # fmt: skip
    shuffled = cases.pick_cases(scores.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(picked, shuffled)


@pytest.mark.parametrize(
    ("held", "expected"),
    [(0, ""), (1, "worst"), (2, "worst best"), (3, "worst median best"), (4, "worst median best")],
)
def test_few_cases(held, expected):
    rows = [(f"s{i}", "liver", i / 10, True) for i in range(held)]
    picked = cases.pick_cases(table_of(*rows, ("s9", "liver", np.nan, False)))
    assert " ".join(picked["case"]) == expected
    if held == 4:
        assert picked["dice"].tolist() == [0, 0.1, 0.3]  # the lower of the two in the middle


def test_the_box_is_square_in_mm_with_its_margin_and_ends_at_the_slice():
    plane = np.zeros((100, 200), bool)
    plane[50:60, 90:110] = True  # 20 mm by 20 mm at spacing (2, 1)
    both = volume_of(liver=plane), volume_of(liver=np.roll(plane, 10, axis=1))  # together 20 mm by 30 mm
    assert cases.box_around(*both, (2.0, 1.0), margin_mm=10) == (slice(42, 68), slice(80, 130))
    rows, columns = cases.box_around(*both, (2.0, 1.0), margin_mm=500)
    assert plane[rows, columns].shape == plane.shape
    nothing = volume_of(liver=np.zeros((4, 4)))
    assert cases.box_around(nothing, nothing, (1, 1)) == (slice(None), slice(None))


def test_the_window_fits_what_is_seen():
    one = np.ones((2, 2))
    assert cases.window_for(volume_of(lung_upper_lobe_left=one)) == "lung"
    assert cases.window_for(volume_of(rib_left_1=one, liver=np.zeros((2, 2)))) == "bone"
    assert cases.window_for(volume_of(rib_left_1=one, liver=one)) == "soft tissue"
    assert cases.window_for(volume_of(liver=np.zeros((2, 2)))) == "soft tissue"


def test_a_case_shows_the_slice_of_its_part_that_holds_most_of_its_structure_alone(phantom_data):
    subject = next(iter(phantom_data.staged.values()))
    labels = subject.labels()
    part = Part(subject.name, slabs=((0, 8),))
    row = {"case": "worst", "subject": subject.name, "structure": "liver", "dice": 0.123}
    held = labels.mask("liver").sum((1, 2))
    for where in (Part(subject.name), part):
        title, hu, reference, prediction, spacing_mm = cases.case_sample(row, subject, where, labels)
        z = max(where.slices(len(held)), key=lambda z: held[z])
        assert title == f"worst: {subject.name}, liver, Dice 0.12" and spacing_mm == subject.spacing_mm[1:]
        assert (hu == subject.hu(z)).all() and (reference.mask("liver") == labels.mask("liver")[z]).all()
        assert {name for name, voxels in prediction.voxels().items() if voxels} <= {"liver"}
        assert (prediction.mask("liver") == reference.mask("liver")).all()


def test_a_row_a_case_with_its_title_and_a_true_scale_bar():
    plane = np.zeros((100, 100), bool)
    plane[40:60, 40:60] = True
    both = volume_of(liver=plane), volume_of(liver=np.zeros((100, 100)))
    sample = ("worst: s1, liver, Dice 0.00", np.zeros((100, 100), np.int16), *both, (1.0, 0.8))
    figure = cases.plot_cases([sample, sample], "cases, test split")
    assert [axes.get_title(loc="left") for axes in figure.axes[::3]] == [sample[0]] * 2
    assert np.ptp(figure.axes[0].lines[0].get_xdata()) == pytest.approx(20 / 0.8)  # 20 mm in pixels of 0.8 mm
    truth, prediction = figure.axes[1].collections
    assert len(truth.get_segments()) == 1 and prediction.get_segments() == []
    assert figure.axes[0].images[0].get_array().shape == (80, 100)  # 20 mm and 3 cm on each side, x as far as it goes
    figure.canvas.draw()


def test_no_case_is_a_sentence():
    figure = cases.plot_cases([], "cases, test split")
    assert figure.texts[0].get_text().startswith("cases, test split: the reference holds no structure")
