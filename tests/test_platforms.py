"""What Windows and macOS do otherwise, as far as it can be tried on Linux."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from segkit.devices import pick_device
from segkit.errors import SegkitError

# processes start as on Windows and macOS: a new Python that imports what it needs
TRAINING = """
import multiprocessing, os, sys
from segkit.__main__ import main

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    del os.fork
    sys.argv = ["segkit", "train", *sys.argv[1:]]
    main()
"""

RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


@pytest.fixture(scope="module")
def runs(phantom_dir, tmp_path_factory):
    """Two trainings of the same slices: read by two spawned processes, subjects staged by two, and by the training."""
    folder = tmp_path_factory.mktemp("spawned")
    script = folder / "training.py"
    script.write_text(TRAINING)
    for name, several in (("spawned", 2), ("alone", 0)):
        subprocess.run(
            [sys.executable, script, phantom_dir, "--output-dir", folder / name, "--epochs", "1", "--target-shape",
             "32", "32", "--features", "4", "8", "--slices-per-epoch", "16", "--validation-slices", "8", "--device",
             "cpu", "--workers", str(several), "--jobs", str(max(several, 1))],
            check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    return folder


def test_spawned_workers_train_the_same_network_without_fork(runs):
    spawned, alone = (
        torch.load(runs / name / "checkpoint_epoch1.pth", weights_only=True)["weights"] for name in ("spawned", "alone")
    )
    assert spawned.keys() == alone.keys()
    assert all(torch.equal(spawned[name], alone[name]) for name in alone)


def test_what_a_run_leaves_has_names_that_every_system_allows(runs):
    paths = [path.relative_to(runs) for path in runs.rglob("*")]
    assert len(paths) > 20
    for path in paths:
        assert not set(path.name) & set('<>:"\\|?*') and path.name[-1] not in ". ", path
        assert path.name.split(".")[0].lower() not in RESERVED, path
    assert len({str(path).lower() for path in paths}) == len(paths)  # where Liver and liver are one file


@pytest.mark.parametrize(("platform", "fallback"), [("darwin", "1"), ("linux", None)])
def test_apples_gpus_leave_to_the_cpu_what_they_lack(platform, fallback):
    name = "PYTORCH_ENABLE_MPS_FALLBACK"
    code = f"import os, sys; sys.platform = {platform!r}; import segkit; print(os.environ.get({name!r}))"
    environment = {each: value for each, value in os.environ.items() if each != name}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert said.stdout.strip() == str(fallback)


@pytest.mark.parametrize(("name", "asked"), [(None, "DEVICE = None, here cuda,"), ("cuda", "DEVICE = 'cuda'")])
def test_a_gpu_that_this_torch_cannot_compute_on_is_said(name, asked, monkeypatch):
    """As releases of torch without kernels for older GPUs: they see it, and fail at the first computation."""

    def no_kernel(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.raises(
        SegkitError, match=r"is not usable here \(CUDA error: no kernel image .* device\): give cpu"
    ) as error:
        pick_device(name)
    assert str(error.value).startswith(asked)
