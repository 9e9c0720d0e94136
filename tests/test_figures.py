import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from segkit import figures
from segkit.codes import encode
from segkit.evaluation import per_structure, score_subject
from segkit.labels import rgb_of


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def volume_of(**masks):
    masks = {name: np.array(mask) for name, mask in masks.items()}
    return encode(masks.items(), next(iter(masks.values())).shape)


def test_the_front_is_at_the_top_and_the_right_on_the_left():
    plane = np.zeros((4, 6))
    plane[3, 5] = 1  # canonical y grows to the front, x to the patient's right
    assert np.argwhere(figures.hang(plane)).tolist() == [[0, 0]]


def test_the_torso_hangs_as_radiologists_expect(torso_dir, tmp_path):
    from segkit.dataset import open_data

    data = open_data(torso_dir, tmp_path, progress=False)
    subject = data.staged["s0000"]
    labels = subject.labels(95)
    rows, columns = {}, {}
    for name in ("liver", "spleen", "autochthon_left", "aorta", "colon"):
        rows[name], columns[name] = np.argwhere(figures.hang(labels.mask(name))).mean(0)
    assert columns["liver"] < columns["aorta"] < columns["spleen"]  # liver on the left of the picture
    assert rows["autochthon_left"] > rows["aorta"] > rows["colon"]  # the back muscles at the bottom


def test_window_by_hand():
    assert figures.window(np.array([-500, -160, 40, 240, 900])).tolist() == [0, 0, 0.5, 1, 1]


def test_overlay_shows_the_structures_colour_and_the_mean_of_an_overlap():
    volume = volume_of(liver=[[1, 1, 0]], aorta=[[0, 1, 0]])
    picture = figures.overlay(np.full((1, 3), 40), volume, opacity=1.0)[:, ::-1][0] * 255
    liver, aorta = np.array(rgb_of("liver")), np.array(rgb_of("aorta"))
    assert np.allclose(picture[0], liver) and np.allclose(picture[1], (liver + aorta) / 2)
    assert np.allclose(picture[2], 127.5)
    assert np.allclose(figures.overlay(np.full((1, 3), 40), volume, opacity=0), 0.5)


def test_difference_by_hand():
    reference = volume_of(a=[[0, 1, 1, 0, 1, 1]], b=[[0, 0, 0, 0, 1, 0]], mine=[[1, 0, 0, 0, 0, 0]])
    prediction = volume_of(a=[[0, 1, 0, 1, 1, 0]], b=[[0, 0, 0, 0, 1, 1]])
    # background (`mine` is not looked for), agrees, missed, false alarm, agrees on both, another structure
    assert figures.difference(reference, prediction).tolist() == [[0, 1, 2, 3, 1, 4]]


def scores_of(subjects=3):
    random = np.random.default_rng(0)
    tables = []
    for number in range(subjects):
        names = ["liver", "spleen", "aorta", "rib_left_1", "vertebrae_L1", "my_own", "prostate"]
        reference = {n: random.random(60) < 0.5 for n in names[:-1]} | {"prostate": np.zeros(60)}
        prediction = {n: m ^ (random.random(60) < 0.1) for n, m in list(reference.items())[:-1]} | {
            "prostate": np.zeros(60)
        }
        tables.append(score_subject(f"s{number}", "test", volume_of(**reference), volume_of(**prediction)))
    return pd.concat(tables, ignore_index=True)


def texts(figure):
    return " | ".join(t.get_text() for t in figure.findobj(plt.Text))


def test_every_figure_names_its_split_and_its_numbers():
    scores = scores_of()
    distribution = figures.plot_distribution(scores, "test")
    assert "18 cases, test split" in texts(distribution) and "ribs (n = 3)" in texts(distribution)
    ranking = figures.plot_ranking(per_structure(scores), "val")
    assert "val split" in texts(ranking) and "liver (3)" in texts(ranking) and "prostate" not in texts(ranking)
    success = figures.plot_success_rates(scores, "test")
    assert "test split" in texts(success) and "all (18)" in texts(success)
    curve = success.axes[0].lines[0].get_ydata()
    assert curve[0] == 1 and (np.diff(curve) <= 0).all()


def test_a_ranking_of_117_structures_has_a_bar_each_in_its_colour():
    from matplotlib.colors import to_hex

    from segkit.labels import color_of, official_names

    table = pd.DataFrame({"structure": official_names(), "dice": np.linspace(1, 0, 117), "n": 2})
    figure = figures.plot_ranking(table, "test")
    bars = [bar for axes in figure.axes for bar in axes.patches]
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [color_of(name) for name in official_names()]


def test_history_with_and_without_scores():
    rows = [{"epoch": e, "train_loss": 1 / e, "val_loss": 2 / e, "val_dice": d} for e, d in ((1, None), (2, 0.4))]
    figure = figures.plot_history(rows)
    assert figure.axes[1].lines[0].get_ydata()[1] == 0.4 and len(figure.axes[0].lines) == 2


def test_slices_keep_their_proportions_in_mm_and_no_panel_is_empty(phantom_data):
    subject = next(iter(phantom_data.staged.values()))
    z = subject.shape[0] // 2
    sample = (subject.name, subject.hu(z), subject.labels(z), (5.0, 2.0))
    figure = figures.plot_slices([sample])
    assert figure.axes[0].get_aspect() == 2.5
    other = figures.plot_predictions(
        [(subject.name, subject.hu(z), subject.labels(z), subject.labels(z), (1.0, 1.0))], "x"
    )
    for each in (figure, other):
        buffer = io.BytesIO()
        each.savefig(buffer, format="png")
        assert np.asarray(Image.open(buffer)).std() > 5
        assert all(np.asarray(axes.images[0].get_array()).std() > 0.01 for axes in each.axes)


def test_saved_whole(tmp_path):
    path = figures.save_figure(tmp_path / "a.png", figures.plot_success_rates(scores_of(), "test"))
    assert Image.open(path).size[0] > 500 and list(tmp_path.iterdir()) == [path]
