"""Faults of room: files that may not grow, and disks that are full, while segkit stages, trains, predicts and reports.

What was there before stays, nothing is half there, and a shell gets one line that names the file and what to do.
"""

import json
import random
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import write_subject
from fault_processes import Ended, files_of, left_over
from test_faults_kills import assert_readable, assert_same_run

from segkit import runs
from segkit.errors import SegkitError

SMALL = (
    "--batch-size", "4", "--target-shape", "32", "32", "--features", "4", "8", "--slices-per-epoch", "8",
    "--validation-slices", "4", "--device", "cpu",
)  # fmt: skip
EXPECTED = "one line that names the file and says what to do; what was there before is intact, nothing half written"
FULL, TOO_LARGE = r"the disk is full; make room", r"larger than is allowed here \(ulimit -f\); allow that"


@pytest.fixture
def segkit(first):
    """`segkit("stage", ...)`: as from a shell."""
    return lambda *arguments, **how: first.run("fault_processes:shell", *arguments, **how)


@contextmanager
def disk_of(folder: Path, kilobytes: int):
    """A disk of its own, so large; skips where mounting is refused."""
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    try:
        done = subprocess.run(mounting, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def assert_one_line(ended: Ended, reason: str, names: str) -> None:
    """Exit code 1 and one line of segkit's, the last one; warnings of what was found may stand before it."""
    assert ended.code == 1 and "Traceback" not in ended.err and "Traceback" not in ended.out, ended.err
    lines = [line for line in re.split(r"[\r\n]+", ended.err) if line.startswith("segkit: ")]
    assert len(lines) == 1 and ended.err.rstrip().endswith(lines[0]), ended.err
    assert re.search(reason, lines[0]) and names in lines[0] and "run it again" in lines[0], lines[0]


def limits(folder: Path, number: int) -> list[int]:
    """Sizes below that of the largest file in a folder, from the middle on, none at all among them."""
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    rng = random.Random(0)
    return [largest // 2, 0, *(int(largest * rng.uniform(part, part + 1) / number) for part in range(number))][:number]


# --- staging


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    import numpy as np

    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    for name in ("s0000", "s0001", "s0002"):
        write_subject(folder / name, {organ: rng.random((60, 50, 40)) < 0.3 for organ in ("liver", "spleen")})
    return folder


def test_staging(segkit, data, tmp_path, fault, many):
    row = fault("staging with too little room for a file", EXPECTED)
    whole = tmp_path / "whole"
    assert segkit("stage", data, "--stage-dir", whole).code == 0
    [home] = whole.iterdir()
    for limit in limits(whole, many(3, 15)):
        store = tmp_path / "store"
        shutil.copytree(whole, store)
        shutil.rmtree(store / home.name / "s0001")
        before = files_of(store)
        assert_one_line(
            segkit("stage", data, "--stage-dir", store, largest_file=limit), TOO_LARGE, f"{store / home.name}/s0001"
        )
        assert files_of(store) == before and left_over(store) == []
        assert segkit("stage", data, "--stage-dir", store).code == 0
        assert files_of(store) == files_of(whole)
        shutil.rmtree(store)
        row.times += 1


def test_staging_onto_a_full_disk(segkit, data, tmp_path, fault, many):
    whole = tmp_path / "whole"
    assert segkit("stage", data, "--stage-dir", whole).code == 0
    used = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) // 1024
    with disk_of(tmp_path / "disk", used // 2):
        row = fault("staging onto a disk that gets full", EXPECTED)
        for _ in range(many(1, 5)):
            store = tmp_path / "disk" / "store"
            assert_one_line(segkit("stage", data, "--stage-dir", store), FULL, str(store))
            found, expected = files_of(store), files_of(whole)
            assert 0 < len(found) < len(expected) and len(found) % 3 == 0 and left_over(store) == []
            assert all(expected[name] == content for name, content in found.items())
            row.times += 1


# --- training


@pytest.fixture(scope="module")
def trained(first, phantom_data, tmp_path_factory) -> tuple[Path, Path, tuple]:
    """A run of one epoch, the same of two, and how to train."""
    folder = tmp_path_factory.mktemp("trained")
    store = next(iter(phantom_data.staged.values())).folder.parents[1]
    how = ("train", phantom_data.folder, "--stage-dir", store, *SMALL, "--resume", "--output-dir")
    for name, epochs in (("one", 1), ("two", 1), ("two", 2)):
        done = first.run("fault_processes:shell", *how, folder / name, "--epochs", epochs)
        assert done.code == 0, done.err
    return folder / "one", folder / "two", (*how[:1], "--epochs", "2", *how[1:])


def assert_intact(folder: Path, before: dict[str, bytes]) -> None:
    """The earlier checkpoint and state are as they were, or the state is the next one, whole."""
    found = files_of(folder)
    assert before.keys() <= found.keys() and found["checkpoint_epoch1.pth"] == before["checkpoint_epoch1.pth"]
    assert_readable(folder)
    assert left_over(folder) == []


def test_training(segkit, trained, tmp_path, fault, many):
    row = fault("training on with too little room for the checkpoint, the state or another file", EXPECTED)
    one, two, how = trained
    for limit in limits(two, many(2, 12)):
        folder = tmp_path / "run"
        shutil.copytree(one, folder)
        ended = segkit(*how, folder, largest_file=limit)
        if limit:
            assert_one_line(ended, TOO_LARGE, f"{folder}/")
        else:  # torch wants some room of its own
            assert_one_line(ended, "no room for temporary files", "TMPDIR")
        assert_intact(folder, files_of(one))
        assert segkit(*how, folder).code == 0
        assert_same_run(folder, two)
        shutil.rmtree(folder)
        row.times += 1


def test_training_onto_a_full_disk(segkit, trained, tmp_path, fault, many):
    one, two, how = trained
    size = sum(path.stat().st_size for path in one.iterdir() if path.is_file()) // 1024
    with disk_of(tmp_path / "disk", size + 200):
        row = fault("training on with a disk that gets full", EXPECTED)
        folder = tmp_path / "disk" / "run"
        shutil.copytree(one, folder)
        for left in range(8, 8 + 20 * many(1, 6), 20):
            filler = tmp_path / "disk" / "filler"
            free = shutil.disk_usage(tmp_path / "disk").free
            filler.write_bytes(bytes(free - left * 1024))
            assert_one_line(segkit(*how, folder), FULL, f"{folder}/")
            assert_intact(folder, files_of(one))
            filler.unlink()
            row.times += 1
        filler.unlink(missing_ok=True)
        subprocess.run(["mount", "-o", f"remount,size={8 * size + 4000}k", str(tmp_path / "disk")], check=True)
        assert segkit(*how, folder).code == 0
        assert_same_run(folder, two)


# --- evaluation and predicting


def test_a_report(segkit, trained, phantom_data, tmp_path, fault, many):
    row = fault("evaluating with too little room for a table, a figure or the page", EXPECTED)
    one, _, _ = trained
    store = next(iter(phantom_data.staged.values())).folder.parents[1]
    folder = tmp_path / "run"
    shutil.copytree(one, folder)
    how = ("evaluate", "--output-dir", folder, "--stage-dir", store, "--max-subjects", "1", "--device", "cpu")
    assert segkit(*how).code == 0
    before = files_of(folder)
    whole = {ending_of(name): content for name, content in before.items() if "evaluation_results" in name}
    for limit in limits(folder, many(1, 8)):
        assert_one_line(segkit(*how, largest_file=limit), TOO_LARGE, f"{folder}/")
        found = files_of(folder)
        assert {name: found[name] for name in before if not name.startswith("predictions")} == {
            name: content for name, content in before.items() if not name.startswith("predictions")
        }
        for name in found.keys() - before.keys():
            assert_whole(name, found[name], whole)
            (folder / name).unlink()
        assert left_over(folder) == []
        row.times += 1


def ending_of(name: str) -> str:
    return re.sub(r"_\d{8}_\d{6}", "", name)


def assert_whole(name: str, content: bytes, whole: dict[str, bytes]) -> None:
    """A file of a report that was written before there was no more room."""
    if name.endswith(".png"):
        assert content.endswith(b"IEND\xaeB\x60\x82")
    elif name.endswith(".html"):
        assert content.rstrip().endswith(b"</html>")
    elif name.endswith(".json"):
        json.loads(content)
    elif "evaluation_results" in name:
        assert content == whole[ending_of(name)]
    else:
        assert name.endswith(".csv") and content.endswith(b"\n")


def test_predicting(segkit, trained, phantom_data, tmp_path, fault, many):
    row = fault("predicting with too little room for an output", EXPECTED)
    scan = phantom_data.folder / "s0000" / "ct.nii.gz"
    how = ("predict", scan, "--checkpoint", trained[0], "--device", "cpu", "--format", "nifti", "slicer", "csv", "html")
    assert segkit(*how, "--out", tmp_path / "whole").code == 0
    for limit in limits(tmp_path / "whole", many(3, 15)):
        out = tmp_path / "out"
        assert_one_line(segkit(*how, "--out", out, largest_file=limit), TOO_LARGE, f"{out}/s0000")
        assert files_of(out, hidden=True) == {} and left_over(out) == []
        row.times += 1


def test_predicting_onto_a_full_disk(segkit, trained, phantom_data, tmp_path, fault, many):
    scan = phantom_data.folder / "s0000" / "ct.nii.gz"
    how = ("predict", scan, "--checkpoint", trained[0], "--device", "cpu", "--format", "masks", "csv", "--out")
    assert segkit(*how, tmp_path / "whole").code == 0
    used = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()) // 1024
    with disk_of(tmp_path / "disk", used // 2):
        row = fault("predicting onto a disk that gets full", EXPECTED)
        for _ in range(many(1, 5)):
            out = tmp_path / "disk" / "out"
            assert_one_line(segkit(*how, out), FULL, f"{out}/s0000")
            assert files_of(out, hidden=True) == {}
            row.times += 1


@pytest.mark.parametrize(
    ("number", "says"), [(28, FULL), (122, "quota of this disk"), (27, TOO_LARGE), (13, "Permission")]
)
def test_each_reason_is_said(tmp_path, number, says):
    def write(path: Path) -> None:
        path.write_text("half")
        raise OSError(number, "Permission denied" if number == 13 else "some other words")

    (tmp_path / "file").write_text("before")
    for writing in (
        lambda: runs.write_whole(tmp_path / "file", write),
        lambda: runs.write_whole_folder(tmp_path / "folder", lambda f: runs.write_whole(f / "a", write)),
    ):
        with pytest.raises(SegkitError, match=rf"{tmp_path}/(file|folder/a): .*{says}.*run it again"):
            writing()
    assert files_of(tmp_path, hidden=True) == {"file": b"before"} and not (tmp_path / "folder").exists()
