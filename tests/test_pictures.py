import io
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from matplotlib.colors import to_rgb
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from segkit import pictures
from segkit.codes import encode
from segkit.labels import rgb_of
from segkit.splits import Part


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
    assert np.argwhere(pictures.hang(plane)).tolist() == [[0, 0]]


def test_the_torso_hangs_as_radiologists_expect(torso_dir, tmp_path):
    from segkit.dataset import open_data

    data = open_data(torso_dir, tmp_path, progress=False)
    subject = data.staged["s0000"]
    labels = subject.labels(95)
    rows, columns = {}, {}
    for name in ("liver", "spleen", "autochthon_left", "aorta", "colon"):
        rows[name], columns[name] = np.argwhere(pictures.hang(labels.mask(name))).mean(0)
    assert columns["liver"] < columns["aorta"] < columns["spleen"]  # liver on the left of the picture
    assert rows["autochthon_left"] > rows["aorta"] > rows["colon"]  # the back muscles at the bottom


def test_windows_by_hand():
    assert pictures.window(np.array([-500, -160, 40, 240, 900])).tolist() == [0, 0, 0.5, 1, 1]
    assert pictures.window(np.array([-1350, -600, 150]), pictures.WINDOWS["lung"]).tolist() == [0, 0.5, 1]
    assert pictures.window(np.array([-500, 400, 1300]), pictures.WINDOWS["bone"]).tolist() == [0, 0.5, 1]


def test_overlay_shows_the_structures_colour_and_the_mean_of_an_overlap():
    volume = volume_of(liver=[[1, 1, 0]], aorta=[[0, 1, 0]])
    picture = pictures.overlay(np.full((1, 3), 40), volume, opacity=1.0)[:, ::-1][0] * 255
    liver, aorta = np.array(rgb_of("liver")), np.array(rgb_of("aorta"))
    assert np.allclose(picture[0], liver) and np.allclose(picture[1], (liver + aorta) / 2)
    assert np.allclose(picture[2], 127.5)
    assert np.allclose(pictures.overlay(np.full((1, 3), 40), volume, opacity=0), 0.5)
    assert np.allclose(pictures.overlay(np.full((1, 3), -600), volume, 0, pictures.WINDOWS["lung"]), 0.5)


def test_difference_by_hand():
    reference = volume_of(a=[[0, 1, 1, 0, 1, 1]], b=[[0, 0, 0, 0, 1, 0]], mine=[[1, 0, 0, 0, 0, 0]])
    prediction = volume_of(a=[[0, 1, 0, 1, 1, 0]], b=[[0, 0, 0, 0, 1, 1]])
    # background (`mine` is not looked for), agrees, missed, false alarm, agrees on both, another structure
    assert pictures.difference(reference, prediction).tolist() == [[0, 1, 2, 3, 1, 4]]
    # a lesion inside an organ: missed, falsely found, both right; called the other one where there is no other
    organ, lesion = [[1, 1, 1, 0, 1]], [[1, 0, 1, 1, 0]]
    reference = volume_of(liver=organ, liver_lesion=lesion)
    prediction = volume_of(liver=[[1, 1, 1, 1, 0]], liver_lesion=[[0, 1, 1, 0, 1]])
    assert pictures.difference(reference, prediction).tolist() == [[2, 3, 1, 4, 4]]


def test_slices_are_spread_over_what_is_shown():
    volume = volume_of(liver=np.arange(9)[:, None, None] > 2, bladder=np.arange(9)[:, None, None] < 2)
    part = Part("s0")
    assert pictures.spread_slices(volume, part, 8) == [8, 7, 6, 5, 4, 3, 1, 0]
    assert pictures.spread_slices(pictures.only(volume, ["bladder"]), part, 8) == [1, 0]
    assert pictures.spread_slices(pictures.only(volume, []), part, 3) == [7, 4, 1]  # nothing to look for: all slices


def test_the_difference_picture_by_hand():
    reference, prediction = volume_of(a=[[0, 1, 1]]), volume_of(a=[[0, 1, 0]])
    right, middle, left = pictures.difference_picture(np.full((1, 3), 40), reference, prediction)[0]  # hung
    assert np.allclose(left, 0.5) and np.allclose(middle, 0.75 * 0.5 + 0.25 * np.array(to_rgb("#009e73")))
    assert np.allclose(right, 0.1 * 0.5 + 0.9 * np.array(to_rgb("#d55e00")))


COLOR_VISION = {  # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
    "usual": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def as_seen(rgb, vision):
    """CIELAB of colours (..., 3) as someone with this colour vision sees them."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(COLOR_VISION[vision]).T, 0, 1)
    return rgb2lab(np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize("vision", COLOR_VISION)
def test_kinds_of_difference_and_outlines_are_told_apart_by_every_colour_vision(vision):
    grey = np.linspace(0, 1, 5)[:, None]  # what lies below
    kinds = [
        as_seen((1 - alpha) * grey + alpha * np.array(to_rgb(color)), vision)
        for _, color, alpha in pictures.DIFFERENCE_LOOKS.values()
    ]
    for first, one in enumerate(kinds):
        for other in kinds[:first]:
            assert deltaE_ciede2000(one[:, None], other[None]).min() > 9  # 2.3 can just be noticed
    truth, prediction = (as_seen(np.array(to_rgb(color)), vision) for color, _ in pictures.OUTLINES.values())
    assert deltaE_ciede2000(truth, prediction) > 30


def area(line):
    """The area inside a closed line of (column, row) points (shoelace formula), its sign the direction."""
    x, y = line.T
    return 0.5 * np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])


def test_outlines_by_hand():
    plane = np.zeros((5, 7), bool)
    plane[3:5, 4:7] = True  # touches two borders; hung it is rows 0-1, columns 0-2
    (line,) = pictures.outlines(volume_of(liver=plane, aorta=np.zeros((5, 7))))
    assert (line[0] == line[-1]).all() and abs(area(line)) == 6 - 4 * 0.125  # pixels less the cut corners
    assert line.min(0).tolist() == [-0.5, -0.5] and line.max(0).tolist() == [2.5, 1.5]


@settings(max_examples=30, deadline=None)
@given(arrays(bool, (6, 7)), arrays(bool, (6, 7)))
def test_each_structure_has_its_own_closed_outlines_that_hold_its_pixels(first, second):
    volume = volume_of(liver=first, aorta=second)
    lines = pictures.outlines(volume)
    assert all((line[0] == line[-1]).all() for line in lines)
    columns, rows = np.meshgrid(np.arange(7), np.arange(6))
    crossings = np.zeros((6, 7), int)
    for line in lines:  # a pixel is inside where a ray to the right crosses the outlines an odd number of times
        for (x0, y0), (x1, y1) in pairwise(line):
            between = (y0 > rows + 0.01) != (y1 > rows + 0.01)
            with np.errstate(divide="ignore", invalid="ignore"):
                crossings += between & (columns < x0 + (rows + 0.01 - y0) / (y1 - y0) * (x1 - x0))
    assert (crossings % 2 == pictures.hang(first ^ second)).all()


def test_slices_keep_their_proportions_in_mm_and_no_panel_is_empty(phantom_data):
    subject = next(iter(phantom_data.staged.values()))
    z = subject.shape[0] // 2
    hu, labels = subject.hu(z), subject.labels(z)
    figure = pictures.plot_slices([(subject.name, hu, labels, (5.0, 2.0))])
    assert figure.axes[0].get_aspect() == 2.5
    other = pictures.plot_predictions([(subject.name, hu, labels, labels, (1.0, 1.0))], "x")
    for each in (figure, other):
        buffer = io.BytesIO()
        each.savefig(buffer, format="png")
        assert np.asarray(Image.open(buffer)).std() > 5
        assert all(np.asarray(axes.images[0].get_array()).std() > 0.01 for axes in each.axes)


def test_predictions_show_both_outlines_on_the_ct_and_every_kind_in_the_legend():
    reference, prediction = volume_of(liver=[[0, 1, 1]] * 3), volume_of(liver=[[1, 1, 0]] * 3, aorta=[[0, 0, 1]] * 3)
    figure = pictures.plot_predictions([("s1, slice 3", np.zeros((3, 3)), reference, prediction, (1, 1))], "s1 (test)")
    truth, dashed = figure.axes[0].collections
    assert len(truth.get_segments()) == 1 and len(dashed.get_segments()) == 2
    assert truth.get_linestyle()[0][1] is None and dashed.get_linestyle()[0][1] is not None
    labels = [text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    assert labels == ["ground truth", "prediction", "agrees", "missed", "false alarm", "other structure"]


def test_no_slices_are_a_sentence():
    for figure in (pictures.plot_slices([]), pictures.plot_predictions([], "x")):
        assert figure.texts[0].get_text() == "no slices to show"
