"""What was measured on, and what it can do at most: rates of matrices, memory and decompression."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from isal import igzip

from benchmarks.sides import ROOT
from segkit.devices import describe_device, fast_dtype, pick_device
from segkit.record import git_state

OURS = ("torch", "numpy", "nibabel", "isal", "blosc2", "scikit-image", "scipy", "plotly")
PEERS = ("torch", "numpy", "nnunetv2", "monai", "surface-distance", "dynamic-network-architectures", "blosc2")


def describe(threads: int, device: str | None, peers_python: str | None) -> dict:
    """Plain types: processor, memory, threads, system, commit, versions of both environments, rates."""
    where = pick_device(device)
    return {
        "processor": _processor(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "device": describe_device(where),
        "git": commit(),
        **versions(peers_python),
        "rates": rates(where),
    }


def commit() -> dict | None:
    """`git_state` of what is measured: the page itself may differ from it."""
    return git_state(ROOT, ("segkit", "benchmarks", "notebooks"))


def versions(peers_python: str | None) -> dict[str, dict]:
    """versions: of segkit's environment; peers: of theirs, empty where there is none."""
    return {
        "versions": {name: _version(name) for name in OURS},
        "peers": _versions_there(peers_python, PEERS) if peers_python else {},
    }


def rates(device: torch.device) -> dict[str, float]:
    """What this machine does at most: matrix_gflops in the fast precision, memory_gb_s copied, gunzip_mb_s."""
    size = 4096 if device.type == "cuda" else 2048
    matrix = torch.randn(size, size, device=device, dtype=fast_dtype(device))
    block = np.ones(2**28, np.uint8)
    target = np.empty_like(block)
    packed = igzip.compress(np.random.default_rng(0).integers(0, 4, 2**24, np.uint8).tobytes())
    return {
        "matrix_gflops": round(2 * size**3 / _fastest(lambda: _finished(matrix @ matrix)) / 1e9),
        "memory_gb_s": round(2 * block.nbytes / _fastest(lambda: np.copyto(target, block)) / 1e9, 1),
        "gunzip_mb_s": round(2**24 / _fastest(lambda: igzip.decompress(packed)) / 1e6),
    }


def _finished(product: torch.Tensor) -> None:
    if product.is_cuda:
        torch.cuda.synchronize()


def _fastest(work: Callable[[], object], rounds: int = 5) -> float:
    taken = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions_there(python: str, packages: Sequence[str]) -> dict[str, str | None]:
    code = (
        "import importlib.metadata as m, json, sys\n"
        "there = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({name: there.get(name) for name in sys.argv[1:]}))"
    )
    try:
        done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return json.loads(done.stdout)
