"""No normalization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class NoNorm(nn.Module):
    """The conditioning and the activation of a norm layer without the normalization, and without parameters.

    y = act((x + add) * (1 + scale) + shift). There is no weight or bias: the convolution before it has both.
    """

    batch_dependent = False
    local = True
    has_state = False

    def __init__(self, num_channels: int, activation: str | None = "silu") -> None:
        super().__init__()
        self.num_channels, self.activation = num_channels, activation

    @classmethod
    def check(cls, config: Mapping[str, Any], num_channels: int) -> str | None:
        """Nothing can be wrong."""
        return None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], num_channels: int, *, activation: str | None, ndim: int
    ) -> NoNorm:
        return cls(num_channels, activation)

    def forward(
        self,
        x: Tensor,
        *,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """x: (N, C, *spatial); add, scale, shift: (N, C), taken in x's dtype -> y as x."""

        def per_channel(p: Tensor) -> Tensor:
            return p.to(x.dtype).reshape(*p.shape, *(1,) * (x.dim() - 2))

        if add is not None:
            x = x + per_channel(add)
        if scale is not None:
            x = x * (1 + per_channel(scale))
        if shift is not None:
            x = x + per_channel(shift)
        return F.silu(x) if self.activation == "silu" else x

    def extra_repr(self) -> str:
        return f"{self.num_channels}, activation={self.activation!r}"
