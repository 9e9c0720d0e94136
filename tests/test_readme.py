"""README is true: its commands run as they stand there, small numbers added; links, names and defaults exist."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from dicom_files import make_series, save
from test_cli import VERBS
from test_ranks import free_port

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "outputs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NETWORK = ["--target-shape", "32", "32", "--features", "4", "8", "--slices-per-epoch", "8", "--validation-slices", "4"]
SMALL = {
    "train": ["--epochs", "1", *NETWORK, "--device", "cpu"],
    "evaluate": ["--max-subjects", "1", "--device", "cpu"],
    "predict": ["--device", "cpu"],
    "papermill": ["-p", "EPOCHS", "1", "-p", "SLICES_PER_EPOCH", "8", "-p", "DEVICE", "cpu", "-p", "JOBS", "1",
                  "-y", "{TARGET_SHAPE: [32, 32], FEATURES: [4, 8], VALIDATION_SLICES: 4}"],
}  # fmt: skip
"""What is added so that a command ends in seconds."""


def commands(language: str = "bash") -> list[list[str]]:
    """Every command of README's blocks, split as a shell splits it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    each = [part for line in lines for part in re.split(r"\s&&\s", line)]
    return [words for part in each if (words := shlex.split(part, comments=True))]


@pytest.fixture(scope="module")
def desk(phantom_dir, tmp_path_factory) -> Path:
    """A folder with all that README's commands name."""
    folder = tmp_path_factory.mktemp("desk")
    scan = phantom_dir / "s0000" / "ct.nii.gz"
    shutil.copy(scan, folder / "scan.nii.gz")
    image = nib.load(scan)
    save(make_series(np.asarray(image.dataobj), image.affine), folder / "dicom_folder")
    for name in ("notebooks", "segkit"):  # where a notebook finds the project's root
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(words: list[str], desk: Path, data: Path) -> str:
    """Run a command of README in `desk`, its data and disks being there; what it said."""
    places = {"/path/to/my_data": str(data), "/shared/data": str(data), "/shared/run": str(desk / "shared_run")}
    program = [sys.executable, "-m"]
    if words[0] == "accelerate":  # of several machines with GPUs: two processes of this one
        words = [word for word in words if word != "launch"]
        here = {"--num_processes": "2", "--num_machines": "1", "--main_process_ip": "127.0.0.1"}
        words = [here.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        extra = ["--main_process_port", str(free_port()), "--mixed_precision", "no", "--dynamo_backend", "no"]
        own = words[1 : words.index("-m")]
        if "--main_process_port" in own:
            del own[own.index("--main_process_port") : own.index("--main_process_port") + 2]
        words = ["accelerate.commands.launch", *own, *extra, *words[words.index("-m") :], *SMALL["train"]]
    elif words[:2] == ["python", "-m"]:
        words = [*words[2:], *SMALL.get(words[3], [])]
    elif words[0] == "papermill":
        words = [*words, *SMALL["papermill"]]
    done = subprocess.run(
        [*program, *(places.get(word, word) for word in words)], cwd=desk, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_commands_run_as_they_stand(desk, phantom_dir):
    """All but those that install something, last long, or open a window: their tests are named."""
    elsewhere = {
        "make": "test_what_make_knows", "pip": "test_what_is_installed", "python3": "Python's own", ".": "the shell's",
        "jupyter": "test_jupyterlab.py", "python -m segkit demo": "test_interactive_demo.py",
    }  # fmt: skip
    left = [words for words in commands() if not ({words[0], shlex.join(words)} & set(elsewhere))]
    said = {shlex.join(words): run(words, desk, phantom_dir) for words in left}
    assert len(said) == len(left) >= 9
    outputs = desk / "outputs"
    assert list(outputs.rglob("report_*.html")) and (desk / "shared_run" / "checkpoint_epoch1.pth").is_file()
    found = {path.name for path in (outputs / "segmentations").glob("*/*")}
    assert {"scan_labels.nii.gz", "scan_3d.html", "scan_structures.csv", "dicom_folder.seg.nrrd"} <= found
    assert "dicom_folder_seg.dcm" in found or "no structure was found" in str(said.values())


def test_what_make_knows():
    targets = {words[1] for words in commands() if words[0] == "make"} | set(re.findall(r"`make\s(\w+)", README))
    assert {"demo", "lab", "check", "test", "bench", "faults"} <= targets
    for target in targets:
        planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert planned.returncode == 0, planned.stderr


def test_what_is_installed():
    pinned = set((ROOT / "requirements.txt").read_text().split())
    extras = (ROOT / "pyproject.toml").read_text()
    for words in commands():
        if words[0] == "pip":
            assert all(word in pinned for word in words if "==" in word)
            assert all((ROOT / word).is_file() for word in words if word.endswith((".txt", ".lock")))
    for extra in re.findall(r"pip install -e '\.\[(\w+)\]'", README):
        assert f"\n{extra} = [" in extras


def test_verbs_and_their_flags_exist():
    helps = {}
    for verb in VERBS:
        command = [sys.executable, "-m", "segkit", verb, "--help"]
        helps[verb] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    spans = re.findall(r"`(?:python -m )?segkit\s([^`]*)`", README.replace("\n", " "))
    named = [shlex.split(span) for span in spans] + [w[3:] for w in commands() if w[:3] == ["python", "-m", "segkit"]]
    for verb, *rest in (words for words in named if words and words[0] != "VERB"):
        assert verb in VERBS
        for flag in (word for word in rest if word.startswith("--")):
            assert flag == "--help" or f"{flag} " in helps[verb], (verb, flag)
    for flag in set(re.findall(r"`(--[\w-]+)`", README)):
        assert any(f"{flag} " in text or f"{flag}," in text for text in helps.values()), flag


def test_settings_and_their_defaults_are_those_of_the_notebook():
    cells = json.loads((ROOT / "notebooks" / "train_unet.ipynb").read_text(encoding="utf-8"))["cells"]
    defaults = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            for node in ast.parse("".join(cell["source"])).body:
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").isupper():
                    defaults.setdefault(node.targets[0].id, ast.literal_eval(node.value))
    table = README.split("| in `train_unet.ipynb` |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]]
    assert len(rows) >= 10
    for names, values in rows:
        names = re.findall(r"`(\w+)`", names)
        if values == "all":
            assert all(defaults[name] in (None, []) for name in names)
            continue
        stated = ast.literal_eval(f"[{values.strip('`')}]")
        assert [defaults[name] for name in names] == stated, names


def test_python_in_readme_runs_on_a_local_cluster(phantom_dir, tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs the extra 'dask'")
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    train = [sys.executable, "-m", "segkit", "train", phantom_dir, "--output-dir", tmp_path / "run", *SMALL["train"]]
    subprocess.run(train, cwd=ROOT, check=True, capture_output=True)
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as local:
        places = {"scheduler:8786": local.scheduler_address, "/shared/": f"{tmp_path}/"}
        for place, here in places.items():
            assert place in block
            block = block.replace(place, here)
        names = {}
        exec(block, names)
        names["client"].close()
    scores = names["evaluated"].scores
    assert set(scores["subject"]) == {part.subject for part in names["data"].split.test} and len(scores) >= 117


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#", "data:")):
            assert (page.parent / target.split("#")[0]).exists(), target
