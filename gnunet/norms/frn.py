"""Filter response normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layer import NormAct, append_dims, spatial_dims


class FRN(NormAct):
    """u / sqrt(mean(u^2) + eps) over the positions of each channel, and a learned threshold as activation.

    The thresholded linear unit max(w, threshold[c]) takes SiLU's place wherever the layer has an activation;
    its threshold starts at 0. At one position, u / |u| is all that is left. Singh and Krishnan, Filter
    Response Normalization Layer (arXiv:1911.09737).
    """

    def __init__(self, num_channels: int, *, eps: float, activation: str | None = "silu") -> None:
        super().__init__(num_channels, activation=activation)
        self.eps = eps
        self.threshold = None if activation is None else nn.Parameter(torch.zeros(num_channels))

    def normalize(self, u: Tensor) -> Tensor:
        return u * torch.rsqrt(u.square().mean(spatial_dims(u), keepdim=True) + self.eps)

    def activate(self, w: Tensor) -> Tensor:
        return w if self.threshold is None else torch.maximum(w, append_dims(self.threshold, w))
