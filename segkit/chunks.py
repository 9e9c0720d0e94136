"""A batch cut into chunks of some thousand pixels: which pixels of each are inside of what, and their logits in turn.

What the targets tell is found beforehand, in a `Plan`: a GPU then goes from the network to its loss without being
waited for. The logits of a chunk exist as long as it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from segkit.choices import Terms
from segkit.slices import Targets

CHUNK_PIXELS = 4096  # of 117 float32 channels: what two cores have near themselves
DEVICE_CHUNK_PIXELS = 64 * CHUNK_PIXELS  # a GPU launches some 40 kernels for a chunk, whatever its size
Summing = Callable[[torch.Tensor], torch.Tensor]
"""Adds what several processes have of the same, such as `segkit.ranks.Ranks.sum`."""


def unshared(own: torch.Tensor) -> torch.Tensor:
    """The Summing of one process, or of what is not to be shared: what it has itself."""
    return own


def code_members(codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a codebook, bool (K, C): the channels of each code, int64 (K, M) with M the largest set, and which count."""
    most = max(int(codebook.sum(1).max()), 1)
    counts, channels = torch.topk(codebook.to(torch.uint8), min(most, codebook.shape[1]), dim=1)
    return channels, counts.bool()


@dataclass(frozen=True)
class Sweep:
    """Over which channels the chunks go."""

    channels: Sequence[torch.Tensor | slice]  # of each run of samples: which, int64 (A,), or all of them
    inside: torch.Tensor  # of each member where it is in the flattened logits (n, A) of its chunk, int64 (T,)


class Plan:
    """Of the targets of a batch: its members, each a (pixel, channel) that is inside, and how it is cut into chunks.

    Pixels count through the batch, sample by sample. Samples side by side that annotate the same are one run, and a
    chunk never reaches into another run: its logits are of the run's channels.

    pixel, channel: int64 (T,), the T members in the order of pixels. cuts: of each chunk its first pixel, the first one
    beyond, and its run. ends: how many members come before the end of each chunk. annotated: over all channels that a
    run annotates. For the Dice term, where it is asked for, reference: int64 (C,), how many members each channel has in
    all processes, which `together` sums up; occurring: over those channels alone that have any.
    """

    def __init__(self, targets: Targets, terms: Terms, together: Summing = unshared):
        codebook = targets.codebook & targets.annotated[:, None]
        samples, codes, channels = codebook.shape
        self.device, pixels = codebook.device, targets.codes[0].numel()
        # all members at once: few wait for the device that way, and background, most of a slice, costs nothing
        table, counts = code_members(codebook.flatten(0, 1))
        first = torch.arange(0, samples * codes, codes, device=self.device)[:, None]
        flat = (targets.codes.flatten(1) + first).flatten()
        self.pixel, column = counts.index_select(0, flat).nonzero(as_tuple=True)
        self.channel = table[flat.index_select(0, self.pixel), column]
        voxels = torch.bincount(self.channel, minlength=channels)
        self.reference = together(voxels) if terms.dice else voxels
        self._cut(targets.annotated, pixels)
        self.annotated = self._sweep(self.known)
        self.occurring = self._sweep(self.known & (self.reference > 0)) if terms.dice else None

    def _cut(self, annotated: torch.Tensor, pixels: int) -> None:
        """Into R runs, whose channels are `known`, bool (R, C), and these into chunks; where in its own a member is."""
        lengths = [len(list(same)) for _, same in groupby(annotated.tolist())]
        self.size = CHUNK_PIXELS if self.device.type == "cpu" else DEVICE_CHUNK_PIXELS
        self.cuts: list[tuple[int, int, int]] = []
        firsts = [sum(lengths[:run]) for run in range(len(lengths))]
        for run, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
            stop = (first + length) * pixels
            starts = range(first * pixels, stop, self.size)
            self.cuts += [(start, min(start + self.size, stop), run) for start in starts]
        self.known = annotated[firsts]
        starts, stops, runs = torch.tensor(self.cuts, device=self.device).T.contiguous()
        chunk = torch.bucketize(self.pixel, stops, right=True)
        self.place, self.run = self.pixel - starts[chunk], runs[chunk]
        self.ends = torch.bucketize(stops, self.pixel).tolist()

    def _sweep(self, channels: torch.Tensor) -> Sweep:
        """Over these channels of each run, bool (R, C); the channels of all members are among them."""
        among = (channels.cumsum(1) - 1)[self.run, self.channel]
        swept = [slice(None) if all(row) else self._places(row) for row in channels.tolist()]
        return Sweep(swept, self.place * channels.sum(1)[self.run] + among)

    def _places(self, row: list[bool]) -> torch.Tensor:
        """Where a list is true, int64, found without waiting for the device."""
        places = [place for place, there in enumerate(row) if there]
        return torch.tensor(places, dtype=torch.int64, device=self.device)


@dataclass(frozen=True)
class Chunk:
    """Some thousand pixels, n, and A channels of them."""

    rows: slice  # its pixels within the batch
    swept: torch.Tensor | slice  # which of all channels, int64 (A,), or all of them
    x: torch.Tensor  # features (n, F)
    z: torch.Tensor  # logits (n, A), float32 or float64; the last to need them may write over them
    low: torch.Tensor  # room of the same shape in the features' precision
    room: Sequence[torch.Tensor]  # and thrice in that of the logits
    inside: torch.Tensor  # where in the flattened z a pixel is inside of a structure, int64 (T,), none twice
    channel: torch.Tensor  # of which structure, int64 (T,), among all channels


class Logits:
    """Those of a planned batch, a chunk at a time, from rows (N, F) of features, weight (C, F), bias (C,).

    bfloat16 features are multiplied as such. Of float16 all is computed in float32, because its range holds neither
    the derivative of a large weight nor that of a small probability.
    """

    def __init__(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, plan: Plan):
        self.rows, self.bias, self.plan = rows, bias, plan
        self.wide = torch.float64 if bias.dtype == torch.float64 else torch.float32
        self.dtype = torch.float32 if rows.dtype == torch.float16 else rows.dtype
        self.weight = weight.to(self.dtype)
        # the same memory for every chunk: to get new memory takes longer than to compute with it
        length = min(plan.size, len(rows)) * len(bias)
        self.low = rows.new_empty(length, dtype=self.dtype)
        self.room = tuple(rows.new_empty(length, dtype=self.wide) for _ in range(4))

    def chunks(self, sweep: Sweep) -> Iterator[Chunk]:
        """One chunk after the other; what one of them holds is gone with the next."""
        begin = 0
        for (start, stop, run), end in zip(self.plan.cuts, self.plan.ends, strict=True):
            these, swept = slice(start, stop), sweep.channels[run]
            weight, bias = self.weight[swept].T, self.bias[swept]
            x, members = self.rows[these].to(self.dtype), slice(begin, end)
            low, z, *room = (space[: len(x) * len(bias)].view(len(x), -1) for space in (self.low, *self.room))
            torch.add(torch.mm(x, weight, out=low), bias, out=z)
            yield Chunk(these, swept, x, z, low, room, sweep.inside[members], self.plan.channel[members])
            begin = end
