"""EvoNorm-S0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .group import ChannelsPerGroup, Groups, resolve_groups
from .layer import Eps, NormAct, append_dims


class EvoNormS0(NormAct):
    """u * sigmoid(gate[c] * u) / sqrt(var + eps) over groups of channels and all positions.

    In a layer with activation the numerator takes the place of SiLU, and no activation follows the conditioning;
    without activation it is u / sqrt(var + eps). The gate is initialized to 1. Liu et al., Evolving
    Normalization-Activation Layers (arXiv:2004.02967).
    """

    def __init__(
        self,
        num_channels: int,
        *,
        groups: Groups = 32,
        channels_per_group: ChannelsPerGroup = None,
        eps: Eps = 1e-5,
        activation: str | None = "silu",
    ) -> None:
        super().__init__(num_channels, activation=activation)
        self.groups, self.eps = resolve_groups(num_channels, groups, channels_per_group), eps
        self.gate = None if activation is None else nn.Parameter(torch.ones(num_channels))

    def normalize(self, u: Tensor) -> Tensor:
        # Splitting the channel dimension is a view in every memory format.
        grouped = u.unflatten(1, (self.groups, -1))
        variance = grouped.var(tuple(range(2, grouped.dim())), correction=0, keepdim=True)
        numerator = u if self.gate is None else u * torch.sigmoid(append_dims(self.gate, u) * u)
        return (numerator.unflatten(1, (self.groups, -1)) * torch.rsqrt(variance + self.eps)).flatten(1, 2)

    def activate(self, w: Tensor) -> Tensor:
        return w
