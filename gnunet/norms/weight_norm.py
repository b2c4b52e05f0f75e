"""Weight normalization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .conv import ReparametrizedConv, filter_dims, per_filter
from .none import NoNorm


class WeightNormConv(ReparametrizedConv):
    """Filters gain * weight / |weight|, each with a gain, (out_channels,), at first |weight|.

    Salimans and Kingma, Weight Normalization (arXiv:1602.07868), without its initialization from data. The
    filters of a new layer are those of torch's convolution.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.gain = nn.Parameter(_norms(self.weight.detach()).flatten())

    def effective_weight(self, weight: Tensor) -> Tensor:
        return weight * (per_filter(self.gain, weight) / _norms(weight))


class WeightNorm(NoNorm):
    """No normalization of activations; filters of `WeightNormConv`."""

    @classmethod
    def conv(cls, config: Mapping[str, Any], *args: int, **settings: Any) -> nn.Module:
        return WeightNormConv(*args, **settings)


def _norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=filter_dims(weight), keepdim=True)
