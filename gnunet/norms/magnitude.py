"""Layers that preserve magnitudes, after Karras et al., Analyzing and Improving the Training Dynamics of Diffusion
Models (arXiv:2312.02696). A magnitude is a root mean square."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Gt, Lt
from torch import Tensor, nn
from typing_extensions import Doc

from .conv import ReparametrizedConv, filter_dims
from .layer import NoNorm
from .pointwise import RMSNorm

_SILU_MAGNITUDE = 0.59646921112  # the magnitude of silu(z), z standard normal
_EPS = 1e-12


class MagnitudePreservingConv(ReparametrizedConv):
    """Filters weight / |weight|, without bias: uncorrelated input of unit magnitude gives output of unit magnitude.

    Gradients can only lengthen a weight, and a longer one learns more slowly. So `force_weight_norm` should restore a
    magnitude of 1, which is |weight| = sqrt(fan_in), after every optimizer step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": False})
        self.force_weight_norm()

    def effective_weight(self, weight: Tensor) -> Tensor:
        return weight * torch.rsqrt(weight.square().sum(filter_dims(weight), keepdim=True) + _EPS)

    @torch.no_grad()
    def force_weight_norm(self, where: Tensor | None = None) -> None:
        """Give every filter of `weight` a magnitude of 1, which does not change the layer's output."""
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        unit = self.effective_weight(self.weight.to(dtype))
        forced = unit * math.sqrt(math.prod(unit.shape[1:]))
        self.weight.copy_(forced if where is None else torch.where(where, forced, self.weight))


def force_weight_norm(model: nn.Module, where: Tensor | None = None) -> None:
    """Restore a magnitude of 1 in the weights of a model's magnitude-preserving convolutions, if it has any.

    To be called after each optimizer step. where: bool (), on the model's device; if false, nothing changes.
    """
    for module in model.modules():
        if isinstance(module, MagnitudePreservingConv):
            module.force_weight_norm(where)


class MPAdd(nn.Module):
    """((1 - t) * x + t * h) / sqrt((1 - t)^2 + t^2): of unit magnitude if x and h are, and uncorrelated."""

    def __init__(
        self, residual_balance: Annotated[float, Gt(0), Lt(1), Doc("Share t of the residual branch in the sum.")] = 0.3
    ) -> None:
        super().__init__()
        self.t = residual_balance

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.lerp(x, h, self.t) / math.hypot(1 - self.t, self.t)

    def extra_repr(self) -> str:
        return f"t={self.t}"


class MagnitudePreserving(NoNorm):
    """No normalization of activations: SiLU scaled to unit magnitude, between `MagnitudePreservingConv`s.

    Residual blocks end in `MPAdd`, with t = residual_balance.
    """

    conv_layer = MagnitudePreservingConv
    residual_layer = MPAdd

    def activate(self, w: Tensor) -> Tensor:
        return w if self.activation is None else F.silu(w) / _SILU_MAGNITUDE


class PixelNorm(RMSNorm, MagnitudePreserving):
    """MagnitudePreserving on u / sqrt(mean(u^2) + eps), with the mean over the channels of each position.

    Karras et al., Progressive Growing of GANs (arXiv:1710.10196).
    """

    affine = ()
