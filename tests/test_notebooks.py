"""Both notebooks run as they are, on phantoms without a path and on the real torso, with every file they promise."""

import ast
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from bs4 import BeautifulSoup
from conftest import CHROMIUM, ROOT
from PIL import Image

NOTEBOOKS = ("train_unet", "segmentation_detection_analysis")
QUICK = {
    "EPOCHS": 1, "TARGET_SHAPE": [32, 32], "FEATURES": [4, 8], "SLICES_PER_EPOCH": 16, "VALIDATION_SLICES": 8,
    "DEVICE": "cpu", "JOBS": 1,
}  # fmt: skip
FILES = (
    "label_map.json", "checkpoint_epoch1.pth", "training_history.json", "training_history.png",
    "evaluation_results_*.csv", "evaluation_summary_*.json", "evaluation_confusion_*.csv", "metrics_distribution_*.png",
    "structure_ranking_*.png", "success_rates_*.png", "dice_by_volume_*.png", "subject_overview_*.png",
    "confusion_*.png", "best_median_worst_*.png", "segmentation_visualization_*.png", "3d_*_*.html", "report_*.html",
)  # fmt: skip


def run(name, output_dir, **parameters):
    """Execute a notebook through papermill in a folder that is not the project's root; returns the executed one."""
    (output_dir / "notebooks").mkdir(exist_ok=True)
    target = output_dir / "notebooks" / f"{name}.ipynb"
    papermill.execute_notebook(
        str(ROOT / "notebooks" / f"{name}.ipynb"), str(target), {"OUTPUT_DIR": str(output_dir), **parameters},
        cwd=str(ROOT / "notebooks"), kernel_name="python3", progress_bar=False,
    )  # fmt: skip
    return nbformat.read(target, 4)


def printed(notebook) -> str:
    return "".join(
        o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"
    )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_without_outputs_with_one_configuration_cell_and_short_cells(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    [configuration] = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    # nothing derived: every line is a literal, so that papermill can replace any of them
    values = ast.parse(configuration.source).body
    assert all(isinstance(line, ast.Assign) for line in values)
    assert [ast.literal_eval(line.value) for line in values]
    # one setting a line, each with what it means
    assert all("#" in line or line.startswith("EPOCHS") or "THRESHOLDS" in line for line in
               configuration.source.splitlines())  # fmt: skip
    assert all(cell.source.count("\n") <= 25 for cell in code)
    headings = [
        c.source.splitlines()[0] for c in notebook.cells if c.cell_type == "markdown" and c.source.startswith("## ")
    ]
    assert [int(h.split()[1].rstrip(".")) for h in headings] == list(range(1, len(headings) + 1))


def test_the_configuration_has_the_defaults_that_the_readme_states():
    source = next(
        cell.source for cell in nbformat.read(ROOT / "notebooks" / "train_unet.ipynb", 4).cells
        if "parameters" in cell.metadata.get("tags", [])
    )  # fmt: skip
    values = {}
    exec(source, values)
    expected = {"DATA_DIR": None, "EPOCHS": 5, "BATCH_SIZE": 8, "LEARNING_RATE": 4e-3, "TARGET_SHAPE": (256, 256),
                "FEATURES": (32, 64, 128, 256)}  # fmt: skip
    assert {name: values[name] for name in expected} == expected


@pytest.fixture(scope="module")
def on_phantoms(tmp_path_factory):
    """A folder with all that both notebooks leave without data, in the places of the demo, and what they printed."""
    folder = tmp_path_factory.mktemp("outputs")
    trained = run("train_unet", folder, PHANTOM_SUBJECTS=3, PHANTOM_DETAIL=0.35, **QUICK)
    scan = next(folder.glob("phantoms_*/s*/ct.nii.gz"))
    judged = run("segmentation_detection_analysis", folder, DEVICE="cpu", JOBS=1, OWN_SCAN=str(scan))
    return folder, trained, judged


def test_without_data_both_notebooks_run_on_phantoms_and_say_so(on_phantoms):
    folder, trained, judged = on_phantoms
    assert "DATA_DIR is None: working on synthetic CT subjects (phantoms)" in printed(trained)
    assert "epoch 1/1: loss" in printed(trained)
    assert "macro Dice" in printed(judged)
    scan = next(folder.glob("phantoms_*/s*/ct.nii.gz"))
    [own] = folder.glob(f"segmentations_*/{scan.parent.name}")
    ends = {path.name.removeprefix(scan.parent.name) for path in own.iterdir()}
    assert ends == {"_labels.nii.gz", "_labels.json", "_3d.html", "_structures.csv", "_uncertainty.nii.gz"}
    for pattern in FILES:
        assert len(list(folder.glob(pattern))) == 1, pattern
    shown = [output.get("data", {}) for cell in judged.cells for output in cell.get("outputs", [])]
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shown)


@pytest.fixture(scope="module")
def make_docs():
    """The module docs/make_docs.py."""
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "docs" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_docs_renders_a_run_with_its_pictures_and_without_places(on_phantoms, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no chromium: no picture of the 3D page")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train_unet_99_9.png").touch()  # of an older run
    (tmp_path / "images" / "benchmarks.png").touch()  # another command's
    script = [sys.executable, ROOT / "docs" / "make_docs.py", "--outputs", on_phantoms[0], "--docs", tmp_path]
    made = subprocess.run(script, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "it runs first" not in made.stdout and "MiB in all" in made.stdout
    linked = {"training_history.png", "sample_predictions.png", "structure_ranking.png", "best_median_worst.png",
              "segmentation_visualization.png", "3d.png"}  # fmt: skip
    for name, pictures in (("train_unet", 6), ("segmentation_detection_analysis", 12)):
        page = (tmp_path / f"{name}.md").read_text()
        own = set(re.findall(rf"images/({name}_\d+_\d+\.png)", page))
        assert len(own) == pictures and (name == "train_unet") != ("(images/3d.png)" in page)
        linked |= own
        for place in (str(on_phantoms[0]), str(ROOT), str(Path.home())):
            assert place not in page
        assert "<style" not in page and "widget" not in page and "batch/s" not in page and "\nError" not in page
        assert all(f"## {number}. " in page for number in range(1, 12))
        tables = BeautifulSoup(page, "html.parser").find_all("table")
        assert len(tables) >= 3 and max(len(table.find("tbody").find_all("tr")) for table in tables) == 12
    (tmp_path / "images" / "benchmarks.png").unlink()  # was left alone
    assert {path.name for path in (tmp_path / "images").iterdir()} == linked
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "images").iterdir()}
    assert all(300 < width <= 1400 for width, _ in sizes.values()) and sizes["3d.png"] == (1200, 800)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 5 * 2**20
    # the slice browser as it stood, the 3D page with its meshes
    colors = {name: len(Image.open(tmp_path / "images" / name).convert("RGB").getcolors(1 << 20)) for name in linked}
    assert colors["3d.png"] > 100 and min(colors.values()) > 16


def test_rare_colours_survive_in_the_pictures_of_make_docs(make_docs, tmp_path):
    """A CT has all greys, and more pixels than the few that show an organ or an error."""
    rows = np.random.default_rng(0).integers(0, 256, (300, 400, 1), np.uint8).repeat(3, 2)
    rows[::2] //= np.array([1, 2, 3], np.uint8)  # tinted, so that greys alone do not fill the palette
    colors = np.array([(0, 158, 115), (213, 94, 0), (86, 180, 233), (240, 228, 66), (255, 0, 255), (0, 255, 0)])
    for n, color in enumerate(colors):
        rows[10 + 20 * n : 14 + 20 * n, 10:40] = color
    image = io.BytesIO()
    Image.fromarray(rows).save(image, "PNG")
    shown = np.asarray(Image.open(make_docs.shrink(image.getvalue(), tmp_path / "a.png")).convert("RGB"))
    assert np.abs(shown.astype(int) - rows).max() <= 40
    for n, color in enumerate(colors):
        assert np.abs(shown[11 + 20 * n, 20].astype(int) - color).max() <= 24


def test_make_docs_takes_no_run_of_older_notebooks(on_phantoms, make_docs, tmp_path):
    assert make_docs.is_run_of(on_phantoms[0], ROOT / "notebooks")
    assert not make_docs.is_run_of(tmp_path, ROOT / "notebooks")
    newer = shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    path = newer / "train_unet.ipynb"
    path.write_text(path.read_text().replace("Look before you train", "Look first"))
    assert not make_docs.is_run_of(on_phantoms[0], newer)


def test_on_the_real_torso(torso_dir, tmp_path):
    run("train_unet", tmp_path, DATA_DIR=str(torso_dir), **{**QUICK, "EPOCHS": 2})
    run("segmentation_detection_analysis", tmp_path, DEVICE="cpu", JOBS=1)
    for pattern in FILES:
        assert len(list(tmp_path.glob(pattern))) == 1, pattern
    scores = pd.read_csv(next(tmp_path.glob("evaluation_results_*.csv")))
    assert set(scores["split"]) == {"val"} and len(scores) == 117
    # 61 structures are in the scan, some of them only in slabs that train
    assert 55 <= scores["present"].sum() <= 61
    split = json.loads((tmp_path / "split.json").read_text())
    assert "one subject: slabs" in split["source"] and split["data_dir"] == str(torso_dir.resolve())
