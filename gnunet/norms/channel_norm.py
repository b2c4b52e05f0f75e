"""Normalization of each position by itself, over its channels."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import NormAct


class _PositionNorm(NormAct):
    local = True

    def __init__(self, num_channels: int, *, eps: float, activation: str | None = "silu") -> None:
        super().__init__(num_channels, activation=activation)
        self.eps = eps


class LayerChannelNorm(_PositionNorm):
    """(u - mean) / sqrt(var + eps) over the channels of each position.

    The layer normalization (Ba et al., arXiv:1607.06450) of vision transformers and ConvNeXt; no group
    normalization is the same, since those join positions.
    """

    def normalize(self, u: Tensor) -> Tensor:
        variance, mean = torch.var_mean(u, 1, correction=0, keepdim=True)
        return (u - mean) * torch.rsqrt(variance + self.eps)


class RMSNorm(_PositionNorm):
    """u / sqrt(mean(u^2) + eps) over the channels of each position, with a weight and, as published, no bias.

    Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv:1910.07467); eps is inside of the root.
    """

    affine = ("weight",)

    def normalize(self, u: Tensor) -> Tensor:
        return u * torch.rsqrt(u.square().mean(1, keepdim=True) + self.eps)
