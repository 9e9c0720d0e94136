"""The networks that MODEL chooses among (`choices.MODELS`), built from what a checkpoint stores of them.

Each is a class that takes in_channels, out_channels and features, and has `decode(images)`, the last feature maps
before the head, (B, features[0], ...); `head`, a convolution of one pixel to a channel a structure; `forward`, which is
both; and `in_channels`. So one chunked head and one loss serve all. One that labels several slices at a time says so by
`depth`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from segkit.choices import MODELS, find
from segkit.devices import fast_dtype
from segkit.errors import SegkitError
from segkit.settings import TrainSettings
from segkit.unet import check_sides

Model = TypeVar("Model", bound=nn.Module)


class AttentionUNet(nn.Module):
    """Images (B, in_channels, H, W) -> logits (B, out_channels, H, W); MONAI's, with this package's head.

    A U-Net whose skip connections pass a gate that weighs every place by what the level below saw there (Oktay et al.
    2018, https://arxiv.org/abs/1804.03999). features, H and W as in UNet2D.
    """

    def __init__(self, in_channels: int = 1, out_channels: int = 117, features: Sequence[int] = (32, 64, 128, 256)):
        super().__init__()
        self.in_channels, self.step = in_channels, 2 ** len(features)
        channels, strides = (*features, 2 * features[-1]), (2,) * len(features)
        whole = _monai_nets().AttentionUnet(2, in_channels, features[0], channels, strides)
        self.body = whole.model[:2]  # the third is a head of its own
        self.head = nn.Conv2d(features[0], out_channels, 1)

    def decode(self, images: torch.Tensor) -> torch.Tensor:
        """The last feature maps before the head: (B, features[0], H, W)."""
        check_sides(images.shape[2:], self.step)
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits of images (B, in_channels, H, W): (B, out_channels, H, W)."""
        return self.head(self.decode(images))


class UNet3D(nn.Module):
    """Slabs (B, D, H, W) of neighbouring slices -> logits (B, out_channels, D, H, W), a label for every slice.

    Of blocks of MONAI's DynUNet, the network of nnU-Net (Isensee et al. 2021,
    https://doi.org/10.1038/s41592-020-01008-z): two 3 x 3 x 3 convolutions a level, halved by the first of them and
    doubled by transposed ones, a skip connection on every level, the finest included. MONAI's UNet lacks that one, and
    its BasicUNet has four levels whatever FEATURES are. Normalised within each sample: a batch holds few slabs.

    features: channels of the levels; the bottleneck has twice the last. D, H and W are multiples of
    2 ** len(features). depth: D of a slab as it was trained.
    """

    in_channels = 1

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 117,
        features: Sequence[int] = (32, 64, 128, 256),
        depth: int = 16,
    ):
        super().__init__()
        self.depth, self.step = depth, 2 ** len(features)
        if in_channels != 1 or depth % self.step:
            raise SegkitError(
                f"unet3d of {in_channels} channels and {depth} slices: expected 1 channel, a multiple of {self.step}"
            )
        widths = (*features, 2 * features[-1])
        whole = _monai_nets().DynUNet(
            3, 1, 1, [3] * len(widths), [1, *[2] * len(features)], [2] * len(features), filters=widths
        )
        self.down = nn.ModuleList([whole.input_block, *whole.downsamples, whole.bottleneck])
        self.up = whole.upsamples
        self.head = nn.Conv3d(features[0], out_channels, 1)

    def decode(self, images: torch.Tensor) -> torch.Tensor:
        """The last feature maps before the head: (B, features[0], D, H, W)."""
        check_sides(images.shape[1:], self.step)
        x, skips = images[:, None].contiguous(memory_format=torch.channels_last_3d), []
        for level in self.down:
            x = level(x)
            skips.append(x)
        for level, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = level(x, skip)
        return x

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits of slabs (B, D, H, W): (B, out_channels, D, H, W)."""
        return self.head(self.decode(images))


def network_arguments(settings: TrainSettings, out_channels: int) -> dict:
    """What `build_network` makes the network of a training from, plain types, as its checkpoints store it."""
    arguments = {
        "model": settings.model,
        "in_channels": 2 * settings.context + 1,
        "out_channels": out_channels,
        "features": list(settings.features),
    }
    kind = MODELS[settings.model]
    arguments |= {name: getattr(settings, name) for name in kind.takes}
    return arguments | ({"depth": settings.depth} if kind.slabs else {})


def build_network(model: str = "unet", **arguments: object) -> Any:
    """The network called `model`, with new weights: an nn.Module that has what is named above.

    SegkitError for another name, and where MONAI is missing.
    """
    if model not in MODELS:
        raise SegkitError(f"MODEL = {model!r}: expected one of {', '.join(MODELS)}")
    check_installed(model)
    return find(MODELS[model].where)(**arguments)


def check_installed(model: str) -> None:
    """SegkitError that says what to install where the network called `model` needs MONAI and there is none."""
    if MODELS[model].needs_monai and importlib.util.find_spec("monai") is None:
        raise SegkitError(
            f"MODEL = {model!r} is built from MONAI, which is not installed: run pip install 'segkit[monai]' (in a "
            "clone: pip install -e '.[monai]'), or set MODEL = 'unet'"
        )


def on_device(model: Model, device: torch.device) -> Model:
    """The model on a device, its weights laid out as convolutions read them fastest: channels last."""
    layout = torch.channels_last_3d if _of_volumes(model) else torch.channels_last
    return model.to(device, memory_format=layout)  # type: ignore[call-overload]  # torch's types lack one of its ways


def precision(model: nn.Module, device: torch.device) -> torch.dtype:
    """In which precision the model computes fast and right on a device: `fast_dtype`, but float32 for 3D on a CPU.

    There torch 2.13 reads memory that nobody wrote in the bfloat16 gradient of a 3D convolution of 8 channels by its
    weights: another result each time, now and then NaN. Float32 took a quarter longer.
    """
    return torch.float32 if device.type == "cpu" and _of_volumes(model) else fast_dtype(device)


def _of_volumes(model: nn.Module) -> bool:
    return any(weights.ndim == 5 for weights in model.parameters())


def _monai_nets() -> ModuleType:
    from monai.networks import nets  # takes 3 to 4 seconds: only where it is used

    return nets
