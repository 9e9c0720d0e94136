"""The last layer with its loss and their gradients, chunk by chunk over pixels, from label codes.

117 full-size planes of logits, targets and gradients never exist: for some thousand pixels at a time the last 1 x 1
convolution, the loss and its gradient are computed and folded into the gradients of features, weight and bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from segkit.choices import Terms
from segkit.chunks import Chunk, Logits, Plan, Summing

DICE_SMOOTH = 1.0
"""Pixels added to both halves of the Dice ratio, so that a structure of a few pixels has a gradient to follow."""


@dataclass(frozen=True)
class Asked:
    """What to compute of a batch, besides features, weight and bias, which have gradients."""

    plan: Plan
    pos_weight: torch.Tensor  # (C,)
    terms: Terms
    number: torch.Tensor  # of annotated (sample, channel, pixel) in the effective batch, by which a sum is divided
    share: torch.Tensor  # what part of it this batch is, by which its Dice term counts
    together: Summing  # over what is one batch to the Dice term
    gradients: bool


class ChunkedHead(torch.autograd.Function):
    """bce / number * sum over annotated (sample, channel, pixel) of the cross-entropy + dice * (1 - soft Dice).

    The soft Dice of a channel is over all samples of the batch that annotate it; their mean is over the channels that
    occur in the batch. rows (N, F), weight (C, F), bias (C,). In here autograd itself is always off.
    """

    @staticmethod
    def forward(ctx, rows, weight, bias, asked):
        """The loss, a scalar, and beside it its gradients, where `asked` for."""
        terms, logits = asked.terms, Logits(rows, weight, bias, asked.plan)
        total = bias.new_zeros((), dtype=logits.wide)
        scale = 1 / asked.number.to(total).clamp(min=1)
        dice = _SoftDice(logits, asked, scale) if terms.dice else None
        grads = []
        if asked.gradients:
            grads = [torch.empty_like(rows, dtype=logits.dtype), torch.zeros_like(weight), torch.zeros_like(bias)]
        if terms.bce or asked.gradients:
            scaled = (weight * scale).to(logits.dtype)
            for chunk in logits.chunks(asked.plan.annotated):
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
            grads = [saved * grad.to(torch.promote_types(saved.dtype, torch.float32)) for saved in grads]
        return (*(saved.to(dtype) for saved, dtype in zip(grads, ctx.dtypes, strict=True)), None)


def _add_gradients(grads: list[torch.Tensor], chunk: Chunk, slope: torch.Tensor, scaled: torch.Tensor) -> None:
    """Into the gradients of rows, weight and bias, what a chunk's derivative by the logits, `slope` (n, A), adds.

    That of rows by `scaled`, the weight / number, and so once and for all; the others are still to be divided.
    """
    low = chunk.low.copy_(slope)
    torch.mm(low, scaled[chunk.swept], out=grads[0][chunk.rows])
    grads[1][chunk.swept] += low.T @ chunk.x
    grads[2][chunk.swept] += slope.sum(0)


def _loss_and_slope(
    chunk: Chunk, asked: Asked, dice: _SoftDice | None
) -> tuple[torch.Tensor | float, torch.Tensor | None]:
    """Summed cross-entropy, and the derivative of the loss by the logits (n, A), times `number`, where it is asked.

    Every pixel is first taken as outside of everything; then the few places that are inside are put right.
    """
    terms, p = asked.terms, torch.sigmoid(chunk.z, out=chunk.room[0])
    bent = dice.slope(chunk, p) if dice is not None and asked.gradients else None
    if not terms.bce:
        return 0.0, bent
    chosen, weights = chunk.z.flatten()[chunk.inside], asked.pos_weight[chunk.channel]
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

    Exact for small p, as q is, and for large ones, where max(z, 0) dwarfs what 1 - p has lost. A logarithm takes a CPU
    longer than anything else here: eight factors share one, as 1 - (1 - a) (1 - b) = a + b (1 - a). A GPU computes
    while it waits for memory, and so each of them by itself.
    """
    if z.device.type != "cpu":
        return F.softplus(z).sum()
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

    def __init__(self, logits: Logits, asked: Asked, scale: torch.Tensor):
        plan = asked.plan
        assert plan.occurring is not None  # channels that do not occur have no part in the mean
        sums = torch.cat([scale.new_zeros(2 * len(logits.bias)), asked.share.to(scale)[None]])  # added up at once
        both, predicted = sums[:-1].view(2, -1)
        for chunk in logits.chunks(plan.occurring):
            p = torch.sigmoid(chunk.z, out=chunk.z)
            predicted[chunk.swept] += p.sum(0)
            both.index_add_(0, chunk.channel, p.flatten()[chunk.inside])
        sums = asked.together(sums)
        both, predicted = sums[:-1].view(2, -1)
        factor, reference = asked.terms.dice * sums[-1] / scale, plan.reference.to(scale.dtype)
        occurs = (reference > 0).to(both.dtype)
        size, shared = predicted + reference + DICE_SMOOTH, 2 * both + DICE_SMOOTH
        weight = occurs / occurs.sum().clamp(min=1)
        self.loss = (weight * (1 - shared / size)).sum()
        # derivative of the loss by p: where a pixel is outside, and where it is inside
        self.outside = factor * weight * shared / size**2
        self.inside = self.outside - factor * 2 * weight / size

    def slope(self, chunk: Chunk, p: torch.Tensor) -> torch.Tensor:
        """The derivative by the logits, (n, A): that by p times p (1 - p)."""
        outside = self.outside[chunk.swept].expand_as(p)
        slope = torch.ops.aten.sigmoid_backward.grad_input(outside, p, grad_input=chunk.room[2])
        p = p.flatten()[chunk.inside]
        slope.view(-1)[chunk.inside] = self.inside[chunk.channel] * p * (1 - p)
        return slope
