import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from PIL import Image

from segkit import figures, styles
from segkit.errors import SegkitError
from segkit.labels import GROUPS, group_of, official_names
from segkit.unet import UNet2D


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def table_of(*rows):
    """Scores from rows of subject, structure, dice, hd95_mm and reference_ml; a volume of 0 is not held."""
    table = pd.DataFrame(rows, columns=["subject", "structure", "dice", "hd95_mm", "reference_ml"])
    table["group"] = [group_of(name) for name in table["structure"]]
    table["present"] = table["reference_ml"] > 0
    found = table["dice"] >= 0.1
    words = [found & table["present"], table["present"], table["dice"].notna()]
    table["detection"] = np.select(words, ["found", "missed", "false alarm"], "correctly absent")
    return table.assign(
        iou=table["dice"] / (2 - table["dice"]), nsd=table["dice"], nsd_tolerance_mm=3.0, found_at_dice=0.1
    )


SCORES = table_of(
    ("s1", "liver", 0.9, 4.0, 1500.0), ("s1", "spleen", 0.5, 20.0, 200.0), ("s1", "rib_left_1", 0.0, np.nan, 3.0),
    ("s2", "liver", 0.7, 0.0, 1200.0), ("s2", "spleen", 0.0, np.nan, 0.0), ("s2", "rib_left_1", np.nan, np.nan, 0.0),
    ("s2", "my_own", 0.8, 2.0, 10.0), ("s3", "spleen", 0.0, np.nan, 0.0),
)  # fmt: skip
"""Five held cases: organs .9, .5, .7; ribs 0 (missed); other .8. Two false alarms."""

NOTHING_HELD = SCORES[~SCORES["present"]]
NO_SCORES = SCORES.iloc[:0]


def texts(figure):
    return " | ".join(text.get_text() for text in figure.findobj(plt.Text) if text.get_text())


def test_every_group_has_a_style_of_its_own_without_colour():
    assert set(styles.GROUP_STYLES) == set(GROUPS) == {group_of(name) for name in official_names()} | {"other"}
    looks = styles.GROUP_STYLES.values()
    assert len({look.marker for look in looks}) == len(GROUPS)
    assert len({(look.color, str(look.line)) for look in looks}) == len(GROUPS)


def test_the_network_is_drawn_with_its_own_channels_and_sizes():
    figure = figures.plot_unet(UNet2D(2, 7, (4, 8)), (32, 48))
    figure.canvas.draw()
    words = [text.get_text().split("\n") for text in figure.axes[0].texts if text.get_text()]
    assert words == [
        ["4 channels", "32 x 48"], ["8 channels", "16 x 24"], ["16 channels", "8 x 12"], ["8 channels", "16 x 24"],
        ["4 channels", "32 x 48"], ["slice", "2 channels"], ["7 outputs,", "one a structure"],
    ]  # fmt: skip


def test_history_with_and_without_scores():
    rows = [
        {"epoch": e, "train_loss": 1 / e, "val_loss": 2 / e, "val_dice": d, "val_structures": n}
        for e, d, n in ((1, None, 0), (2, 0.4, 61), (3, None, 0))
    ]
    figure = figures.plot_history(rows)
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[1, 1 / 2, 1 / 3], [2, 1, 2 / 3]]
    (dice,) = figure.axes[1].lines
    assert (dice.get_xdata().tolist(), dice.get_ydata().tolist()) == ([2], [0.4])
    assert "val split, 61 structures" in texts(figure)
    for early in (rows[:1], [rows[0] | {"val_loss": None}]):
        figures.plot_history(early).canvas.draw()
    assert texts(figures.plot_history([])) == "no epoch is done yet"


def test_losses_are_written_as_numbers_however_narrow_their_range():
    for losses, written in (([0.8, 0.25], {"0.3", "0.4", "0.6"}), ([20.0, 0.02], {"0.1", "1", "10"})):
        rows = [
            {"epoch": epoch, "train_loss": loss, "val_loss": loss, "val_dice": 0.5, "val_structures": 2}
            for epoch, loss in enumerate(losses, 1)
        ]
        figure = figures.plot_history(rows)
        figure.canvas.draw()
        axis, (low, high) = figure.axes[0].yaxis, figure.axes[0].get_ylim()
        shown = [label for label in axis.get_ticklabels(which="both") if low <= label.get_position()[1] <= high]
        assert {label.get_text() for label in shown} - {""} == written


def test_distribution_by_hand():
    figure = figures.plot_distribution(SCORES, "val")
    left, right = figure.axes
    assert [bar.get_height() for bar in left.patches if bar.get_height()] == [1] * 5
    assert left.get_title() == "5 cases, val split" and "mean 0.58" in texts(figure) and "median 0.7" in texts(figure)
    labels = [label.get_text() for label in right.get_yticklabels()]
    assert labels == ["organs (n = 3)", "ribs (n = 1)", "other (n = 1)"]
    points = [sorted(cases.get_offsets()[:, 0].tolist()) for cases in right.collections]
    assert points == [[0.5, 0.7, 0.9], [0], [0.8]]
    means = [line.get_xdata().item() for line in right.lines if line.get_marker() == "D"]
    assert means == pytest.approx([0.7, 0, 0.8])


def test_distances_name_how_many_were_missed_and_have_a_place_for_0():
    figure = figures.plot_distribution(SCORES, "test", "hd95_mm")
    left, right = figure.axes
    assert left.get_title() == "4 cases, test split\n1 more missed: nothing predicted, no value"
    assert sum(bar.get_height() for bar in left.patches) == 4
    assert [label.get_text() for label in right.get_yticklabels()][1] == "ribs (n = 0, 1 missed)"
    assert left.get_xscale() == "symlog" and left.get_xlim()[0] == 0 and left.get_xlabel() == "HD95 (mm)"
    assert figures.plot_distribution(SCORES, "test", "nsd").axes[1].get_xlabel() == "surface Dice at 3 mm"
    figure.canvas.draw()
    with pytest.raises(SegkitError, match="'volume': choose one of dice, iou"):
        figures.plot_distribution(SCORES, "test", "volume")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 5000), min_size=1, max_size=30))
def test_every_distance_falls_into_a_bin(distances):
    values = np.array(distances)
    assert np.histogram(values, figures._bins(values, "assd_mm"))[0].sum() == len(values)


def test_the_thresholds_that_are_asked_for_are_marked():
    (axes,) = figures.plot_success_rates(SCORES, "test", (0.25, 0.95)).axes
    (above,) = axes.child_axes
    held = SCORES.loc[SCORES["present"], "dice"]
    shares = [f"≥ {threshold:g}\n{(held >= threshold).mean():.0%}" for threshold in (0.25, 0.95)]
    assert [label.get_text() for label in above.get_xticklabels()] == shares


def test_success_rates_by_hand():
    figure = figures.plot_success_rates(SCORES, "test")
    *groups, everything = (line for line in figure.axes[0].lines if len(line.get_xdata()) == 101)
    assert [line.get_label() for line in groups] == ["organs (3)", "ribs (1)", "other (1)"]
    at_half, at_seven, above = ([line.get_ydata()[place] for line in groups] for place in (50, 70, 71))
    assert at_half == [1, 0, 1] and at_seven == pytest.approx([2 / 3, 0, 1]) and above == pytest.approx([1 / 3, 0, 1])
    thresholds, shares = everything.get_data()
    by_hand = {0.0: 5 / 5, 0.01: 4 / 5, 0.5: 4 / 5, 0.7: 3 / 5, 0.71: 2 / 5, 0.9: 1 / 5, 0.91: 0}
    at = dict(zip(thresholds.tolist(), shares.tolist(), strict=True))
    assert {threshold: at[threshold] for threshold in by_hand} == pytest.approx(by_hand)
    assert "test split (above: share of all 5 cases)" in texts(figure)
    figure.canvas.draw()  # the marks above the chart: their place is a threshold
    assert "≥ 0.5\n80%" in texts(figure) and "≥ 0.9\n20%" in texts(figure)


def test_volumes_by_hand():
    figure = figures.plot_volume(SCORES, "test")
    axes = figure.axes[0]
    drawn = np.concatenate([points.get_offsets() for points in axes.collections]).tolist()
    assert sorted(drawn) == [[3, 0], [10, 0.8], [200, 0.5], [1200, 0.7], [1500, 0.9]]
    assert axes.get_xscale() == "log" and "5 cases, test split" in axes.get_title()
    assert not axes.lines  # five cases are too few for a running median
    colors = [to_hex(points.get_facecolor()[0]) for points in axes.collections]
    assert colors == [styles.GROUP_STYLES[group].color for group in ("organs", "ribs", "other")]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 400), st.integers(0, 99))
def test_the_running_median_is_that_of_pandas(cases, seed):
    volume, dice = np.random.default_rng(seed).random((2, cases)).round(2)  # with ties
    volumes, medians, window = figures.running_median(volume, dice)
    table = pd.DataFrame({"volume": volume, "dice": dice}).sort_values("volume", kind="stable")
    expected = table.rolling(window).median().dropna()
    assert window % 2 == 1 and np.allclose(volumes, expected["volume"]) and np.allclose(medians, expected["dice"])


def test_subjects_by_hand():
    figure = figures.plot_subjects(SCORES, "test")
    top, bottom = figure.axes
    [_, (s1_from, s1_to), *_] = top.collections[0].get_segments()
    assert [s1_from[1], s1_to[1]] == pytest.approx([0.25, 0.7])  # quartiles of 0, .5, .9
    assert top.lines[0].get_ydata()[:2].tolist() == pytest.approx([0.75, 1.4 / 3])
    assert [bar.get_height() for bar in bottom.patches] == [0, 1, 0, -1, 0, -1]  # missed, then false alarms
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["s2 (2)", "s1 (3)", "s3 (0)"]
    for words in ("3 subjects, test split", "missed, Dice below 0.1 (1)", "false alarms (2)"):
        assert words in texts(figure)


def overlaps(figure, labels):
    """How many of these texts touch another one of them when they are drawn."""
    boxes = [label.get_window_extent(figure.canvas.get_renderer()) for label in labels if label.get_text()]
    return sum(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])


def test_ninety_subjects_have_labels_that_do_not_touch():
    names = official_names()[:5]
    table = table_of(*[(f"s{i:04d}", name, 0.5, 1.0, 5.0) for i in range(90) for name in names])
    figure = figures.plot_subjects(table, "test")
    figure.canvas.draw()
    assert overlaps(figure, figure.axes[1].get_xticklabels()) == 0


CHARTS = [figures.plot_distribution, figures.plot_success_rates, figures.plot_volume, figures.plot_subjects]


@pytest.mark.parametrize("chart", CHARTS)
def test_little_is_drawn_and_nothing_is_a_sentence(chart):
    all_missed = SCORES.assign(dice=0.0, detection="missed")
    for table in (SCORES[:1], SCORES[2:3], all_missed, SCORES[SCORES["subject"] == "s1"], NOTHING_HELD):
        figure = chart(table, "val")
        figure.canvas.draw()
        assert "val split" in texts(figure)
    for table in (NO_SCORES, SCORES.assign(dice=np.nan, hd95_mm=np.nan)):
        figure = chart(table, "val")
        figure.canvas.draw()
        assert "val split" in texts(figure)
    assert not figures.plot_distribution(SCORES[2:3], "val", "hd95_mm").axes  # only a sentence


def test_saved_whole(tmp_path):
    path = styles.save_figure(tmp_path / "a.png", figures.plot_success_rates(SCORES, "test"))
    assert Image.open(path).size[0] > 500 and list(tmp_path.iterdir()) == [path]
