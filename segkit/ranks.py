"""Several processes that train one model: who this one is, what its share is, and how results are put together.

One process is the normal case and needs nothing. `accelerate launch` (or torchrun) starts several and tells each by
environment variables; Hugging Face accelerate then joins them, whatever the hardware.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed
from torch import nn

from segkit.devices import best_device, pick_device
from segkit.errors import SegkitError

LONGEST_WAIT = timedelta(days=2)
"""For the slowest process: the first one may stage a whole data set while the others wait."""


@dataclass(frozen=True)
class Ranks:
    """This process (`rank`, from 0) among `world`, and the device it computes on."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints: exactly one does."""
        return self.rank == 0

    def share_each(self, batches: Sequence[Sequence[int]]) -> list[list[int]]:
        """This rank's part of every batch, for training: together the ranks take each number once.

        A rank for which a batch is too small repeats its first number; `mine` tells that it does not count.
        """
        return [list(batch[self.rank :: self.world]) or list(batch[:1]) for batch in batches]

    def mine(self, numbers: Sequence[int], batch_size: int) -> bool:
        """Whether a share of `share_each`, of batches of `batch_size` that start at its multiples, counts."""
        return numbers[0] % batch_size % self.world == self.rank

    def share_whole(self, batches: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Every `world`th batch as it is, for validation: each is then computed exactly as one process would."""
        return list(batches[self.rank :: self.world])

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on each of them; `values` where there is one."""
        return self._reduced(values, torch.distributed.ReduceOp.SUM)

    def largest(self, value: int) -> int:
        """The largest over all ranks, on each of them."""
        return int(self._reduced(torch.tensor(value, device=self.device), torch.distributed.ReduceOp.MAX))

    def _reduced(self, values: torch.Tensor, how: torch.distributed.ReduceOp.RedOpType) -> torch.Tensor:
        if self.world == 1:
            return values
        values = values.to(self.device, copy=True)
        torch.distributed.all_reduce(values, how)
        return values

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            torch.distributed.barrier()

    def joined(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over ranks during `backward` where there are several."""
        if self.world == 1:
            return model
        # a 1 x 1 kernel has two memory layouts that are the same: torch warns of the other one in every run
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def align(self, model: nn.Module) -> None:
        """Give every rank the first one's buffers: after a step statistics of batch normalisation are a rank's own."""
        if self.world > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first rank runs the block alone, then the others: what it made on disk is there for them."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


def join_ranks(device: str | None = None) -> Ranks:
    """Join the processes that were launched together; alone where there are none. `device` as in DEVICE.

    Raises SegkitError for a device that is not there.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # of several processes each gets a GPU of its own below: none of them touches the first one before
    alone = best_device() if launched > 1 and device is None else pick_device(device)
    if launched == 1:
        return Ranks(alone)
    from accelerate import PartialState  # needed here alone

    state = PartialState(cpu=alone.type == "cpu", timeout=LONGEST_WAIT)
    if state.num_processes != launched:
        raise SegkitError(
            f"{launched} processes were launched, but on {alone.type} accelerate joins {state.num_processes}: give "
            "DEVICE = None on GPUs, or launch one process"
        )
    return Ranks(state.device, state.process_index, state.num_processes)


def leave_ranks(ranks: Ranks) -> None:
    """End what `join_ranks` began, so that the processes end quietly."""
    if ranks.world > 1:
        torch.distributed.destroy_process_group()
