"""Bounded functions of each element in place of a normalization; they have no statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layer import NormAct


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
