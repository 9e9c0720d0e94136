"""The benchmarks' own arithmetic: medians, times, resuming, what is said of missing peers, projections by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
from conftest import ROOT, write_nifti

sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import chart, gpu_memory, growth, inputs, nnunet, page, predicting, tables, trainings, turns, voting
from benchmarks.__main__ import Work, measure_all, works
from benchmarks.bench import QUICK, Bench
from benchmarks.sides import Side, Taken
from benchmarks.tables import Row, Store, Table
from segkit.dataset import open_data

SIDES = "tests.bench_sides"


def take(*sides: Side, rounds: int = 3, tmp_path: Path, **limits) -> dict[str, Taken]:
    return turns.take_turns(sides, rounds, sys.executable, tmp_path / "logs", 1, turns.Limits(**limits))


def test_a_median_is_the_middle_of_the_rounds():
    assert Taken([3.0, 1.0, 20.0]).median == 3.0
    assert Taken([1.0, 2.0]).median == 1.5
    assert Taken().median is None


def test_sides_take_turns_after_a_round_that_warms_up(tmp_path):
    order = tmp_path / "order.txt"
    one, two = (Side(name, f"{SIDES}:note", {"path": str(order), "word": name}) for name in ("one", "two"))
    cold = Side("cold", f"{SIDES}:note", {"path": str(order), "word": "cold"}, rounds=1, cold=True)
    taken = take(one, two, cold, rounds=2, tmp_path=tmp_path)
    assert order.read_text().split() == ["one", "two", "cold", "one", "two", "one", "two"]
    assert [len(taken[name].seconds) for name in ("one", "two", "cold")] == [2, 2, 1]
    assert taken["one"].found == {"calls": 3} and taken["cold"].found == {"calls": 1}


def test_seconds_and_memory_are_those_of_the_side_alone(tmp_path):
    small, large = (Side(f"{mb} MB", f"{SIDES}:hold", {"mb": mb, "seconds": 0.2}) for mb in (1, 200))
    taken = take(small, large, rounds=1, tmp_path=tmp_path)
    assert all(0.2 <= side.median < 5 for side in taken.values())
    assert 190 <= taken["200 MB"].peak_mb - taken["1 MB"].peak_mb <= 230


def test_memory_of_what_a_side_started_counts(tmp_path):
    taken = take(Side("parent", f"{SIDES}:child_holds", {"mb": 150}), rounds=1, tmp_path=tmp_path)["parent"]
    assert 150 <= taken.peak_mb <= 400


def test_a_side_that_is_missing_stops_or_needs_too_much_leaves_the_others_alone(tmp_path):
    taken = take(
        Side("missing", f"{SIDES}:missing"),
        Side("broken", f"{SIDES}:broken"),
        Side("greedy", f"{SIDES}:hold", {"mb": 700, "seconds": 5}),
        Side("fine", f"{SIDES}:hold", {"mb": 1, "seconds": 0}),
        rounds=1, tmp_path=tmp_path, mb=500,
    )  # fmt: skip
    assert taken["missing"].problem == "left out: no_such_peer is not installed there"
    assert taken["broken"].problem == "failed: ValueError: what went wrong"
    assert taken["greedy"].problem.startswith("stopped: needs more than 0 GiB") and taken["greedy"].median is None
    assert taken["fine"].problem == "" and len(taken["fine"].seconds) == 1


def test_a_side_without_an_end_is_stopped(tmp_path):
    taken = take(Side("slow", f"{SIDES}:hold", {"mb": 1, "seconds": 60}), rounds=1, tmp_path=tmp_path, seconds=0.6)
    assert taken["slow"].problem == "stopped after 1 s without an end"


def test_a_side_finds_what_the_callers_path_holds(tmp_path, monkeypatch):
    """Where peers are unpacked into a folder, nothing else says where they are."""
    (tmp_path / "a_peer_from_a_folder.py").write_text("def nothing():\n    return lambda: None\n")
    side = Side("side", "a_peer_from_a_folder:nothing")
    assert "a_peer_from_a_folder" in take(side, rounds=1, tmp_path=tmp_path)["side"].problem
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert take(side, rounds=1, tmp_path=tmp_path)["side"].problem == ""


def test_what_the_peers_environment_imports_needs_nothing_of_segkits():
    lacking = ("psutil", "isal", "joblib", "tyro", "plotly", "accelerate")
    modules = ("worker", "staging", "fetching", "training_step", "epoch", "predicting", "scoring", "starting")
    light = ("staging", "fetching", "predicting", "scoring", "starting")  # where torch would count as the side's memory
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({lacking}))\n"
        f"import {', '.join(f'benchmarks.{name}' for name in light)}\nassert 'torch' not in sys.modules\n"
        f"import {', '.join(f'benchmarks.{name}' for name in modules)}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_sides_end_when_the_run_is_killed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from benchmarks import turns; from benchmarks.sides import Side\n"
        f"side = Side('s', '{SIDES}:mark_and_wait', {{'path': '{tmp_path / 'pid'}'}})\n"
        f"turns.take_turns([side], 1, sys.executable, Path('{tmp_path}'))"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    worker = psutil.Process(int((tmp_path / "pid").read_text()))
    run.kill()
    run.wait()
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def wait_for(happened, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_times_are_beside_segkit_and_seconds_an_item():
    sides = [Side("a", ""), Side("b", "", kind="peer"), Side("c", "", kind="peer"), Side("d", "", kind="floor")]
    taken = {
        "a": Taken([2.0], 10, found={"items": 4}),
        "b": Taken([3.0], 20, found={"items": 2}),
        "c": Taken(problem="left out: x is not installed there"),
        "d": Taken([0.25]),
    }
    rows = tables.rows_of(sides, taken, {"b": "noted"})
    assert [(row.seconds, row.times) for row in rows] == [(0.5, 1.0), (1.5, 3.0), (None, None), (0.25, 0.5)]
    assert [row.notes for row in rows] == ["", "noted", "left out: x is not installed there", ""]
    assert tables.floor_row("f", 0.1, rows).times == pytest.approx(0.2)


def example() -> Table:
    rows = [
        Row("ours", "segkit", 0.5, 1.0, 1234, score=0.6),
        Row("a | b", "peer", 1.0, 2.0, 5000, score=0.5),
        Row("quick one", "peer", 0.25, 0.5, 100, score=0.75),
        Row("gone", "peer", notes="left out: gone is not installed there"),
        Row("least", "floor", 0.001, 0.002),
    ]
    return Table("work", "A work", "What was done.", rows, ["A note."], grid=[["head", "x"], ["row", "1"]])


def test_a_table_is_rendered_with_who_was_better():
    lines = page.section(example()).splitlines()
    assert lines[0] == "## A work" and lines[2] == "`work`. What was done."
    assert lines[4] == "|  | seconds | times segkit | macro Dice | peak MB |  |"
    assert lines[6] == "| **ours** | 0.500 | 1 | 0.600 | 1,234 |  |"
    assert lines[7] == "| a \\| b | 1 | 2 | 0.500 | 5,000 |  |"
    assert lines[9] == "| gone |  |  |  |  | left out: gone is not installed there |"
    assert lines[10] == "| *floor: least* | 0.001 | 0.002 |  |  |  |"
    assert lines[12:15] == ["| head | x |", "|---|---|", "| row | 1 |"] and "- A note." in lines
    assert page.where_others_win(example()) == [
        "quick one takes 0.50 times as long as segkit",
        "quick one needs 100 MB, ours 1,234",
        "quick one reaches 0.750, ours 0.600",
    ]


def test_scores_are_compared_within_a_budget():
    """A peer that had ten minutes is not held against what segkit reached in one."""
    rows = [
        Row("segkit, long", "segkit", 10.0, score=0.7, peak_mb=100),
        Row("peer, long", "peer", 10.0, score=0.4, peak_mb=120),
        Row("segkit, short", "segkit", 1.0, score=0.3, peak_mb=110),
        Row("peer, short", "peer", 1.0, score=0.35, peak_mb=105),
    ]
    assert page.where_others_win(Table("quality", "Quality", "", rows)) == [
        "peer, short needs 105 MB, segkit, short 110",
        "peer, short reaches 0.350, segkit, short 0.300",
    ]


def test_the_page_says_that_it_is_quick_and_what_failed(tmp_path):
    machine = {
        "threads": 2, "processor": "P", "cores": 2, "memory_gib": 8, "device": "cpu", "system": "L", "git": None,
        "versions": {"torch": "1"}, "peers": {"monai": None}, "rates": dict.fromkeys(
            ("matrix_gflops", "memory_gb_s", "gunzip_mb_s"), 1),
    }  # fmt: skip
    run = {"quick": True, "date": "2030-01-02", "command": "make bench QUICK=1", "left_out": []}
    text = page.render([example()], {"other": "ValueError: x"}, machine, run)
    assert text.index("The quick form") < text.index("## A work")
    assert "## other\n\nNot measured: ValueError: x" in text and "no environment of their own" in text
    assert "Left out of" not in text
    part = page.render([example()], {}, machine, {**run, "quick": False, "left_out": ["demo", "growth"]})
    assert "quick form" not in part and "Left out of this run: `demo`, `growth`." in part
    chart.draw([example()], tmp_path / "images" / "chart.png")
    assert (tmp_path / "images" / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_has_a_panel_for_what_was_measured(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(chart, "save_figure", lambda path, figure: figures.append(figure))
    timed = Table("t", "Timed", "", [Row("ours", "segkit", 1.0, 1.0), Row("other", "peer", 2.0, 2.0)])
    scored = Table("q", "Quality", "", [Row("ours", "segkit", 1.0, score=0.5)])
    for tables_shown in ([timed, scored], [timed], [scored], []):
        chart.draw(tables_shown, tmp_path / "chart.png")
    assert [len(figure.axes) for figure in figures] == [2, 1, 1, 1]
    assert figures[2].axes[0].get_xlabel().startswith("macro Dice")


def test_numbers_show_three_digits():
    shown = [page.number(value) for value in (None, 0.00123, 0.1234, 1.234, 12.34, 1234.5)]
    assert shown == ["", "0.0012", "0.123", "1.23", "12.3", "1,234"]
    assert page.number(0.00123, 1000) == "1.23"


def test_an_interrupted_run_goes_on_and_other_conditions_do_not(tmp_path):
    done = []

    def measuring(name: str):
        def measure() -> Table:
            done.append(name)
            if name == "second" and done.count("second") == 1:
                raise RuntimeError("killed")
            return example()

        return Work(name, measure, Path(__file__))

    bench = Bench(tmp_path, QUICK)
    wanted = [measuring("first"), measuring("second")]
    kept, failed = measure_all(bench, wanted)
    assert len(kept) == 1 and failed == {"second": "RuntimeError: killed"}
    kept, failed = measure_all(bench, wanted)
    assert done == ["first", "second", "second"] and not failed and kept == [example(), example()]
    measure_all(Bench(tmp_path, QUICK, threads=17), wanted[:1])
    assert done[-1] == "first" and len(done) == 4
    kept, _ = measure_all(Bench(tmp_path, QUICK, threads=17), wanted, only=["second"])
    assert done[-1] == "second" and len(kept) == 2


def test_a_result_of_other_code_is_not_taken(tmp_path):
    source = ROOT / "benchmarks" / f".test_{tmp_path.name}.py"
    store = Store(tmp_path, {"a": (1, 2)})
    try:
        source.write_text("x = 1\n")
        assert store.once("n", lambda: {"y": 1}, [source]) == {"y": 1} == store.kept("n", [source])
        source.write_text("x = 2\n")
        assert store.kept("n", [source]) is None
    finally:
        source.unlink()
    (tmp_path / "n.json").write_text("{")
    assert store.kept("n") is None


def test_a_table_with_a_side_that_failed_is_tried_again(tmp_path):
    store = Store(tmp_path, {})
    for problem, kept in (("failed: ValueError: x", False), ("left out: x is not installed there", True)):
        table = Table("t", "T", "", [Row("a", "segkit", 1.0), Row("b", "peer", notes=problem)])
        assert store.table(problem[:4], lambda table=table: table) == table
        assert (store.kept(problem[:4]) is not None) == kept


def test_a_result_depends_on_what_its_module_imports():
    def names(module):
        return {path.name for path in tables.code_of(ROOT / "benchmarks" / f"{module}.py")}

    assert {"segkit", "quality.py", "trainings.py", "voting.py", "learning.py", "nnunet.py", "inputs.py", "turns.py",
            "worker.py", "nnunet_trainer.py"} <= names("quality")  # fmt: skip
    assert not {"page.py", "chart.py", "__main__.py", "growth.py", "scoring.py"} & names("quality")
    assert "nnunet.py" not in names("scoring") and "training_step.py" in names("predicting")


def test_what_a_command_held_on_the_gpu_is_read_from_its_file(tmp_path):
    """With a torch that says it had a GPU: the module runs as it would, with its arguments and exit code."""
    (tmp_path / "torch.py").write_text(
        "class cuda:\n    is_initialized = staticmethod(lambda: True)\n"
        "    max_memory_allocated = staticmethod(lambda: 300 * 2**20)\n"
    )
    (tmp_path / "work.py").write_text("import sys\nif __name__ == '__main__':\n    sys.exit(len(sys.argv))\n")
    (tmp_path / "script").write_text("import sys\nsys.exit(10 + len(sys.argv))\n")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for what, code in ((["-m", "work", "a"], 2), ([str(tmp_path / "script"), "a", "b"], 13)):
        command, held = gpu_memory.watched([sys.executable, *what], "cuda:0", tmp_path / "held")
        assert held() == {}
        assert subprocess.run(command, env=environment, cwd=tmp_path, check=False).returncode == code
        assert held() == {"device_mb": 300}
    command, held = gpu_memory.watched([sys.executable, "-m", "work"], "cpu", tmp_path / "held")
    assert command == [sys.executable, "-m", "work"] and held() == {}


def test_the_names_of_works_are_those_of_the_command_line(tmp_path):
    names = [work.name for work in works(Bench(tmp_path, QUICK))]
    assert names[:2] == ["staging", "fetching"] and names[-2:] == ["growth", "projection"]
    assert len(names) == len(set(names))
    with pytest.raises(SystemExit, match="no table nothing"):
        measure_all(Bench(tmp_path, QUICK), works(Bench(tmp_path, QUICK)), ["nothing"])


def test_growth_and_the_projection_by_hand():
    assert growth.slope_of({1: 100, 4: 130}) == 10 and growth.slope_of({4: 7}) == 0 == growth.slope_of({})
    found = {n: dict.fromkeys(growth.STAGES, seconds) for n, seconds in ((1, 1.0), (4, 4.0), (16, 24.0))}
    [text] = growth.trend(found, 1)
    assert "staging 1.50" in text and text.startswith("16 subjects with 1 worker took")  # the line says 16
    assert growth.trend({n: found[n] for n in (1, 4)}, 1) == []
    of_one = {"staging": 3.0, "epoch": 36.0, "prediction": 40.0, "scoring": 0.5, "disk_mb": 20.0, "peak_mb": 1024.0}
    rows = {row[0]: row[1:] for row in growth.projection(of_one, 1.0)}
    assert rows["stage"] == ["1,228", "3.00 s", "1.02 h"]  # 3684 s
    assert rows["an epoch of all slices"] == ["1,082", "36.00 s", "10.82 h"]
    assert rows["predict"][2] == "0.99 h" and rows["score"][2] == "0.01 h"  # 3560 s, 44.5 s
    assert rows["store on disk"][2] == "24.6 GB" and rows["memory at most"][2] == "2.2 GiB"  # 1024 + 1227 MiB


def test_enlarging_keeps_outer_faces_and_every_mask(tmp_path):
    source, affine = tmp_path / "s0000", np.diag([2.0, 2.0, 4.0, 1.0])
    mask = np.zeros((4, 5, 6), np.uint8)
    mask[1, 2, 3] = 1
    write_nifti(source / "ct.nii.gz", np.full((4, 5, 6), 40, np.int16), affine)
    write_nifti(source / "segmentations" / "liver.nii.gz", mask, affine)
    inputs.enlarge(source, tmp_path / "out", (8, 10, 12))
    large = nib.load(tmp_path / "out" / "segmentations" / "liver.nii.gz")
    assert np.argwhere(np.asanyarray(large.dataobj)).tolist() == [
        [i, j, k] for i in (2, 3) for j in (4, 5) for k in (6, 7)
    ]
    corner = [-0.5, -0.5, -0.5, 1]  # the outer corner of the first voxel
    assert large.affine @ corner == pytest.approx(affine @ corner)
    hu = np.asanyarray(nib.load(tmp_path / "out" / "ct.nii.gz").dataobj)
    assert hu.shape == (8, 10, 12) and abs(hu.mean() - 40) < 3 and 10 < hu.std() < 20  # noise of 15 HU


def test_a_data_folder_is_whole_or_not_there(tmp_path):
    def make(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        inputs.made_whole(tmp_path / "data", make)
    assert not (tmp_path / "data").exists()
    assert (inputs.made_whole(tmp_path / "data", lambda to: (to / "all").write_text("")) / "all").is_file()


def test_nnunet_raw_data_hold_slabs_as_cases_and_come_back(tmp_path, torso_dir):
    data = open_data(torso_dir, tmp_path / "staged", progress=False)
    raw = tmp_path / "raw"
    structures = inputs.write_single_labels(data, raw, {"Tr": data.split.train, "Ts": data.split.test})
    described = json.loads((raw / "dataset.json").read_text())
    assert described["labels"]["liver"] == 1 + structures.index("liver") and described["numTraining"] == 7
    [subject] = data.staged.values()
    (raw / "predicted").mkdir()
    for path in (raw / "labelsTs").iterdir():  # a perfect prediction, as nnU-Net would name it
        path.rename(raw / "predicted" / path.name)
    found = trainings.score_of(data, trainings.Kept(data, raw / "predicted", structures))
    assert found["score"] == found["score_of_learnable"] == 1.0 and found["above"] == found["structures"] > 50
    assert found["structures"] - found["learnable"] == 3  # end slabs: they lie in none of those that are learned from
    image = nib.load(raw / "imagesTs" / f"{subject.name}_0008_0000.nii.gz")
    corner = subject.grid.canonical_affine @ [0, 0, 8, 1]  # x, y, z of the slab's first voxel
    assert image.shape == (*subject.shape[:0:-1], 8) and image.affine[:, 3] == pytest.approx(corner)


def test_the_time_of_an_epoch_is_read_from_the_log(tmp_path):
    lines = [f"2026-01-01: Epoch time: {seconds} s" for seconds in (30.0, 2.0, 3.0, 4.0)]
    (tmp_path / "training_log_1.txt").write_text("\n".join(["Epoch 0", *lines]))
    assert nnunet.epoch_seconds(tmp_path) == [30.0, 2.0, 3.0, 4.0]


def test_a_training_passes_as_many_slices_on_its_way():
    assert trainings.epochs_of(1000, None) == (1000, 1) == trainings.epochs_of(1000, 1000)
    assert trainings.epochs_of(4000, 1400) == (344, 12)  # 4 x 344 = 1376 of 1400, 12 x 344 = 4128 of 4000
    assert trainings.epochs_of(100, 96) == (24, 4) and trainings.epochs_of(20, 9) == (8, 4)


def test_voters_know_hu_and_place_alone(tmp_path, phantom_data):
    assert voting.hu_keys(np.array([-1024, -1020, -1019, 3000], np.int16)).tolist() == [0, 0, 1, 799]
    body = np.full((6, 8, 8), -1000, np.int16)
    body[1:5, 2:6, 2:6] = 0
    keys = voting.position_keys(body, (4, 4, 4))
    assert keys[0, 0, 0] == 64 and keys[1, 2, 2] == 0 and keys[4, 5, 5] == 63 and keys[2, 2, 2] == 16
    chosen = voting.voters(phantom_data)
    assert len(chosen) == 4
    score = voting.headline(phantom_data, chosen["voting by position, balanced over structures"])["macro_dice"]
    assert 0 < score < voting.LIMIT


def test_the_arithmetic_of_a_forward_pass_is_that_of_its_convolutions():
    # 2 x (pixels) x inputs x outputs x 9 of each 3 x 3, by hand; 2 x 2 steps up and the head as 1 x 1
    widths, total, inside = (32, 64, 128, 256, 512), 0, 1
    for level, width in enumerate(widths):
        pixels = (256 >> level) ** 2
        total += 2 * 9 * pixels * (inside * width + width * width)
        inside = width
    for level in range(3, -1, -1):
        pixels, width = (256 >> level) ** 2, widths[level]
        total += 2 * pixels * (2 * width) * width + 2 * 9 * pixels * (2 * width * width + width * width)
    total += 2 * 256**2 * 32 * 117
    assert predicting.forward_flops() == pytest.approx(total, rel=0.02)
