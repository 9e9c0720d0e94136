"""What a result came from: versions, state of the code, hardware, and a fingerprint of the data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from segkit.dataset import Data
from segkit.devices import describe_device
from segkit.ranks import Ranks

PACKAGES = ("segkit", "torch", "numpy", "nibabel", "blosc2", "isal", "monai")
"""Those whose version may change a result."""


def make_record(data: Data, ranks: Ranks) -> dict:
    """Plain types for history and checkpoint. The settings, seed included, and the split are stored beside it.

    versions: of Python and packages, None where one is not installed. git: see `git_state`. data: `data_fingerprint`.
    device, processes, threads: with what was computed; sums of floats differ in their last bits between them.
    """
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": f"{platform.system()} {platform.machine()}",
        "git": git_state(Path(__file__).resolve().parents[1]),
        "data": data_fingerprint(data),
        "device": describe_device(ranks.device),
        "processes": ranks.world,
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(folder: Path, parts: Sequence[str] = ()) -> dict | None:
    """The commit that the code in `folder` is of, and whether files differ from it; None where it is not a clone.

    parts: the files and folders in it that are asked about, all by default.
    """
    if not (folder / ".git").exists():  # an installed package: some other repository may hold the environment
        return None
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=20, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *parts])
        )
    except (OSError, subprocess.SubprocessError):  # no git, or a damaged clone: no reason to stop a training
        return None
    return {"commit": commit.strip(), "changed": bool(changes.strip())}


def data_fingerprint(data: Data) -> str:
    """SHA-256 over what was staged: the split, the channels, and of each subject its grid, its CT and its labels.

    The same for the same content wherever files lie and whenever they were copied; another one when a voxel of a CT or
    a mask, a grid, the choice of subjects, their split or their structures change.
    """
    subjects = {
        name: [list(subject.shape), subject.grid.affine.tolist(), subject.contents()]
        for name, subject in data.staged.items()
    }
    parts = {split: parts for split, parts in data.split.to_json().items() if split != "source"}
    content = json.dumps([subjects, data.label_map, parts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
