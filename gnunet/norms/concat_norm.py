"""Separate normalization of the parts of a concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ConcatNorm(nn.Module):
    """A norm layer for each part of the channels of a concatenation, so that no statistics are taken across parts."""

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.sizes = [part.num_channels for part in parts]
        self.num_channels, self.activation = sum(self.sizes), parts[0].activation
        self.batch_dependent = any(part.batch_dependent for part in parts)
        self.is_pointwise = all(part.is_pointwise for part in parts)
        self.has_state = any(part.has_state for part in parts)
        self.supports_checkpointing = all(part.supports_checkpointing for part in parts)

    def forward(self, x: Tensor, **conditioning: Tensor | None) -> Tensor:
        """x: (N, C, *spatial); conditioning: add, scale, shift, (N, C) -> y as x."""
        tables = {name: t.split(self.sizes, dim=1) for name, t in conditioning.items() if t is not None}
        outputs = []
        for i, (part, x_part) in enumerate(zip(self.parts, x.split(self.sizes, dim=1), strict=True)):
            outputs.append(part(x_part, **{name: table[i] for name, table in tables.items()}))
        return torch.cat(outputs, dim=1)
