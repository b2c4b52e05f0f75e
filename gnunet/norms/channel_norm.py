"""Normalization of each position over its channels."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import Eps, NormAct


class LayerChannelNorm(NormAct):
    """(u - mean) / sqrt(var + eps) over the channels of each position.

    The layer normalization (Ba et al., arXiv:1607.06450) of vision transformers and ConvNeXt; group normalization
    takes its statistics over all positions.
    """

    is_pointwise = True

    def __init__(self, num_channels: int, *, eps: Eps = 1e-5, activation: str | None = "silu") -> None:
        super().__init__(num_channels, activation=activation)
        self.eps = eps

    def normalize(self, u: Tensor) -> Tensor:
        variance, mean = torch.var_mean(u, 1, correction=0, keepdim=True)
        return (u - mean) * torch.rsqrt(variance + self.eps)


class RMSNorm(LayerChannelNorm):
    """u / sqrt(mean(u^2) + eps) over the channels of each position, with a weight and, as published, no bias.

    Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv:1910.07467), with eps inside the root.
    """

    affine = ("weight",)

    def normalize(self, u: Tensor) -> Tensor:
        return u * torch.rsqrt(u.square().mean(1, keepdim=True) + self.eps)
