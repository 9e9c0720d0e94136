"""The losses over all channels, computed with the head chunk by chunk over pixels, from label codes.

117 full-size planes of logits, targets and gradients never exist: for some thousand pixels at a time the last 1 x 1
convolution, the loss and its gradient are computed and folded into the gradients of features, weight and bias.
`torch.nn.BCEWithLogitsLoss(pos_weight)` on dense planes is the reference that the tests compare with, for the Dice
term MONAI's DiceLoss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from segkit.slices import Targets
from segkit.unet import UNet2D

CHUNK_PIXELS = 8192  # fits the caches of a CPU core with 117 float32 channels
FOCAL_GAMMA = 2.0
"""Exponent of the focal loss (Lin et al. 2017, https://arxiv.org/abs/1708.02002)."""
DICE_SMOOTH = 1.0
"""Pixels added to both halves of the Dice ratio, so that a structure of a few pixels has a gradient to follow."""


@dataclass(frozen=True)
class Terms:
    """What a loss is made of: bce * cross-entropy + dice * (1 - soft Dice), the cross-entropy with `gamma` focal."""

    bce: float = 1.0
    gamma: float = 0.0
    dice: float = 0.0
    helped: bool = True  # by positive weights and by an output that starts at each structure's frequency


LOSSES: Mapping[str, Terms] = {
    "bce": Terms(),
    "bce_dice": Terms(dice=1.0),
    "dice": Terms(bce=0.0, dice=1.0),
    "focal": Terms(gamma=FOCAL_GAMMA),
    "textbook": Terms(helped=False),
}
"""What LOSS chooses among. "textbook" is cross-entropy as it stands in textbooks, to compare with."""


def code_members(codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a codebook, bool (K, C): the channels of each code, int64 (K, M) with M the largest set, and which count."""
    most = max(int(codebook.sum(1).max()), 1)
    counts, channels = torch.topk(codebook.to(torch.uint8), min(most, codebook.shape[1]), dim=1)
    return channels, counts.bool()


@dataclass
class _Chunk:
    """Some thousand pixels of one sample."""

    sample: int
    start: int
    x: torch.Tensor  # features (F, N)
    z: torch.Tensor  # logits (N, C)
    columns: torch.Tensor  # channels of each pixel's structures (N, M)
    present: torch.Tensor  # which of them count (N, M)
    annotated: torch.Tensor  # (C,)


def _chunks(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: Targets) -> Iterator[_Chunk]:
    size = CHUNK_PIXELS if features.device.type == "cpu" else 16 * CHUNK_PIXELS
    for sample, flat in enumerate(features):
        annotated, codes = targets.annotated[sample], targets.codes[sample].flatten()
        channels, counts = code_members(targets.codebook[sample] & annotated)
        for start in range(0, flat.shape[1], size):
            x, inside = flat[:, start : start + size], codes[start : start + size]
            z = (x.T @ weight.T).to(_wide(bias.dtype)) + bias
            yield _Chunk(sample, start, x, z, channels[inside], counts[inside], annotated)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _ChunkedHead(torch.autograd.Function):
    """bce / number * sum over annotated (sample, channel, pixel) of the cross-entropy + dice * (1 - soft Dice).

    The soft Dice of a channel is over all samples of the batch that annotate it; their mean is over the channels that
    occur in the batch.
    """

    @staticmethod
    def forward(ctx, features, weight, bias, targets, pos_weight, terms, number, share, wanted):
        """features (B, F, P), weight (C, F), bias (C,), pos_weight (C,), number and share scalars.

        `share`: what part of the effective batch this one is, by which its Dice term counts. `wanted`: whether
        gradients are computed; in here autograd itself is always off.
        """
        low_weight = weight.to(features.dtype)
        total = features.new_zeros((), dtype=_wide(bias.dtype))
        dice = _SoftDice(_chunks(features, low_weight, bias, targets), len(bias), total) if terms.dice else None
        grads = [torch.empty_like(features), torch.zeros_like(weight), torch.zeros_like(bias)] if wanted else []
        scale, dice_weight = 1 / number.to(total.dtype).clamp(min=1), terms.dice * share.to(total.dtype)
        if terms.bce or wanted:
            for chunk in _chunks(features, low_weight, bias, targets):
                loss, slope = _cross_entropy(chunk, pos_weight, terms, wanted)
                total += loss
                if not wanted:
                    continue
                if dice is not None:
                    dice.add_slope(chunk, slope, dice_weight / scale)
                low = slope.to(features.dtype)
                grads[0][chunk.sample, :, chunk.start : chunk.start + len(low)] = (low @ low_weight).T
                grads[1] += (chunk.x @ low).T.to(weight.dtype)
                grads[2] += slope.sum(0).to(bias.dtype)
        ctx.save_for_backward(*(grad.mul_(scale.to(grad.dtype)) for grad in grads))
        return total * scale + (dice_weight * dice.loss if dice is not None else 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return (*(grad.to(saved.dtype) * saved for saved in ctx.saved_tensors), *[None] * 6)


def _cross_entropy(
    chunk: _Chunk, pos_weight: torch.Tensor, terms: Terms, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed over the annotated channels, and its derivative by the logits (N, C) where `wanted`.

    Every pixel is first taken as outside of everything; then the few members of its code are put right.
    """
    z, chosen = chunk.z, chunk.z.gather(1, chunk.columns)
    weights = pos_weight[chunk.columns]
    outside, outside_slope = _negative(z, terms, wanted)
    mistaken, mistaken_slope = _negative(chosen, terms, wanted)
    # a positive term of z is a negative one of -z
    right, right_slope = _negative(-chosen, terms, wanted)
    loss = (outside.sum(0) * chunk.annotated).sum() + (chunk.present * (weights * right - mistaken)).sum()
    if not wanted:
        return terms.bce * loss, None
    slope = outside_slope * chunk.annotated
    slope.scatter_add_(1, chunk.columns, chunk.present * (-weights * right_slope - mistaken_slope))
    return terms.bce * loss, slope if terms.bce == 1 else slope * terms.bce


def _negative(z: torch.Tensor, terms: Terms, wanted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """p ** gamma * softplus(z), the loss where a pixel is outside, p = sigmoid(z); and its derivative."""
    loss = F.softplus(z)
    if not terms.gamma:
        return loss, torch.sigmoid(z) if wanted else None
    p = torch.sigmoid(z)
    factor = p**terms.gamma
    return factor * loss, factor * (terms.gamma * (1 - p) * loss + p) if wanted else None


class _SoftDice:
    """Soft Dice of each channel over a batch: (2 sum p y + s) / (sum p + sum y + s), s = DICE_SMOOTH."""

    def __init__(self, chunks: Iterator[_Chunk], channels: int, like: torch.Tensor):
        both, predicted, reference = (like.new_zeros(channels) for _ in range(3))
        for chunk in chunks:
            p = torch.sigmoid(chunk.z)
            inside, columns = chunk.present.to(like.dtype), chunk.columns.flatten()
            predicted += p.sum(0) * chunk.annotated
            both.scatter_add_(0, columns, (p.gather(1, chunk.columns) * inside).flatten())
            reference.scatter_add_(0, columns, inside.flatten())
        occurs = (reference > 0).to(like.dtype)
        size, shared = predicted + reference + DICE_SMOOTH, 2 * both + DICE_SMOOTH
        weight = occurs / occurs.sum().clamp(min=1)
        self.loss = (weight * (1 - shared / size)).sum()
        # derivative of the loss by p: everywhere, and what is added where y is 1
        self.everywhere, self.inside = weight * shared / size**2, -2 * weight / size

    def add_slope(self, chunk: _Chunk, slope: torch.Tensor, factor: torch.Tensor) -> None:
        """Add factor * derivative by the logits to `slope` (N, C)."""
        p = torch.sigmoid(chunk.z)
        bend = p * (1 - p)
        slope += bend * (factor * self.everywhere * chunk.annotated)
        extra = bend.gather(1, chunk.columns) * self.inside[chunk.columns] * chunk.present
        slope.scatter_add_(1, chunk.columns, factor * extra)


def head_loss(
    features: torch.Tensor,
    head: nn.Conv2d,
    targets: Targets,
    pos_weight: torch.Tensor,
    terms: Terms = LOSSES["bce"],
    number: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of a batch: a scalar that keeps the gradients of features, weight and bias.

    features (B, F, H, W), head a 1 x 1 convolution to C channels, pos_weight (C,). `number`: of annotated (sample,
    channel, pixel) in the effective batch, by which the cross-entropy is divided, so that accumulation and several
    GPUs give the same gradient as one large batch; those of this batch by default (`annotated_number`). The Dice term
    is of the structures and samples of this batch alone: of parts it is a mean of its parts, not that of the whole.
    """
    own = annotated_number(targets)
    number = own if number is None else number
    weight, share = head.weight.flatten(1), own / number.clamp(min=1)
    return _ChunkedHead.apply(
        features.flatten(2), weight, head.bias, targets, pos_weight, terms, number, share, torch.is_grad_enabled()
    )


def annotated_number(targets: Targets) -> torch.Tensor:
    """How many (sample, channel, pixel) of a batch are annotated, int64 scalar."""
    return targets.annotated.sum() * targets.codes[0].numel()


class ModelWithLoss(nn.Module):
    """`model(images, targets) -> loss`, so that autocast and data parallel wrappers see network and loss as one."""

    def __init__(self, network: UNet2D, pos_weight: torch.Tensor, terms: Terms = LOSSES["bce"]):
        super().__init__()
        self.network = network
        self.terms = terms
        self.register_buffer("pos_weight", pos_weight, persistent=False)

    def forward(self, images: torch.Tensor, targets: Targets, number: torch.Tensor | None = None) -> torch.Tensor:
        targets, features = targets.by_slice(self.network.decode(images))
        with torch.autocast(images.device.type, enabled=False):
            return head_loss(features, self.network.head, targets, self.pos_weight, self.terms, number)


def structure_frequencies(
    voxels: Sequence[tuple[Mapping[str, int], int]], label_map: Mapping[str, int]
) -> torch.Tensor:
    """f = (voxels + 1) / (annotated voxels + 2) of each channel, float64 (C,).

    `voxels`: per training subject the voxels of each structure that it annotates, and its number of voxels.
    """
    inside, looked_at = torch.ones(len(label_map), dtype=torch.float64), torch.full((len(label_map),), 2.0).double()
    for counts, size in voxels:
        for name, count in counts.items():
            if name in label_map:
                inside[label_map[name]] += count
                looked_at[label_map[name]] += size
    return inside / looked_at


def positive_weights(frequencies: torch.Tensor, cap: float) -> torch.Tensor:
    """w = min(sqrt(1 / f), cap): how much more an inside voxel counts than an outside one. A cap of 1 is plain BCE."""
    return frequencies.rsqrt().clamp(max=cap)


def start_bias(head: nn.Conv2d, frequencies: torch.Tensor, pos_weight: torch.Tensor) -> None:
    """Set the head's bias to logit(w f / (w f + 1 - f)), what the loss would make of it without any image.

    From 0, where every voxel starts as half inside, the first hundreds of steps only lower the bias (Lin et al. 2017,
    https://arxiv.org/abs/1708.02002, section 4.1, has the idea for one class).
    """
    with torch.no_grad():
        head.bias.copy_(torch.log(pos_weight * frequencies / (1 - frequencies)))
