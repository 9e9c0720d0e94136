"""The loss of a batch in the terms that LOSS chooses (`choices.LOSSES`), and network and loss as one module.

`torch.nn.BCEWithLogitsLoss(pos_weight)` on dense planes is the reference that the tests compare with, for the Dice
term MONAI's DiceLoss. How they are computed: `segkit.head`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from segkit.choices import LOSSES, Terms
from segkit.chunks import Plan, Summing, unshared
from segkit.head import Asked, ChunkedHead
from segkit.slices import Targets


def head_loss(
    features: torch.Tensor,
    head: nn.Conv2d,
    targets: Targets,
    pos_weight: torch.Tensor,
    terms: Terms = LOSSES["bce"],
    number: torch.Tensor | None = None,
    together: Summing = unshared,
    plan: Plan | None = None,
) -> torch.Tensor:
    """The loss of a batch: a scalar that keeps the gradients of features, weight and bias.

    features (B, F, H, W), head a 1 x 1 convolution to C channels, pos_weight (C,). `number`: of annotated (sample,
    channel, pixel) in the effective batch, by which the cross-entropy is divided, so that accumulation and several
    GPUs give the same gradient as one large batch; those of this batch by default (`annotated_number`). The Dice term
    is of the structures and samples of this batch; where several processes have a share each of one batch, and all
    call this, `together` sums over them, and it is of the whole. Of parts, one after the other, it is their mean.
    `plan`: that of the same targets, terms and `together`, where it was made before.
    """
    own = annotated_number(targets)
    number = own if number is None else number
    share = own / number.clamp(min=1)
    plan = Plan(targets, terms, together) if plan is None else plan
    asked = Asked(plan, pos_weight, terms, number, share, together, torch.is_grad_enabled())
    # channels_last memory is rows of pixels already: nothing is copied
    rows = features.movedim(1, -1).flatten(0, -2)
    return ChunkedHead.apply(rows, head.weight.flatten(1), head.bias, asked)


def annotated_number(targets: Targets) -> torch.Tensor:
    """How many (sample, channel, pixel) of a batch are annotated, int64 scalar."""
    return targets.annotated.sum() * targets.codes[0].numel()


class ModelWithLoss(nn.Module):
    """`model(images, targets) -> loss`, so that autocast and data parallel wrappers see network and loss as one."""

    pos_weight: torch.Tensor

    def __init__(self, network: nn.Module, pos_weight: torch.Tensor, terms: Terms = LOSSES["bce"]):
        super().__init__()
        self.network: Any = network  # what it has: `segkit.networks`
        self.terms = terms
        self.register_buffer("pos_weight", pos_weight, persistent=False)

    def forward(
        self,
        images: torch.Tensor,
        targets: Targets,
        number: torch.Tensor | None = None,
        together: Summing = unshared,
    ) -> torch.Tensor:
        """The loss of a batch, a scalar, as `head_loss` computes it; images (B, in_channels, H, W) float."""
        [of_slices] = targets.by_slice()
        plan = Plan(of_slices, self.terms, together)
        _, features = targets.by_slice(self.network.decode(images))
        head = self.network.head
        with torch.autocast(images.device.type, enabled=False):
            return head_loss(features, head, of_slices, self.pos_weight, self.terms, number, together, plan)


def structure_frequencies(
    voxels: Iterable[tuple[Mapping[str, int], int]], label_map: Mapping[str, int]
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
    """w = min(sqrt(1 / f), cap): how much more an inside voxel counts than an outside one, (C,). A cap of 1 is BCE."""
    return frequencies.rsqrt().clamp(max=cap)


def start_bias(head: nn.Conv2d | nn.Conv3d, frequencies: torch.Tensor, pos_weight: torch.Tensor) -> None:
    """Set the head's bias to logit(w f / (w f + 1 - f)), what the loss would make of it without any image.

    frequencies, pos_weight: (C,), as many as the head has channels.
    From 0, where every voxel starts as half inside, the first hundreds of steps only lower the bias (Lin et al. 2017,
    https://arxiv.org/abs/1708.02002, section 4.1, has the idea for one class).
    """
    assert head.bias is not None  # every head has one
    with torch.no_grad():
        head.bias.copy_(torch.log(pos_weight * frequencies / (1 - frequencies)))
