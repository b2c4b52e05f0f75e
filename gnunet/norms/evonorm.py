"""EvoNorm-S0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .group import GroupedNorm
from .layer import append_dims


class EvoNormS0(GroupedNorm):
    """u * sigmoid(gate[c] * u) / sqrt(var + eps) over groups of channels and all positions.

    The numerator takes SiLU's place wherever the layer has an activation, and then no activation follows the
    conditioning; a layer without activation is u / sqrt(var + eps). The gate starts at 1. Liu et al., Evolving
    Normalization-Activation Layers (arXiv:2004.02967).
    """

    def __init__(self, num_channels: int, *, groups: int, eps: float, activation: str | None = "silu") -> None:
        super().__init__(num_channels, groups=groups, eps=eps, activation=activation)
        self.gate = None if activation is None else nn.Parameter(torch.ones(num_channels))

    def normalize(self, u: Tensor) -> Tensor:
        grouped = self.grouped(u)
        variance = grouped.var(tuple(range(2, grouped.dim())), correction=0, keepdim=True)
        numerator = u if self.gate is None else u * torch.sigmoid(append_dims(self.gate, u) * u)
        return (self.grouped(numerator) * torch.rsqrt(variance + self.eps)).flatten(1, 2)

    def activate(self, w: Tensor) -> Tensor:
        return w
