import io
import json
import sys
from types import SimpleNamespace

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from segkit import check, demo, interactive, pictures, progress, training
from segkit.codes import encode
from segkit.errors import SegkitError
from segkit.labels import rgb_of
from segkit.settings import TrainSettings


def volume_of(**masks):
    return encode(masks.items(), next(iter(masks.values())).shape)


def controls(box, kind):
    """All widgets of a kind inside a box."""
    found = [box] if isinstance(box, kind) else []
    for child in getattr(box, "children", ()):
        found += controls(child, kind)
    return found


def has_color(png: bytes, name: str) -> bool:
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return bool((np.abs(picture - rgb_of(name)).max(2) < 3).any())


def test_the_slice_browser_follows_its_controls():
    liver, aorta = np.zeros((5, 20, 20), bool), np.zeros((5, 20, 20), bool)
    liver[2, 2:8, 2:8], aorta[2:4, 12:18, 12:18] = True, True
    reference = volume_of(liver=liver, aorta=aorta)
    box = interactive.slice_browser("s0", np.zeros((5, 20, 20), np.int16), {"ground truth": reference}, (5.0, 1.0, 1.0))
    [position], [opacity], [chosen] = (
        controls(box, kind) for kind in (widgets.IntSlider, widgets.FloatSlider, widgets.SelectMultiple)
    )
    [picture] = controls(box, widgets.Image)
    assert (position.min, position.value, position.max) == (0, 2, 4) and list(chosen.options) == ["aorta", "liver"]
    opacity.value = 1.0
    assert has_color(picture.value, "liver") and has_color(picture.value, "aorta")
    chosen.value = ("aorta",)
    assert not has_color(picture.value, "liver") and has_color(picture.value, "aorta")
    position.value = 4
    assert not has_color(picture.value, "aorta")


def test_another_plane_has_its_own_slices():
    aorta = np.zeros((5, 20, 30), bool)
    aorta[1:4, 8:13, 12:18] = True
    hu = np.zeros((5, 20, 30), np.int16)
    box = interactive.slice_browser("s0", hu, {"truth": volume_of(aorta=aorta)}, (5.0, 1.0, 1.0))
    [plane], [position], [outlines] = (
        controls(box, kind) for kind in (widgets.ToggleButtons, widgets.IntSlider, widgets.Checkbox)
    )
    [picture] = controls(box, widgets.Image)
    plane.value = "sagittal"
    assert (position.value, position.max) == (15, 29)
    position.value = 29
    plane.value = "coronal"
    assert (position.value, position.max) == (10, 19)
    before = picture.value
    outlines.value = True
    assert picture.value != before


def picture_of(**changes):
    """The colours of a rendered phantom of corners, each a structure, in the middle slice of a plane."""
    shape = (24, 20, 16)  # z, y, x
    masks = {"liver": np.zeros(shape, bool), "aorta": np.zeros(shape, bool)}
    masks["liver"][18:, 15:, 12:] = True  # head, front, right... of the patient's side to which x grows
    masks["aorta"][:4, :4, :4] = True  # feet, back, the other side
    view = interactive.View(opacity=1.0, **changes)
    volume = volume_of(**masks)
    png = interactive.render("s0", np.full(shape, -2000, np.int16), {"truth": volume}, (2.0, 1.0, 1.0), view)
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    dark = (picture < 3).all(2)  # the air of the scan; letters of the titles are dark too, but few
    (top, *_, bottom), (left, *_, right) = (
        np.flatnonzero(dark.sum(axis) > 0.4 * dark.sum(axis).max()) for axis in (1, 0)
    )

    def middle(name):
        """Where the structure's colour lies in the picture, 0..1 down and to the right; None where it is not."""
        found = np.argwhere(np.abs(picture - rgb_of(name)).max(2) < 3)
        return None if not len(found) else (found.mean(0) - (top, left)) / (bottom - top, right - left)

    return middle, (bottom - top) / (right - left)


@pytest.mark.parametrize(
    ("plane", "high", "low", "liver", "aorta", "proportion"),
    [  # places are (down, to the right): the patient's right is at the left, the front at the top or the left
        ("axial", 20, 1, (0.125, 0.125), (0.9, 0.875), 20 / 16),
        ("coronal", 17, 1, (0.125, 0.125), (0.917, 0.875), 48 / 16),
        ("sagittal", 14, 1, (0.125, 0.125), (0.917, 0.9), 48 / 20),
    ],
)
def test_planes_are_hung_as_radiologists_do_with_true_proportions(plane, high, low, liver, aorta, proportion):
    above, shape = picture_of(plane=plane, position=high)
    below, _ = picture_of(plane=plane, position=low)
    assert np.allclose(above("liver"), liver, atol=0.04) and above("aorta") is None
    assert np.allclose(below("aorta"), aorta, atol=0.04) and below("liver") is None
    assert shape == pytest.approx(proportion, rel=0.03)


def test_letters_name_the_sides():
    # x grows to the patient's right, y to the front, z to the head; every picture is turned by 180 degrees
    grows = "HAR"
    opposite = dict(zip("HARFPL", "FPLHAR", strict=True))
    for axis, (left, right, top, bottom) in interactive.PLANES.values():
        rows, columns = (letter for place, letter in enumerate(grows) if place != axis)
        assert (left, right, top, bottom) == (columns, opposite[columns], rows, opposite[rows])


def test_an_outline_is_the_rim_of_each_structure_that_is_shown():
    inside = np.zeros((9, 9), bool)
    inside[2:7, 2:7] = True
    rim = inside.copy()
    rim[3:6, 3:6] = False
    outside = np.zeros((9, 9), bool)
    outside[2:7, [1, 7]] = True
    outside[[1, 7], 2:7] = True
    volume = volume_of(liver=inside, spleen=np.eye(9, dtype=bool))
    assert np.array_equal(interactive._edges(pictures.only(volume, ("liver",))), rim | outside)
    assert not interactive._edges(pictures.only(volume, ())).any()


def test_windows_reach_the_grey_of_the_picture():
    hu = np.full((3, 8, 8), -600, np.int16)
    empty = volume_of(liver=np.zeros(hu.shape, bool))
    for name, grey in (("lung", 128), ("bone", 0), ("brain", 0)):
        png = interactive.render("s", hu, {"truth": empty}, (1, 1, 1), interactive.View(position=1, window=name))
        picture = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
        assert abs(int(picture[picture.shape[0] * 2 // 5, picture.shape[1] * 2 // 5]) - grey) <= 1


def test_niivue_is_given_the_files_where_it_is_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ipyniivue", None)
    assert "pip install -e '.[viewer]'" in interactive.niivue(tmp_path / "ct.nii.gz").value
    calls = []

    class NiiVue:
        def load_volumes(self, volumes):
            calls.append(volumes)

    monkeypatch.setitem(sys.modules, "ipyniivue", SimpleNamespace(NiiVue=NiiVue))
    viewer = interactive.niivue(tmp_path / "ct.nii.gz", [tmp_path / "liver.nii.gz"], opacity=0.3)
    [[ct, liver]] = calls
    assert isinstance(viewer, NiiVue) and ct["path"] == str(tmp_path / "ct.nii.gz")
    assert (ct["cal_min"], ct["cal_max"]) == (-160, 240)
    assert liver["path"] == str(tmp_path / "liver.nii.gz") and liver["opacity"] == 0.3


def test_progress_is_drawn_after_each_epoch_and_shown_in_one_place(phantom_data, tmp_path, monkeypatch):
    shown, pictures = [], []

    class Place:
        def __init__(self, content):
            shown.append(content)

        def update(self, content):
            shown.append(content)

    monkeypatch.setattr(interactive, "display", lambda content, display_id: Place(content))
    live = interactive.LiveProgress(progress.Progress(phantom_data, tmp_path, "cpu", slices=2))

    def watch(history):
        live(history)
        pictures.append(
            [(tmp_path / f"{name}.png").read_bytes() for name in ("training_history", "sample_predictions")]
        )

    settings = TrainSettings(
        epochs=2, target_shape=(32, 32), features=(4, 8), slices_per_epoch=8, validation_slices=6, device="cpu"
    )
    training.train(phantom_data, settings, tmp_path, watch, progress=False)
    assert len(shown) == 6 and "worst structures" in shown[4].to_html()
    assert all(before != after for before, after in zip(*pictures, strict=True)) and not plt.get_fignums()


def test_what_a_section_was_run_with_is_remembered(tmp_path):
    names = {"EXCLUDE": [], "SEED": 0, "EPOCHS": 5}
    read = tmp_path / "split.json"
    opened = interactive.Remembered("7", names, ["EXCLUDE", "SEED"], [read])
    names["EPOCHS"] = 6  # the section did not read it
    opened.check(names)
    names["EXCLUDE"].append("s0001")  # the same list, changed in place
    with pytest.raises(SegkitError, match=r"changed since section 7 was run: EXCLUDE = \['s0001'\], it was \[\]\. Run"):
        opened.check(names)
    names["EXCLUDE"].clear()
    read.touch()
    with pytest.raises(SegkitError, match=r"section 7 was run: .*split.json was written anew"):
        opened.check(names)


def test_the_history_of_each_member_by_hand():
    row = {"epoch": 1, "train_loss": 0.5, "val_dice_of": {"liver": 0.5}}
    table = progress.history_table([[row, {**row, "epoch": 2}], [row]])
    assert list(table.index) == [(1, 1), (1, 2), (2, 1)] and list(table.columns) == ["train_loss"]
    assert progress.history_table([[]]).empty and progress.history_table([]).index.names == ["member", "epoch"]
    assert row["val_dice_of"]  # the history itself stays whole


def test_the_worst_structures_of_the_last_epoch_come_first():
    rows = [
        {"epoch": 1, "val_dice_of": {"liver": 0.5, "aorta": 0.1, "spleen": 0.3}},
        {"epoch": 2, "val_dice_of": {"liver": 0.2, "aorta": 0.6, "spleen": 0.4}},
        {"epoch": 3, "val_dice_of": {}},  # interrupted
    ]
    table = progress.worst_structures(rows, count=2)
    assert list(table.index) == ["liver", "spleen"] and list(table.columns) == ["epoch 1", "epoch 2"]
    assert table.loc["liver"].tolist() == [0.5, 0.2]
    assert progress.worst_structures(rows[2:]).empty


def test_a_page_is_shown_from_its_file_beside_the_notebook(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert interactive.show_page(tmp_path / "3d.html").src == "../3d.html"


def test_the_installation_check_measures_a_step_and_names_what_is_missing(capsys, monkeypatch):
    check.check_installation()
    printed = capsys.readouterr().out
    assert "device: cpu" in printed or "device: cuda" in printed
    assert "training step" in printed and "works" in printed
    monkeypatch.setattr(check, "PACKAGES", ("numpy", "no-such-package"))
    with pytest.raises(SegkitError, match="missing: no-such-package"):
        check.check_installation()


def test_seconds_of_a_stage_are_those_of_the_cells_below_its_heading():
    def code(seconds):
        return {"cell_type": "code", "source": ["x"], "metadata": {"papermill": {"duration": seconds}}}

    cells = [
        {"cell_type": "markdown", "source": ["## 1. Data\n", "text"], "metadata": {}},
        code(2.0), code(3.0),
        {"cell_type": "markdown", "source": ["## 2. Training"], "metadata": {}},
        code(10.0), code(None),
    ]  # fmt: skip
    assert demo.stage_seconds({"cells": cells}) == {"1. Data": 5.0, "2. Training": 10.0}


def test_the_summary_of_the_demo_wherever_the_clone_lies(tmp_path, capsys):
    outputs = tmp_path / "phantoms" / "runs" / "outputs"
    (outputs / "staged").mkdir(parents=True)
    numbers = {"macro_dice": 0.5, "macro_dice_low": 0.4, "macro_dice_high": 0.6, "structures": 2, "subjects": 1,
               "found": 2, "missed": 0, "false_alarms": 0, "correctly_absent": 0}  # fmt: skip
    summary = {
        "split": "test",
        "prediction": numbers,
        "reference_through_target_shape": {**numbers, "macro_dice": None},
    }
    (outputs / "evaluation_summary_1.json").write_text(json.dumps(summary))
    (outputs / "staged" / "ct.b2nd").touch()
    demo.print_summary(outputs, 0.0, {"9. Training": 12.0})
    printed = capsys.readouterr().out
    assert (
        "macro Dice 0.500 (95 % interval 0.400 to 0.600)" in printed
        and "no score" in printed
        and "9. Training" in printed
    )
    assert "evaluation_summary_1.json" in printed and "ct.b2nd" not in printed
