"""Binary cross-entropy over all channels, computed with the head chunk by chunk over pixels, from label codes.

117 full-size planes of logits, targets and gradients never exist: for some thousand pixels at a time the last 1 x 1
convolution, the loss and its gradient are computed and folded into the gradients of features, weight and bias.
`torch.nn.BCEWithLogitsLoss(pos_weight)` on dense planes is the reference that the tests compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from segkit.slices import Targets
from segkit.unet import UNet2D

CHUNK_PIXELS = 8192  # fits the caches of a CPU core with 117 float32 channels


def code_members(codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a codebook, bool (K, C): the channels of each code, int64 (K, M) with M the largest set, and which count."""
    most = max(int(codebook.sum(1).max()), 1)
    counts, channels = torch.topk(codebook.to(torch.uint8), min(most, codebook.shape[1]), dim=1)
    return channels, counts.bool()


class _ChunkedHeadBCE(torch.autograd.Function):
    """sum over annotated (channel, pixel) of one sample of w y softplus(-z) + (1 - y) softplus(z), z = W x + b."""

    @staticmethod
    def forward(ctx, features, weight, bias, codes, codebook, annotated, pos_weight, wanted):
        """features (F, P), weight (C, F), bias (C,), codes (P,), codebook (K, C), annotated (C,), pos_weight (C,).

        `wanted`: whether gradients are computed; in here autograd itself is always off.
        """
        total = features.new_zeros((), dtype=_wide(bias.dtype))
        grads = [torch.empty_like(features), torch.zeros_like(weight), torch.zeros_like(bias)] if wanted else []
        channels, counts = code_members(codebook & annotated)
        weight_low = weight.to(features.dtype)
        chunk = CHUNK_PIXELS if features.device.type == "cpu" else 16 * CHUNK_PIXELS
        for start in range(0, features.shape[1], chunk):
            x = features[:, start : start + chunk]
            z = (x.T @ weight_low.T).to(total.dtype) + bias
            inside = codes[start : start + chunk]
            columns, present = channels[inside], counts[inside]
            chosen = z.gather(1, columns)
            weights = pos_weight[columns] * present
            total += (F.softplus(z).sum(0) * annotated).sum()
            # a member's term is w softplus(-z) instead of softplus(z); softplus(z) = softplus(-z) + z
            total += (weights * F.softplus(-chosen) - present * F.softplus(chosen)).sum()
            if wanted:
                slope = torch.sigmoid(z) * annotated
                part = torch.sigmoid(chosen)
                slope.scatter_add_(1, columns, weights * (part - 1) - present * part)
                low = slope.to(features.dtype)
                grads[0][:, start : start + chunk] = (low @ weight_low).T
                grads[1] += (x @ low).T.to(weight.dtype)
                grads[2] += slope.sum(0).to(bias.dtype)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return (*(grad.to(saved.dtype) * saved for saved in ctx.saved_tensors), None, None, None, None, None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_bce_sum(
    features: torch.Tensor, head: nn.Conv2d, targets: Targets, pos_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of a batch and the number of annotated (sample, channel, pixel) in it.

    features (B, F, H, W), head a 1 x 1 convolution to C channels, pos_weight (C,). The caller divides: by the number
    in the effective batch, so that accumulation and several GPUs give the same gradient as one large batch.
    """
    weight, wanted = head.weight[:, :, 0, 0], torch.is_grad_enabled()
    total = sum(
        _ChunkedHeadBCE.apply(
            sample.flatten(1), weight, head.bias, codes.flatten(), table, annotated, pos_weight, wanted
        )
        for sample, codes, table, annotated in zip(
            features, targets.codes, targets.codebook, targets.annotated, strict=True
        )
    )
    return total, targets.annotated.sum() * targets.codes[0].numel()


class ModelWithLoss(nn.Module):
    """`model(images, targets) -> loss`, so that autocast and data parallel wrappers see network and loss as one."""

    def __init__(self, network: UNet2D, pos_weight: torch.Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("pos_weight", pos_weight, persistent=False)

    def forward(self, images: torch.Tensor, targets: Targets) -> torch.Tensor:
        features = self.network.decode(images)
        with torch.autocast(images.device.type, enabled=False):
            total, number = head_bce_sum(features, self.network.head, targets, self.pos_weight)
        return total / number.clamp(min=1)


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
