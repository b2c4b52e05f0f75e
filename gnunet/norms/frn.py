"""Filter response normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layer import Eps, NormAct, append_dims, spatial_dims


class FRN(NormAct):
    """u / sqrt(mean(u^2) + eps) over the positions of each channel, and max(w, threshold[c]) as activation.

    The thresholded linear unit takes the place of SiLU in a layer with activation; its threshold is initialized to 0.
    For inputs with a single position, only u / |u| is left. Singh and Krishnan, Filter Response Normalization Layer
    (arXiv:1911.09737).
    """

    def __init__(self, num_channels: int, *, eps: Eps = 1e-5, activation: str | None = "silu") -> None:
        super().__init__(num_channels, activation=activation)
        self.eps = eps
        self.threshold = None if activation is None else nn.Parameter(torch.zeros(num_channels))

    def normalize(self, u: Tensor) -> Tensor:
        return u * torch.rsqrt(u.square().mean(spatial_dims(u), keepdim=True) + self.eps)

    def activate(self, w: Tensor) -> Tensor:
        return w if self.threshold is None else torch.maximum(w, append_dims(self.threshold, w))
