import io
import json

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from segkit import check, demo, interactive, progress, training
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
    numbers = {"macro_dice": 0.5, "structures": 2, "subjects": 1, "found": 2, "missed": 0, "false_alarms": 0,
               "correctly_absent": 0}  # fmt: skip
    summary = {
        "split": "test",
        "prediction": numbers,
        "reference_through_target_shape": {**numbers, "macro_dice": None},
    }
    (outputs / "evaluation_summary_1.json").write_text(json.dumps(summary))
    (outputs / "staged" / "ct.b2nd").touch()
    demo.print_summary(outputs, 0.0, {"9. Training": 12.0})
    printed = capsys.readouterr().out
    assert "macro Dice 0.500" in printed and "no score" in printed and "9. Training" in printed
    assert "evaluation_summary_1.json" in printed and "ct.b2nd" not in printed
