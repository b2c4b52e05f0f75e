"""Weight normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .conv import ReparametrizedConv, filter_dims, per_filter
from .layer import NoNorm


class WeightNormConv(ReparametrizedConv):
    """Filters gain * weight / |weight|, with a gain for each, (out_channels,), initialized to |weight|.

    Salimans and Kingma, Weight Normalization (arXiv:1602.07868), without its data-dependent initialization. The
    filters of a new layer are those of torch's convolution.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(_filter_norms(self.weight.detach()).flatten())

    def effective_weight(self, weight: Tensor) -> Tensor:
        return weight * (per_filter(self.gain, weight) / _filter_norms(weight))


class WeightNorm(NoNorm):
    """No normalization of activations, and filters of `WeightNormConv`."""

    conv_layer = WeightNormConv


def _filter_norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=filter_dims(weight), keepdim=True)
