"""Batches that are too large for the memory: computed in parts, one after the other, gradients accumulated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import nn

from segkit.errors import SegkitError
from segkit.slices import SliceBatch

Result = TypeVar("Result")
CGROUPS = Path("/sys/fs/cgroup")
USABLE = 0.9
"""Share of the free memory that a step may take."""
STEP_TO_SAVED = 1.5
"""Peak of a step over what autograd keeps between forward and backward: gradients on their way and the workspace of
convolutions come on top. Measured for the U-Net on a CPU: 0.9 to 1.1 in bfloat16, 1.4 to 1.7 in float32."""
OUT_OF_MEMORY = ("CUDA error: out of memory", "MPS backend out of memory", "_STATUS_ALLOC_FAILED")
"""How the driver, Apple's GPUs, cuBLAS and cuDNN say that memory ran out, in errors of no kind of their own."""
NO_ENGINE = "unable to find an engine"
"""What cuDNN says where no way to compute a convolution works, mostly for want of memory: pytorch issue 108645."""


def free_bytes(cgroups: Path = CGROUPS) -> int:
    """Memory that this process may still take: what the machine has available, or less in a container.

    A container's limit is that of version 2 control groups, as Docker and Kubernetes set it: memory.max -
    memory.current, to which the cache of files (memory.stat) comes back: it is given up where memory is asked for.
    """
    available = psutil.virtual_memory().available
    try:
        limit, used = ((cgroups / name).read_text().strip() for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (cgroups / "memory.stat").read_text().splitlines())
        cache = int(parts.get("inactive_file", 0)) + int(parts.get("active_file", 0))
        return max(min(available, int(limit) - int(used) + cache), 0)
    except (OSError, ValueError):  # no such file system, or "max"
        return available


def step_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """What a step of which `forward` computes the loss takes at its peak, without the weights: an estimate.

    `forward` runs once. Counted is what autograd keeps for the backward pass, every storage once.
    """
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()  # kept until all is counted: a storage that is freed early may be used twice
    del loss
    return round(STEP_TO_SAVED * sum(kept.values()))


def parts_that_fit(slices: int, slice_bytes: int, free: int, parts: int = 1) -> int:
    """In how many parts `slices` are computed so that each fits into `free`: `parts`, doubled as often as needed."""
    while parts < slices and -(-slices // parts) * slice_bytes > USABLE * free:
        parts = min(2 * parts, slices)
    return parts


def halve_until_it_fits(attempt: Callable[[int], object], slices: int, parts: int) -> int:
    """Call `attempt(parts)` with twice the parts as long as a GPU's memory runs out; the parts that went through.

    Raises SegkitError where not even one slice at a time does.
    """
    while True:
        try:
            attempt(parts)
            return parts
        except RuntimeError as error:
            last, no_engine = parts >= slices, NO_ENGINE in str(error)
            if not (no_engine or _is_out_of_memory(error)) or (last and no_engine):  # then it was not for memory
                raise
            if last:
                raise SegkitError(
                    f"a single slice does not fit into the memory of the device ({str(error).splitlines()[0]}): "
                    "lower TARGET_SHAPE or FEATURES, or take DEVICE = 'cpu'"
                ) from error
        parts = min(2 * parts, slices)  # after the except block, which holds on to what the attempt made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def no_second_try(parts: int) -> Iterator[None]:
    """SegkitError that says what to do where a GPU's memory runs out in the block, in a step of several processes.

    They wait for each other inside it, so that none can try it again alone.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise SegkitError(
            f"the memory of the device ran out ({str(error).splitlines()[0]}), and among several processes none can "
            f"try a step again: go on with ACCUMULATE = {2 * parts} and RESUME = True, or lower BATCH_SIZE"
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def in_parts(compute: Callable[[SliceBatch], Result], batch: SliceBatch, parts: int = 1) -> tuple[list[Result], int]:
    """`compute` of each of the parts of a batch, and how many those are: more than `parts` where memory asks for it."""
    results: list[Result] = []

    def attempt(number: int) -> None:
        results[:] = [compute(part) for part in batch.parts(min(number, len(batch)))]

    return results, halve_until_it_fits(attempt, len(batch), parts)


def probe(model: nn.Module, learn: Callable[[nn.Module, int], None], slices: int, parts: int) -> int:
    """The parts in which `learn(copy of the model, parts)` goes through: nothing of the model itself changes.

    Before processes are joined: one that ran out of memory in the middle of a step would leave the others waiting.
    """
    return halve_until_it_fits(lambda number: learn(copy.deepcopy(model), number), slices, parts)


def message(batch_size: int, slices: int, parts: int, why: str, partly: Sequence[str]) -> str:
    """What a person is told when `slices` of a batch are computed in parts: why, how, and what is not the same.

    `partly`: what sees one part at a time.
    """
    see = "sees" if len(partly) == 1 else "see"
    same = f"but {' and '.join(partly)} {see} one part at a time" if partly else "and the result is the same"
    return (
        f"BATCH_SIZE = {batch_size}: {why}; each batch is computed in {parts} parts of at most "
        f"{-(-slices // parts)} slices and their gradients are added up. A step still learns from the whole batch, "
        f"{same}. A lower BATCH_SIZE or TARGET_SHAPE avoids it."
    )
