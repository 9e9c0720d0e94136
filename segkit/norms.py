"""Normalisation layers; that of each slice alone as fast as batch normalisation on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class InstanceNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, with mean and variance of each sample and channel.

    x (B, C, ...) float -> the same shape (Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022). The same as
    torch.nn.InstanceNorm2d(affine=True), which on a CPU takes twice as long with channels_last. Nothing depends on the
    other samples of a batch, so that parts of a batch, several GPUs, training and evaluation all compute the same.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, C, ...) -> the same, normalised."""
        if x.device.type == "cpu":
            return _EachAlone.apply(x, self.weight, self.bias, self.eps)
        y = F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        # it gives back NCHW whatever came in, and the next convolution would be computed so
        return y.contiguous(memory_format=last) if x.is_contiguous(memory_format=last) else y

    def extra_repr(self) -> str:
        """What stands in brackets where the network is printed."""
        return f"{len(self.weight)}, eps={self.eps}"


class _EachAlone(torch.autograd.Function):
    """Batch normalisation of each sample alone: torch has kernels for it that keep channels_last."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        out, statistics = torch.empty_like(x), []
        for sample, normalized in zip(x.split(1), out.split(1), strict=True):
            mean, deviation = torch.empty_like(weight), torch.empty_like(weight)
            torch.ops.aten.native_batch_norm.out(  # straight to its place: one copy less
                sample, weight, bias, None, None, True, 0.0, eps, out=normalized, save_mean=mean, save_invstd=deviation
            )
            statistics += [mean, deviation]
        ctx.save_for_backward(x, weight, *statistics)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, *statistics = ctx.saved_tensors
        grads = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
        for place, (sample, of_sample) in enumerate(zip(x.split(1), grad.split(1), strict=True)):
            mean, deviation = statistics[2 * place : 2 * place + 2]
            of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                of_sample, sample, weight, None, None, mean, deviation, True, ctx.eps, [True, True, True]
            )
            grads[0][place] = of_x[0]
            grads[1].add_(of_weight)
            grads[2].add_(of_bias)
        return (*grads, None)
