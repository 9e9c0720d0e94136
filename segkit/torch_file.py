"""Files of torch, written, and read as data alone: no code, no byte that was not written, no more memory than bytes."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from segkit.errors import SegkitError, printable
from segkit.untrusted import check_file


def read_torch_file(path: Path, what: str) -> Any:
    """The content of a file that `torch.save` wrote; nothing in it is executed. `what`: what it is, for messages.

    Raises SegkitError that names a file which is not there, damaged or of an older kind, which holds anything but plain
    types and tensors, or would take more memory than it has bytes.
    """
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_sizes(content, path.stat().st_size)
    except FileNotFoundError as error:
        raise SegkitError(f"{path}: no such {what}; train first, or give the path of one") from error
    except Exception as error:  # torch reads a file of its own kind step by step, and raises whatever fails first
        reason = " ".join(printable(f"{type(error).__name__}: {error}").split())[:200]
        raise SegkitError(f"{path}: no readable {what} ({reason})") from error
    return content


def save_torch_file(path: Path, content: dict) -> None:
    """Write plain types and tensors; OSError where there is no room: torch tells it as a check of its own."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _check_archive(path: Path) -> None:
    """Raise BadZipFile for a damaged file, and for what `torch.save` does not write: entries that grow when read.

    torch does not look at the checksums: a bit that flipped on a disk would be another weight.
    """
    check_file(path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise zipfile.BadZipFile("expected as many bytes inside as the file has")
        damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def _check_sizes(content: object, most: int) -> None:
    """Raise ValueError where tensors at any depth claim more than `most` bytes: they may repeat what is stored."""
    for tensor in tensors_in(content):
        most -= tensor.numel() * tensor.element_size()
        if most < 0 or tensor.layout != torch.strided:
            raise ValueError("tensors that are larger than the file, or of a kind that it never holds")


def tensors_in(content: object) -> Iterator[torch.Tensor]:
    """The tensors in dictionaries and lists, however deep."""
    left, seen = [content], set()
    while left:
        each = left.pop()
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, Mapping | list | tuple | set) and id(each) not in seen:
            seen.add(id(each))  # what a file holds may hold itself
            left += each.values() if isinstance(each, Mapping) else each


def not_finite(weights: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors that hold NaN or infinite numbers."""
    return [name for name, tensor in weights.items() if not tensor.isfinite().all()]
