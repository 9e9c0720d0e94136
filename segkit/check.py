"""Whether this installation works: versions, device, and a training step in each precision."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Sequence

import torch

from segkit.devices import autocast, describe_device, fast_dtype, pick_device
from segkit.errors import SegkitError
from segkit.losses import ModelWithLoss
from segkit.networks import on_device
from segkit.slices import Targets
from segkit.unet import UNet2D

PACKAGES = (
    "segkit", "numpy", "nibabel", "scikit-image", "torch", "matplotlib", "plotly", "pandas", "tqdm", "scipy",
    "ipywidgets", "isal", "blosc2", "joblib", "tyro", "fast-simplification", "accelerate", "psutil",
)  # fmt: skip
OF_NOTEBOOKS = ("jupyterlab", "ipykernel", "papermill")


def check_installation() -> None:
    """Print versions, the device, and the time of a small training step in float32 and in the fast precision.

    Raises SegkitError that names the packages that are missing.
    """
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    missing, of_notebooks = _missing(PACKAGES), _missing(OF_NOTEBOOKS)
    if missing:
        raise SegkitError(f"missing: {', '.join(missing)}; run pip install -r requirements.txt")
    if of_notebooks:
        print(f"  without {', '.join(of_notebooks)}: for the notebooks run pip install 'segkit[notebooks]'")
    device = pick_device()
    print(f"device: {describe_device(device)}")
    baseline = _step_seconds(device, torch.float32)
    print(f"training step, 4 slices of 128 x 128, 117 structures: float32 {baseline:.2f} s")
    if fast_dtype(device) != torch.float32:
        fast = _step_seconds(device, fast_dtype(device))
        print(f"  {str(fast_dtype(device)).removeprefix('torch.')} {fast:.2f} s: {baseline / fast:.1f} times as fast")
    print("everything that segkit needs works")


def _missing(packages: Sequence[str]) -> list[str]:
    """Print the versions of packages; those that are not installed."""
    missing = []
    for package in packages:
        try:
            print(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    return missing


def _step_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Median seconds of five training steps after a warm-up."""
    model = on_device(ModelWithLoss(UNet2D(), torch.ones(117)), device)
    images = torch.randn(4, 1, 128, 128, device=device).contiguous(memory_format=torch.channels_last)
    codebook = torch.cat([torch.zeros(1, 117), torch.eye(117)]).bool().expand(4, -1, -1).to(device)
    codes = torch.arange(118, device=device).repeat(4, 140)[:, : 128 * 128].reshape(4, 128, 128)
    targets = Targets(codes, codebook, torch.ones(4, 117, dtype=torch.bool, device=device))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        with autocast(device, dtype):
            loss = model(images, targets)
        loss.backward()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[1:])[2]
