"""What the tests share: the real torso, a small phantom data set, and subjects written by hand."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: networks this small gain nothing from more threads

import matplotlib
import nibabel as nib
import numpy as np
import pytest
import torch

from segkit import dataset, phantom, steps

pytest_plugins = ["fault_table", "fault_processes"]
matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
"""On which what must hold on any device is tested."""
REAL_DATA = Path(os.environ.get("SEGKIT_REAL_DATA", ROOT.parent / "shared" / "data"))
CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)


@pytest.fixture(scope="session")
def torso_dir() -> Path:
    """The folder that holds the real torso, s0000; skips where the real data are not at hand."""
    folder = REAL_DATA / "torso"
    if not (folder / "s0000" / "ct.nii.gz").is_file():
        pytest.skip(f"no real torso in {folder}: set SEGKIT_REAL_DATA")
    return folder


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory) -> Path:
    """Five small phantoms with meta.csv: every orientation and overlap that phantoms have, in seconds."""
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    phantom.write_phantoms(folder, 5, seed=1, detail=0.4)
    return folder


@pytest.fixture(scope="session")
def phantom_data(phantom_dir, tmp_path_factory) -> dataset.Data:
    """The small phantoms, staged."""
    return dataset.open_data(phantom_dir, tmp_path_factory.mktemp("stage"), progress=False)


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium without a screen, with WebGL; skips where it is not installed.

    For a module, not longer: while it is open its event loop runs in this thread, and notebooks need one of their own.
    """
    if CHROMIUM is None:
        pytest.skip("no chromium: pages were not opened in a browser")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",
             "--disable-background-networking"]  # fmt: skip
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


@pytest.fixture
def tab(browser):
    """A fresh tab; afterwards nothing must have gone wrong in it, and nothing been fetched but files."""
    tab = browser.new_page(viewport={"width": 1200, "height": 800})
    requests, errors = [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("dialog", lambda dialog: (errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    yield tab
    tab.close()
    assert errors == [] and all(url.startswith(("file:", "blob:", "data:")) for url in requests)


def write_nifti(path: Path, volume: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write a volume with nibabel, not with segkit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine), path)
    return path


def write_subject(folder: Path, masks: dict[str, np.ndarray], ct: np.ndarray | None = None, affine=None) -> Path:
    """A subject folder from arrays (i, j, k); without `ct` the scan is noise, of each name another."""
    shape = next(iter(masks.values())).shape
    noise = np.random.default_rng(list(folder.name.encode()))
    volume = noise.integers(-1000, 1000, shape).astype(np.int16) if ct is None else ct
    write_nifti(folder / "ct.nii.gz", volume, affine)
    for name, mask in masks.items():
        write_nifti(folder / "segmentations" / f"{name}.nii.gz", mask.astype(np.uint8), affine)
    return folder


@pytest.fixture
def stopped_after(monkeypatch):
    """`with stopped_after(n):` lets a training do n steps and then stops it, as the stop button of a notebook does."""

    @contextmanager
    def stopping(number: int):
        done, original = [], steps.Learner.step

        def step(self, batch, epoch, learning_rate):
            if len(done) == number:
                raise KeyboardInterrupt
            done.append(epoch)
            return original(self, batch, epoch, learning_rate)

        with monkeypatch.context() as patched:
            patched.setattr(steps.Learner, "step", step)
            yield

    return stopping
