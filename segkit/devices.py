"""Which device there is and in which precision it computes fast."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from segkit.errors import SegkitError


def best_device() -> torch.device:
    """The kind of device that there is, the fastest one. Nothing is computed on it."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1", "mps"), or the best there is.

    Raises SegkitError for one that is missing, or on which this torch cannot compute.
    """
    try:
        device = best_device() if name is None else torch.device(name)
        torch.ones(1, device=device).add_(1).item()  # a computation: torch may lack it for a GPU that it sees
    except (RuntimeError, AssertionError) as error:
        why = "torch knows no such device" if "device string" in str(error) else str(error).splitlines()[0]
        asked = f"DEVICE = {name!r}" if name is not None else f"DEVICE = None, here {best_device()},"
        raise SegkitError(
            f"{asked} is not usable here ({why}): give cpu, cuda, cuda:1 or mps; None: the best there is"
        ) from error
    return device


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself (AMX or AVX512-BF16)."""
    # torch keeps these under private names; where a release drops them, float32 is the safe answer
    probes = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(probe() for probe in probes if probe is not None)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device is good at it (CUDA from Ampere, CPU with AMX or AVX512-BF16), else float32.

    float16 on the CUDA devices before that have fast matrices for it (Volta and Turing).
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Computes convolutions in `dtype` inside the `with`; nothing changes for float32."""
    low = dtype if dtype != torch.float32 else torch.bfloat16  # what is not enabled must still be a low precision
    return torch.autocast(device.type, dtype=low, enabled=dtype != torch.float32)


def describe_device(device: torch.device) -> str:
    """One line for a person: the device, its memory or threads, and the precision it is fast at."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        what = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {torch.cuda.device_count()} in all"
    else:
        what = f"{torch.get_num_threads()} threads"
    return f"{device.type} ({what}), computes in {str(fast_dtype(device)).removeprefix('torch.')}"
