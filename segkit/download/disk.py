"""What the steps share: where unfinished work lies, how much is read at once, room on the disk, bars and hashes."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from tqdm.auto import tqdm

from segkit.errors import SegkitError

WORK = ".download"  # hidden folder of what is not finished
BLOCK = 1 << 18  # bytes read at once


def need_space(folder: Path, needed: float, purpose: str) -> None:
    """Raise SegkitError where the disk of `folder` has fewer than `needed` bytes left for `purpose`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SegkitError(
            f"{folder}: {purpose} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "make room and run it again, or choose another folder"
        )


def progress_bar(title: str, total: int, progress: bool) -> tqdm:
    """A bar over `total` bytes; silent without `progress`."""
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=not progress)


def md5(path: Path, progress: bool) -> hashlib._Hash:
    """The running hash of a file's bytes; more can be added to it."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, progress_bar(f"checking {path.name}", path.stat().st_size, progress) as bar:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest
