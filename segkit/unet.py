"""The 2D U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597), padded, with normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from segkit.choices import NORMS, find
from segkit.errors import SegkitError


class DoubleConv(nn.Sequential):
    """(3 x 3 convolution -> normalisation -> ReLU) twice."""

    def __init__(self, in_channels: int, out_channels: int, norm: str):
        layers: list[nn.Module] = []
        for inputs in (in_channels, out_channels):
            layers += [
                nn.Conv2d(inputs, out_channels, 3, padding=1, bias=False),
                find(NORMS[norm])(out_channels),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class Up(nn.Module):
    """Doubles the size, joins the skip connection, convolves."""

    def __init__(self, in_channels: int, out_channels: int, norm: str):
        super().__init__()
        self.enlarge = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.convolve = DoubleConv(2 * out_channels, out_channels, norm)

    def forward(self, below: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Maps below (B, in_channels, H, W) and a skip (B, out_channels, 2 H, 2 W) -> (B, out_channels, 2 H, 2 W)."""
        # the convolution of both joined, as the sum of two: joined they would be copied, and kept for the gradient
        first, *rest = self.convolve
        assert isinstance(first, nn.Conv2d)
        of_skip, of_below = first.weight.split(skip.shape[1], 1)
        x = F.conv2d(skip, of_skip, padding=1)
        x += F.conv2d(self.enlarge(below), of_below, padding=1)
        for layer in rest:
            x = layer(x)
        return x


class UNet2D(nn.Module):
    """Images (B, in_channels, H, W) -> logits (B, out_channels, H, W), one independent channel a structure.

    features: channels of the encoder's levels; the bottleneck has twice the last. H and W are multiples of
    2 ** len(features), 16 for the four levels of the default. norm: a name in
    `choices.NORMS`. A sigmoid of a logit is the channel's probability.
    """

    def __init__(
        self, in_channels: int = 1, out_channels: int = 117, features: Sequence[int] = (32, 64, 128, 256),
        norm: str = "instance",
    ):  # fmt: skip
        super().__init__()
        if not features or min(features) < 1 or out_channels < 1 or in_channels < 1:
            raise SegkitError(
                f"FEATURES = {tuple(features)}, {in_channels} -> {out_channels} channels: expected 1 or more"
            )
        if norm not in NORMS:
            raise SegkitError(f"NORM = {norm!r}: expected one of {', '.join(NORMS)}")
        self.in_channels, self.features = in_channels, tuple(features)
        widths = (*features, 2 * features[-1])
        self.down = nn.ModuleList(DoubleConv(a, b, norm) for a, b in pairwise((in_channels, *features)))
        self.pool = nn.MaxPool2d(2)
        self.bottleneck = DoubleConv(features[-1], widths[-1], norm)
        self.up = nn.ModuleList(Up(b, a, norm) for a, b in reversed(list(zip(features, widths[1:], strict=True))))
        self.head = nn.Conv2d(features[0], out_channels, 1)

    def decode(self, images: torch.Tensor) -> torch.Tensor:
        """The last feature maps before the head: (B, features[0], H, W)."""
        check_sides(images.shape[2:], 2 ** len(self.down))
        x, skips = images, []
        for level in self.down:
            skips.append(level(x))
            x = self.pool(skips[-1])
        x = self.bottleneck(x)
        for level, skip in zip(self.up, reversed(skips), strict=True):
            x = level(x, skip)
        return x

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits of images (B, in_channels, H, W): (B, out_channels, H, W)."""
        return self.head(self.decode(images))


def check_sides(sides: Sequence[int], step: int) -> None:
    """SegkitError unless all sides of an image are multiples of `step`, what a network divides them by."""
    if any(side % step for side in sides):
        raise SegkitError(f"images of {tuple(sides)} pixels: expected multiples of {step}")
