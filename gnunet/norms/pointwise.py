"""Kinds without statistics over positions: normalization of each position, and bounded functions of each element."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

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

    affine: ClassVar[tuple[str, ...]] = ("weight",)

    def normalize(self, u: Tensor) -> Tensor:
        return u * torch.rsqrt(u.square().mean(1, keepdim=True) + self.eps)


class DyT(NormAct):
    """tanh(alpha * u), with one alpha per layer, initialized to 0.5.

    Zhu et al., Transformers without Normalization (arXiv:2503.10622).
    """

    is_pointwise = True

    def __init__(self, num_channels: int, *, activation: str | None = "silu") -> None:
        super().__init__(num_channels, activation=activation)
        self.alpha = nn.Parameter(torch.full((1,), 0.5))  # not a scalar, which FSDP2 cannot shard

    def normalize(self, u: Tensor) -> Tensor:
        return torch.tanh(self.alpha.to(u.dtype) * u)


class Derf(DyT):
    """erf(alpha * u + offset), with one alpha and one offset per layer, initialized to 0.5 and 0.

    Chen et al., Stronger Normalization-Free Transformers (arXiv:2512.10938).
    """

    def __init__(self, num_channels: int, *, activation: str | None = "silu") -> None:
        super().__init__(num_channels, activation=activation)
        self.offset = nn.Parameter(torch.zeros(1))

    def normalize(self, u: Tensor) -> Tensor:
        return torch.erf(self.alpha.to(u.dtype) * u + self.offset.to(u.dtype))
