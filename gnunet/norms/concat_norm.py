"""Separate normalization of the parts of a concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ConcatNorm(nn.Module):
    """A norm layer for each part of the channels of a concatenation, so that no statistics are taken across parts.

    parts: norm layers, in the order of their channels.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.sizes = [part.num_channels for part in parts]
        self.num_channels, self.activation = sum(self.sizes), parts[0].activation
        self.batch_dependent = any(part.batch_dependent for part in parts)
        self.is_pointwise = all(part.is_pointwise for part in parts)
        self.has_state = any(part.has_state for part in parts)
        self.supports_checkpointing = all(part.supports_checkpointing for part in parts)

    def forward(
        self,
        x: Tensor,
        *,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """x: (N, C, *spatial); add, scale, shift: (N, C) -> y as x."""
        columns = [
            [None] * len(self.sizes) if t is None else torch.split(t, self.sizes, dim=1) for t in (x, add, scale, shift)
        ]
        outputs = [
            part(x_part, add=a, scale=b, shift=c) for part, x_part, a, b, c in zip(self.parts, *columns, strict=True)
        ]
        return torch.cat(outputs, dim=1)
