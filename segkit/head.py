"""The last layer with its loss and their gradients, chunk by chunk over pixels, from label codes.

117 full-size planes of logits, targets and gradients never exist: for some thousand pixels at a time the last 1 x 1
convolution, the loss and its gradient are computed and folded into the gradients of features, weight and bias.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from segkit.choices import Terms
from segkit.slices import Targets

CHUNK_PIXELS = 4096  # of 117 float32 channels: what two cores have near themselves
Summing = Callable[[torch.Tensor], torch.Tensor]
"""Adds what several processes have of the same, such as `segkit.ranks.Ranks.sum`."""
DICE_SMOOTH = 1.0
"""Pixels added to both halves of the Dice ratio, so that a structure of a few pixels has a gradient to follow."""


def unshared(own: torch.Tensor) -> torch.Tensor:
    """The Summing of one process, or of what is not to be shared: what it has itself."""
    return own


def code_members(codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a codebook, bool (K, C): the channels of each code, int64 (K, M) with M the largest set, and which count."""
    most = max(int(codebook.sum(1).max()), 1)
    counts, channels = torch.topk(codebook.to(torch.uint8), min(most, codebook.shape[1]), dim=1)
    return channels, counts.bool()


@dataclass(frozen=True)
class _Chunk:
    """Some thousand pixels of one sample, n, and A channels of it."""

    sample: int
    rows: slice  # its pixels within the sample
    swept: torch.Tensor | slice  # which of all channels, int64 (A,), or all of them
    x: torch.Tensor  # features (n, F)
    z: torch.Tensor  # logits (n, A), float32 or float64; the last to need them may write over them
    low: torch.Tensor  # room of the same shape in the features' precision
    room: Sequence[torch.Tensor]  # and thrice in that of the logits
    inside: torch.Tensor  # where in the flattened z a pixel is inside of a structure, int64 (T,), none twice
    channels: torch.Tensor  # of which structure, int64 (T,), among all channels


class _Batch:
    """A batch ready to be swept over: rows (B, P, F) of features, weight (C, F), bias (C,).

    bfloat16 features are multiplied as such. Of float16 all is computed in float32, because its range holds neither
    the derivative of a large weight nor that of a small probability.
    """

    def __init__(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: Targets):
        self.rows, self.bias, self.wide = rows, bias, _wide(bias.dtype)
        self.dtype = torch.float32 if rows.dtype == torch.float16 else rows.dtype
        self.weight = weight.to(self.dtype)
        self.size = CHUNK_PIXELS if rows.device.type == "cpu" else 32 * CHUNK_PIXELS
        self._find_members(targets)
        self._sweep_over(targets.annotated)
        # the same memory for every chunk: to get new memory takes longer than to compute with it
        length = min(self.size, rows.shape[1]) * len(bias)
        self.low = rows.new_empty(length, dtype=self.dtype)
        self.room = tuple(rows.new_empty(length, dtype=self.wide) for _ in range(4))

    def _find_members(self, targets: Targets) -> None:
        """List all (pixel, channel) that are inside, in the order of samples and pixels, for the whole batch at once.

        Few wait for the device that way, and background, most of a slice, costs nothing in the sweeps.
        """
        codebook = targets.codebook & targets.annotated[:, None]
        samples, codes, _ = codebook.shape
        table, counts = code_members(codebook.flatten(0, 1))
        first = torch.arange(0, samples * codes, codes, device=codebook.device)[:, None]
        flat = (targets.codes.flatten(1) + first).flatten()
        place, column = counts.index_select(0, flat).nonzero(as_tuple=True)
        self.channels = table[flat.index_select(0, place), column]
        self.sample, self.pixel = place // self.rows.shape[1], place % self.rows.shape[1]
        chunks = -(-self.rows.shape[1] // self.size)
        number = torch.bincount(self.sample * chunks + self.pixel // self.size, minlength=samples * chunks)
        self.ends = number.cumsum(0).tolist()
        self.voxels = torch.bincount(self.channels, minlength=len(self.bias))

    def _sweep_over(self, channels: torch.Tensor) -> None:
        """Choose the channels of each sample, bool (B, C); all that a pixel is inside of are among them."""
        self.channels_of_samples = channels
        self.swept = [slice(None) if all(row) else _places(row, self.rows.device) for row in channels.tolist()]
        among = (channels.cumsum(1) - 1)[self.sample, self.channels]
        self.inside = self.pixel % self.size * channels.sum(1)[self.sample] + among

    def only(self, channels: torch.Tensor) -> _Batch:
        """The batch swept over these channels alone, bool (C,)."""
        narrow = copy.copy(self)
        narrow._sweep_over(self.channels_of_samples & channels)
        return narrow

    def chunks(self) -> Iterator[_Chunk]:
        start = 0
        for sample, rows in enumerate(self.rows):
            swept, pixels = self.swept[sample], range(0, len(rows), self.size)
            weight, bias = self.weight[swept].T, self.bias[swept]
            for k, pixel in enumerate(pixels):
                these = slice(pixel, min(pixel + self.size, len(rows)))
                x, end = rows[these].to(self.dtype), self.ends[sample * len(pixels) + k]
                low, z, *room = (space[: len(x) * len(bias)].view(len(x), -1) for space in (self.low, *self.room))
                torch.add(torch.mm(x, weight, out=low), bias, out=z)
                yield _Chunk(sample, these, swept, x, z, low, room, self.inside[start:end], self.channels[start:end])
                start = end


def _places(row: list[bool], device: torch.device) -> torch.Tensor:
    """Where a list is true, int64, found without waiting for the device."""
    return torch.tensor([place for place, there in enumerate(row) if there], dtype=torch.int64, device=device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Asked:
    """What to compute of a batch, besides features, weight and bias, which have gradients."""

    targets: Targets
    pos_weight: torch.Tensor  # (C,)
    terms: Terms
    number: torch.Tensor  # of annotated (sample, channel, pixel) in the effective batch, by which a sum is divided
    share: torch.Tensor  # what part of it this batch is, by which its Dice term counts
    together: Summing  # over what is one batch to the Dice term
    gradients: bool


class ChunkedHead(torch.autograd.Function):
    """bce / number * sum over annotated (sample, channel, pixel) of the cross-entropy + dice * (1 - soft Dice).

    The soft Dice of a channel is over all samples of the batch that annotate it; their mean is over the channels that
    occur in the batch. rows (B, P, F), weight (C, F), bias (C,). In here autograd itself is always off.
    """

    @staticmethod
    def forward(ctx, rows, weight, bias, asked):
        """The loss, a scalar, and beside it its gradients, where `asked` for."""
        terms, batch = asked.terms, _Batch(rows, weight, bias, asked.targets)
        total = bias.new_zeros((), dtype=batch.wide)
        scale = 1 / asked.number.to(total).clamp(min=1)
        dice = _SoftDice(batch, asked, scale) if terms.dice else None
        grads = []
        if asked.gradients:
            grads = [torch.empty_like(rows, dtype=batch.dtype), torch.zeros_like(weight), torch.zeros_like(bias)]
        if terms.bce or asked.gradients:
            scaled = (weight * scale).to(batch.dtype)
            for chunk in batch.chunks():
                loss, slope = _loss_and_slope(chunk, asked, dice)
                total += loss
                if asked.gradients and slope is not None:
                    _add_gradients(grads, chunk, slope, scaled)
        for grad in grads[1:]:
            grad.mul_(scale)
        ctx.save_for_backward(*grads)
        ctx.dtypes = rows.dtype, weight.dtype, bias.dtype
        return total * scale + (terms.dice * asked.share.to(total) * dice.loss if dice is not None else 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Those gradients times `grad`."""
        grads = ctx.saved_tensors
        # nearly always it is 1, and a plane of features need not be written again; elsewhere asking means waiting
        if grad.device.type != "cpu" or grad != 1:
            grads = [saved * grad.to(_wide(saved.dtype)) for saved in grads]
        return (*(saved.to(dtype) for saved, dtype in zip(grads, ctx.dtypes, strict=True)), None)


def _add_gradients(grads: list[torch.Tensor], chunk: _Chunk, slope: torch.Tensor, scaled: torch.Tensor) -> None:
    """Into the gradients of rows, weight and bias, what a chunk's derivative by the logits, `slope` (n, A), adds.

    That of rows by `scaled`, the weight / number, and so once and for all; the others are still to be divided.
    """
    low = chunk.low.copy_(slope)
    torch.mm(low, scaled[chunk.swept], out=grads[0][chunk.sample, chunk.rows])
    grads[1][chunk.swept] += low.T @ chunk.x
    grads[2][chunk.swept] += slope.sum(0)


def _loss_and_slope(
    chunk: _Chunk, asked: Asked, dice: _SoftDice | None
) -> tuple[torch.Tensor | float, torch.Tensor | None]:
    """Summed cross-entropy, and the derivative of the loss by the logits (n, A), times `number`, where it is asked.

    Every pixel is first taken as outside of everything; then the few places that are inside are put right.
    """
    terms, p = asked.terms, torch.sigmoid(chunk.z, out=chunk.room[0])
    bent = dice.slope(chunk, p) if dice is not None and asked.gradients else None
    if not terms.bce:
        return 0.0, bent
    chosen, weights = chunk.z.flatten()[chunk.inside], asked.pos_weight[chunk.channels]
    mistaken, _ = _outside(chosen, terms.gamma)
    right, slope_inside = _outside(-chosen, terms.gamma)  # the loss where z is inside is that of -z outside
    if terms.gamma:
        outside, slope = _outside(chunk.z, terms.gamma)
        outside = outside.sum()
    else:
        outside, slope = _softplus_sum(chunk.z, p, chunk.room[1]), p
    loss = terms.bce * (outside + (weights * right - mistaken).sum())
    slope.view(-1)[chunk.inside] = -weights * slope_inside
    slope = slope if terms.bce == 1 else slope.mul_(terms.bce)
    return loss, slope if bent is None else slope.add_(bent)


def _outside(z: torch.Tensor, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """p ** gamma * softplus(z), the loss where a pixel is outside, p = sigmoid(z); and its derivative."""
    loss, p = F.softplus(z), torch.sigmoid(z)
    if not gamma:
        return loss, p
    factor = p**gamma
    return factor * loss, factor * (gamma * (1 - p) * loss + p)


def _softplus_sum(z: torch.Tensor, p: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Sum of softplus(z), given p = sigmoid(z): of max(z, 0) - log(1 - q), q = min(p, 1 - p). Writes over z and room.

    Exact for small p, as q is, and for large ones, where max(z, 0) dwarfs what 1 - p has lost. A logarithm takes
    longer than anything else here: eight factors share one, as 1 - (1 - a) (1 - b) = a + b (1 - a).
    """
    q = torch.minimum(p, torch.sub(1, p, out=room), out=room).view(-1)
    rest, one = len(q) % 8, q.new_ones(())
    logs, q = torch.log1p(-q[:rest]).sum(), q[rest:].view(8, -1)
    for _ in range(3):
        a, b = q.chunk(2)
        q = a.lerp_(one, b)
    return z.clamp_(min=0).sum() - logs - q.neg_().log1p_().sum()


class _SoftDice:
    """Soft Dice of each channel over a batch: (2 sum p y + s) / (sum p + sum y + s), s = DICE_SMOOTH.

    Of several processes that have a share of the batch each the sums are over all of them, and so is the loss. Its
    derivative by a process's own logits is divided by `scale`, which the sweep that adds it up multiplies by.
    """

    def __init__(self, batch: _Batch, asked: Asked, scale: torch.Tensor):
        reference = asked.together(batch.voxels).to(scale.dtype)
        sums = torch.cat([scale.new_zeros(2 * len(batch.bias)), asked.share.to(scale)[None]])  # added up at once
        both, predicted = sums[:-1].view(2, -1)
        for chunk in batch.only(reference > 0).chunks():  # channels that do not occur have no part in the mean
            p = torch.sigmoid(chunk.z, out=chunk.z)
            predicted[chunk.swept] += p.sum(0)
            both.index_add_(0, chunk.channels, p.flatten()[chunk.inside])
        sums = asked.together(sums)
        both, predicted = sums[:-1].view(2, -1)
        factor = asked.terms.dice * sums[-1] / scale
        occurs = (reference > 0).to(both.dtype)
        size, shared = predicted + reference + DICE_SMOOTH, 2 * both + DICE_SMOOTH
        weight = occurs / occurs.sum().clamp(min=1)
        self.loss = (weight * (1 - shared / size)).sum()
        # derivative of the loss by p: where a pixel is outside, and where it is inside
        self.outside = factor * weight * shared / size**2
        self.inside = self.outside - factor * 2 * weight / size

    def slope(self, chunk: _Chunk, p: torch.Tensor) -> torch.Tensor:
        """The derivative by the logits, (n, A)."""
        bend = torch.sub(1, p, out=chunk.room[2]).mul_(p)
        inside = bend.flatten()[chunk.inside] * self.inside[chunk.channels]
        slope = bend.mul_(self.outside[chunk.swept])
        slope.view(-1)[chunk.inside] = inside
        return slope
