import csv
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

VERBS = ("phantom", "download", "audit", "stage", "train", "evaluate", "compare", "predict", "share", "demo", "check")


def segkit(*arguments, cwd, ok=True):
    """Run `python -m segkit` as a user does; its output."""
    done = subprocess.run(
        [sys.executable, "-m", "segkit", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_explains_every_verb_and_flag(verb):
    text = segkit(*([verb] if verb else []), "--help", cwd=ROOT)
    assert "usage: python -m segkit" in text
    if not verb:
        assert all(name in text for name in VERBS)


def test_the_verbs_one_after_the_other(tmp_path):
    segkit("phantom", "data", "--subjects", 4, "--seed", 2, "--detail", 0.35, cwd=tmp_path)
    out = segkit("stage", "data", cwd=tmp_path)
    assert "4 subjects, 117 structures" in out
    segkit(
        "train", "data", "--epochs", 1, "--target-shape", 32, 32, "--features", 4, 8, "--slices-per-epoch", 16,
        "--validation-slices", 8, "--device", "cpu", cwd=tmp_path,
    )  # fmt: skip
    out = segkit("evaluate", "--max-subjects", 1, "--device", "cpu", cwd=tmp_path)
    assert "macro Dice" in out and "resampled to TARGET_SHAPE and back" in out
    outputs = tmp_path / "outputs"
    for pattern in (
        "checkpoint_epoch1.pth", "training_history.png", "evaluation_results_*.csv", "evaluation_summary_*.json",
        "evaluation_confusion_*.csv", "metrics_distribution_*.png", "structure_ranking_*.png", "success_rates_*.png",
        "dice_by_volume_*.png", "subject_overview_*.png", "confusion_*.png", "best_median_worst_*.png",
        "segmentation_visualization_*.png", "3d_s000?_*.html", "report_*.html",
    ):  # fmt: skip
        assert len(list(outputs.glob(pattern))) == 1, pattern
    summary = json.loads(next(outputs.glob("evaluation_summary_*.json")).read_text())
    assert summary["split"] == "test" and summary["prediction"]["subjects"] == 1
    assert set(summary["means"]) == {"segkit", "totalsegmentator", "nnunet"}
    out = segkit("share", "shared", "--data-licence", "CC BY 4.0", cwd=tmp_path)
    assert "model.safetensors" in out and "README.md" in out
    card = (tmp_path / "shared" / "README.md").read_text()
    assert f"macro Dice {summary['prediction']['macro_dice']:.3f}" in card and str(tmp_path) not in card
    assert "another data set" not in card
    [table] = outputs.glob("evaluation_results_*.csv")
    scored = {row["structure"]: row for row in csv.DictReader(table.open())}
    subject = next(iter(scored.values()))["subject"]
    segkit(
        "predict", f"data/{subject}/ct.nii.gz", "--checkpoint", "shared", "--out", "own", "--format", "csv", "masks",
        "--device", "cpu", cwd=tmp_path,
    )  # fmt: skip
    measured = csv.DictReader((tmp_path / "own" / subject / f"{subject}_structures.csv").open())
    voxels = {row["structure"]: row["voxels"] for row in measured}
    assert all(voxels[name] == row["predicted_voxels"] for name, row in scored.items())  # as it was evaluated
    assert len(list((tmp_path / "own" / subject / "segmentations").iterdir())) == len(voxels) == 117
    assert "holds files already" in segkit("predict", f"data/{subject}", "--out", "own", cwd=tmp_path, ok=False)
    shutil.copy(table, tmp_path / "again.csv")
    segkit("compare", table, "again.csv", "--names", "one", "two", cwd=tmp_path)
    assert len(list(outputs.glob("comparison_2_*.png"))) == 1
    [compared] = outputs.glob("comparison_*.csv")
    rows = list(csv.DictReader(compared.open()))
    assert rows[0]["structure"] == "all structures" and {float(row["difference"]) for row in rows} == {0.0}
    assert "1 names for 2 tables" in segkit("compare", table, table, "--names", "one", cwd=tmp_path, ok=False)
    assert "two tables are called the same" in segkit("compare", table, table, cwd=tmp_path, ok=False)


def test_a_damaged_subject_is_audited_skipped_or_stops_a_strict_run(phantom_dir, tmp_path):
    for name in ("s0000", "s0001"):
        shutil.copytree(phantom_dir / name, tmp_path / "data" / name)
    assert "subjects, 117 structures" in segkit("stage", "data", "--strict", cwd=tmp_path)
    clean = segkit("audit", "data", cwd=tmp_path)
    assert "error" not in clean and "warning" not in clean and "overlap" in clean
    liver = tmp_path / "data" / "s0001" / "segmentations" / "liver.nii.gz"
    liver.write_bytes(liver.read_bytes()[:-30])
    assert "unreadable" in segkit("audit", "data", "--output-dir", "found", cwd=tmp_path, ok=False)
    [table] = (tmp_path / "found").glob("audit_*.csv")
    [row] = [row for row in csv.DictReader(table.open()) if row["severity"] == "error"]
    assert row["subject"] == "s0001" and row["structure"] == "liver" and "liver.nii.gz" in row["message"]
    assert "1 subjects, 117 structures" in segkit("stage", "data", cwd=tmp_path)
    strict = segkit("stage", "data", "--strict", cwd=tmp_path, ok=False)
    assert "segkit: subject s0001" in strict and "liver.nii.gz" in strict


def test_errors_are_one_line_with_exit_code_one(tmp_path):
    assert "choose one of --small" in segkit("download", "there", cwd=tmp_path, ok=False)
    assert "segkit: nowhere: no such folder" in segkit("stage", "nowhere", cwd=tmp_path, ok=False)
    assert "TARGET_SHAPE" in segkit("train", "--target-shape", 10, 10, cwd=tmp_path, ok=False)
    assert "no training run" in segkit("evaluate", cwd=tmp_path, ok=False)
    assert not (tmp_path / "outputs").exists()
