"""A model as others can open it: weights and readable JSON in one safetensors file, which holds no code.

Layout: https://github.com/huggingface/safetensors. Its metadata has one entry, "segkit": the content of a checkpoint
but the weights as JSON, with a SHA-256 over all of it, because the format itself has no checksum.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import ModuleType

import torch

from segkit.errors import SegkitError, UnwritableError
from segkit.runs import write_whole
from segkit.untrusted import check_file

SUFFIX = ".safetensors"
ENTRY = "segkit"
_NAME = re.compile(r"(model|member_[1-9]\d{0,3}_of_(?P<members>[1-9]\d{0,3}))\.safetensors")
_TYPES = (torch.float32, torch.int64)  # batch normalisation counts its batches


def shared_name(number: int, members: int) -> str:
    """The name of the file of network `number` (from 1): it says of how many, so that a missing one shows."""
    return f"model{SUFFIX}" if members == 1 else f"member_{number}_of_{members}{SUFFIX}"


def shared_files(folder: Path) -> list[Path]:
    """The files of the model shared in `folder`, by member; none where there is no such model.

    Raises SegkitError that names what is missing of an ensemble, or is there too.
    """
    found = [_NAME.fullmatch(path.name) for path in sorted(folder.glob(f"*{SUFFIX}")) if path.is_file()]
    there = {name[0] for name in found if name}
    members = max((int(name["members"] or 1) for name in found if name), default=1)
    expected = [shared_name(number, members) for number in range(1, members + 1)]
    if there and there != set(expected):
        missing, other = sorted(set(expected) - there), sorted(there - set(expected))
        raise SegkitError(
            f"{folder}: no whole model: missing {', '.join(missing[:4]) or 'nothing'}, not of it "
            f"{', '.join(other[:4]) or 'nothing'}; fetch the folder again, or give one file of it"
        )
    return [folder / name for name in expected if name in there]


def write_weights_file(path: Path, content: dict) -> Path:
    """Write a checkpoint's content, whole or not at all.

    content: "weights", the network's `state_dict` (float32, int64), and JSON types. Raises SegkitError that names the
    file for anything else, and where it cannot be written.
    """
    safetensors = _library()
    weights = content["weights"]
    try:
        rest = {name: value for name, value in content.items() if name != "weights"}
        rest = json.loads(json.dumps(rest, allow_nan=False))  # as it will be read
        text = json.dumps({**rest, "sha256": _digest(rest, weights)})
        # written here: the library's own files can be read by nobody but their owner
        packed = safetensors.torch.save(weights, {ENTRY: text})
        return write_whole(path, lambda temporary: temporary.write_bytes(packed))
    except UnwritableError:
        raise
    except (TypeError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise SegkitError(f"{path}: cannot be written: {_short(error)}") from error


def read_weights_file(path: Path) -> dict:
    """The content that `write_weights_file` was given. Raises SegkitError that names a file which is not as written."""
    safetensors = _library()
    try:
        check_file(path)
        path.open("rb").close()  # of a file that may not be read the library says that it is not there
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(ENTRY)
            # a copy: the file may change or go while the network is used
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, it is no dict
        content = None if text is None else json.loads(text)
    except FileNotFoundError as error:
        raise SegkitError(f"{path}: no such checkpoint; train first, or give the path of one") from error
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:  # also RecursionError
        raise SegkitError(f"{path}: no readable checkpoint ({_short(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise SegkitError(f"{path}: no checkpoint of segkit: expected an object {ENTRY!r} in its metadata")
    stated = content.pop("sha256", None)
    try:
        digest = _digest(content, weights)
    except (ValueError, TypeError, RecursionError) as error:
        raise SegkitError(f"{path}: damaged checkpoint: {_short(error)}") from error
    if stated != digest:
        raise SegkitError(f"{path}: damaged checkpoint: its content is not what its SHA-256 is of; fetch it again")
    return {**content, "weights": weights}


def _digest(content: dict, weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the JSON and every tensor with its name, type and shape. ValueError for what neither may hold."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode())
    for name, tensor in sorted(weights.items()):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _TYPES:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"weights of another type than float32: {name[:80]!r} is {kind}")
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _library() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise SegkitError(
            "shared models are safetensors files, and safetensors is not installed: run pip install 'segkit[share]' "
            "(in a clone: pip install -e '.[share]')"
        ) from error
    return safetensors
