import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from segkit import rankings
from segkit.comparison import ALL
from segkit.labels import group_of, official_names
from segkit.styles import GROUP_STYLES


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def texts(figure):
    return " | ".join(text.get_text() for text in figure.findobj(plt.Text) if text.get_text())


def overlaps(figure, labels):
    """How many of these texts touch another one of them when they are drawn."""
    boxes = [label.get_window_extent(figure.canvas.get_renderer()) for label in labels if label.get_text()]
    return sum(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])


def row_labels(figure):
    """Structures and printed values of all panels."""
    return [label for axes in figure.axes for label in [*axes.get_yticklabels(), *axes.texts]]


def ranking_of(names, dice, **columns):
    groups = [group_of(name) for name in names]
    return pd.DataFrame({"structure": list(names), "group": groups, "dice": dice, "n": 2} | columns)


def test_a_ranking_by_hand():
    table = ranking_of(
        ["rib_left_1", "liver", "spleen", "prostate"], [0.25, 0.9, 0.75, np.nan], n=[1, 3, 2, 0],
        dice_low=[np.nan, 0.8, 0.5, np.nan], dice_high=[np.nan, 0.95, 0.85, np.nan],
    )  # fmt: skip
    figure = rankings.plot_ranking(table, "val")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["liver (3)", "spleen (2)", "rib_left_1 (1)"]
    assert [text.get_text() for text in axes.texts] == ["0.90", "0.75", "0.25"]
    organs, ribs = axes.lines
    assert organs.get_xydata().tolist() == [[0.9, 0], [0.75, 1]] and ribs.get_xydata().tolist() == [[0.25, 2]]
    assert organs.get_color() == GROUP_STYLES["organs"].color and ribs.get_marker() == GROUP_STYLES["ribs"].marker
    intervals = [segment.tolist() for segment in axes.collections[1].get_segments()]
    assert intervals == [[[0.8, 0], [0.95, 0]], [[0.5, 1], [0.85, 1]], []]  # none of one subject
    for words in ("3 structures by mean Dice, val split", "line: 95 % interval", "not held by any subject: 1"):
        assert words in texts(figure)
    assert "interval" not in texts(rankings.plot_ranking(table.drop(columns=["dice_low", "dice_high"]), "val"))


def test_a_ranking_of_117_structures_has_each_once_and_no_texts_touch():
    dice = np.random.default_rng(0).random(117)
    table = ranking_of(official_names(), dice, n=89, dice_low=dice / 2, dice_high=(1 + dice) / 2)
    figure = rankings.plot_ranking(table, "test")
    figure.canvas.draw()
    drawn = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    best_first = table.sort_values("dice", ascending=False)["structure"]
    assert drawn == [f"{name} (89)" for name in best_first]
    assert overlaps(figure, row_labels(figure)) == 0


def comparison_of(names, first, second, half, **columns):
    table = ranking_of(names, first).rename(columns={"dice": "first"}).assign(second=second)
    table["difference"] = table["second"] - table["first"]
    return table.assign(low=table["difference"] - half, high=table["difference"] + half, **columns)


def test_a_comparison_by_hand():
    table = comparison_of([ALL, "liver", "spleen", "aorta", "colon"], [0.7, 0.5, 0.9, 0.7, 0.6],
                          [0.725, 0.8, 0.7, 0.6, 0.6], [0.05, 0.1, 0.1, 0.2, np.nan])  # fmt: skip
    figure = rankings.plot_comparison(table, ("mine", "theirs"))
    (axes,) = figure.axes
    # differences +.3, -.2, -.1 (its interval holds 0) and 0 (no interval)
    drawn = [label.get_text() for label in axes.get_yticklabels()]
    assert drawn == ["liver (2)", "colon (2)", "aorta (2)", "spleen (2)"]
    assert [text.get_text() for text in axes.texts] == ["+0.300", "+0.000", "-0.100", "-0.200"]
    zero, mine, theirs, unclear = axes.lines
    assert zero.get_xdata() == [0, 0]
    assert np.allclose(mine.get_xydata(), [[-0.2, 3]]) and mine.get_marker() == "<"
    assert np.allclose(theirs.get_xydata(), [[0.3, 0]]) and theirs.get_marker() == ">"
    assert np.allclose(unclear.get_xydata(), [[0, 1], [-0.1, 2]]) and unclear.get_markerfacecolor() == "white"
    assert axes.get_xlabel() == "← mine better      theirs better →"  # a positive difference is on the right
    assert axes.get_xlim()[0] == -axes.get_xlim()[1] < -0.4
    for words in ("Dice, theirs less mine: 4 structures", "mine better: 1", "theirs better: 1",
                  "interval holds 0, or none: 2", "all structures: +0.025 (-0.025 to +0.075)"):  # fmt: skip
        assert words in texts(figure)


def test_a_shorter_distance_is_the_better_one():
    figure = rankings.plot_comparison(comparison_of(["liver"], [5.0], [9.0], [1.0]), ("mine", "theirs"), "hd95_mm")
    assert figure.axes[0].get_xlabel() == "← theirs better      mine better →"
    assert "mine better: 1" in texts(figure) and "HD95 (mm), theirs less mine" in texts(figure)


def test_a_comparison_of_117_structures_with_long_names_has_no_texts_that_touch():
    random = np.random.default_rng(0)
    table = comparison_of(official_names(), random.random(117), random.random(117), random.random(117) / 2, n=89)
    figure = rankings.plot_comparison(
        table, ("checkpoint_epoch100_of_the_large_network", "nnU-Net 2D, trained by others")
    )
    figure.canvas.draw()
    assert overlaps(figure, row_labels(figure)) == 0
    assert overlaps(figure, [axes.xaxis.label for axes in figure.axes]) == 0


def pairs_of(*rows):
    return pd.DataFrame(rows, columns=["reference", "predicted", "relation", "ml", "share", "subjects"])


PAIRS = pairs_of(
    ("rib_left_2", "rib_left_3", "neighbouring level", 3.0, 0.4, 2),
    ("kidney_left", "kidney_right", "other side", 90.0, 0.6, 1),
    ("kidney_left", "nothing", "nothing", 15.0, 0.1, 3), ("nothing", "spleen", "nothing", 7.0, np.nan, 1),
    ("liver", "spleen", "same group", 1.0, 0.001, 1), ("liver", "nothing", "nothing", 900.0, 0.9, 3),
)  # fmt: skip


def cells(figure):
    """What each cell says, by reference and predicted."""
    axes = figure.axes[0]
    rows, columns = (
        [label.get_text() for label in labels()] for labels in (axes.get_yticklabels, axes.get_xticklabels)
    )
    return {(rows[y], columns[x]): text.get_text() for text in axes.texts for x, y in [text.get_position()]}


def test_confusions_by_hand():
    figure = rankings.plot_confusion(PAIRS, "test", most=2)
    assert cells(figure) == {
        ("kidney_left", "kidney_right"): "60 S\n1", ("rib_left_2", "rib_left_3"): "40 L\n2",
        ("kidney_left", "nothing"): "10\n3",
    }  # fmt: skip
    shares = figure.axes[0].images[0].get_array()
    assert np.allclose(shares.filled(-1), [[60, -1, 10], [-1, 40, -1]])
    assert "The worst 2 of 6 confusions, test split" in texts(figure)


def test_confusions_with_nothing_fill_up_what_is_left():
    assert rankings.worst_pairs(PAIRS, 4)["share"].tolist() == [0.6, 0.4, 0.001, 0.9]
    everything = cells(rankings.plot_confusion(PAIRS, "test"))
    assert len(everything) == 6 and everything["nothing", "spleen"] == "7 ml\n1"
    assert everything["liver", "spleen"] == "<1 G\n1" and everything["liver", "nothing"] == "90\n3"


def test_the_labels_of_many_confusions_do_not_touch():
    names = official_names()
    rows = [(names[i], names[116 - i], "other", 5.0, 0.9, 89) for i in range(20)]
    figure = rankings.plot_confusion(pairs_of(*rows), "test")
    figure.canvas.draw()
    assert overlaps(figure, figure.axes[0].get_yticklabels()) == 0 and overlaps(figure, figure.axes[0].texts) == 0
    places = [label.get_position()[0] for label in figure.axes[0].get_xticklabels()]
    assert places == list(range(20))


def test_little_is_drawn_and_nothing_is_a_sentence():
    nothing = ranking_of(["liver"], [np.nan], n=0)
    assert "val split: the reference holds no structure" in texts(rankings.plot_ranking(nothing, "val"))
    assert "no structure that both" in texts(rankings.plot_comparison(comparison_of([], [], [], []), ("a", "b")))
    assert "val split: no voxel" in texts(rankings.plot_confusion(PAIRS[:0], "val"))
    one = comparison_of(["liver"], [0.5], [0.5], [np.nan])
    of_one = comparison_of([ALL, "liver"], [0.5, 0.5], [0.6, 0.6], [np.nan, np.nan])
    said = texts(rankings.plot_comparison(of_one, ("a", "b")))
    assert "all structures: +0.100" in said and "nan" not in said
    missed_only = PAIRS[PAIRS["predicted"] == "nothing"]
    for figure in (
        rankings.plot_ranking(ranking_of(["my_own"], [0.0]), "val"),
        rankings.plot_comparison(one, ("a", "b")),
        rankings.plot_confusion(PAIRS[:1], "val"),
        rankings.plot_confusion(missed_only, "val"),
        rankings.plot_confusion(PAIRS[3:4], "val"),
    ):
        figure.canvas.draw()
        assert figure.axes
