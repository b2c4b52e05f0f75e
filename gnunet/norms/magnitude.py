"""Layers that preserve magnitudes, written from Karras et al., Analyzing and Improving the Training Dynamics of
Diffusion Models (arXiv:2312.02696). A magnitude is a root mean square."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import ReparametrizedConv, filter_dims
from .layer import NormAct
from .options import EPS, Option, is_number

_SILU_MAGNITUDE = 0.59646921112
"""Of silu(z), z standard normal."""
_EPS = 1e-12


class MagnitudePreservingConv(ReparametrizedConv):
    """Filters weight / |weight|, without bias: of uncorrelated input of unit magnitude, so is the output.

    A longer weight learns more slowly, and gradients only ever lengthen it, so that `force_weight_norm` should
    bring it back to a magnitude of 1, which is |weight| = sqrt(fan_in), after every optimizer step.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "bias": False})
        self.force_weight_norm()

    def effective_weight(self, weight: Tensor) -> Tensor:
        return weight * torch.rsqrt(weight.square().sum(filter_dims(weight), keepdim=True) + _EPS)

    @torch.no_grad()
    def force_weight_norm(self, where: Tensor | None = None) -> None:
        """Give every filter of `weight` a magnitude of 1; what the layer computes stays the same.

        Args:
            where: bool (), on the weight's device; if it is false, nothing changes. None is true.
        """
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        unit = self.effective_weight(self.weight.to(dtype))
        forced = unit * math.sqrt(math.prod(unit.shape[1:]))
        self.weight.copy_(forced if where is None else torch.where(where, forced, self.weight))


def force_weight_norm(model: nn.Module, where: Tensor | None = None) -> None:
    """Bring the weights of a model's magnitude-preserving convolutions back to magnitude 1.

    To be called after each optimizer step; a model without such layers stays as it is.

    Args:
        where: bool (), on the model's device; if it is false, nothing changes. None is true.
    """
    for module in model.modules():
        if isinstance(module, MagnitudePreservingConv):
            module.force_weight_norm(where)


class MPAdd(nn.Module):
    """((1 - t) * x + t * h) / sqrt((1 - t)^2 + t^2): of unit magnitude where x and h are, and uncorrelated."""

    def __init__(self, t: float) -> None:
        super().__init__()
        self.t = t

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x, h: of one shape -> as x."""
        return torch.lerp(x, h, self.t) / math.hypot(1 - self.t, self.t)

    def extra_repr(self) -> str:
        return f"t={self.t}"


class MagnitudePreserving(NormAct):
    """No normalization of activations: SiLU scaled to keep a unit magnitude, between `MagnitudePreservingConv`s.

    Residual blocks end in `MPAdd`, at t = residual_balance.
    """

    local = True
    affine = ()
    options: ClassVar[Mapping[str, Option]] = {}
    block_options: ClassVar[Mapping[str, Option]] = {
        "residual_balance": Option(
            0.3,
            lambda value: is_number(value) and 0 < value < 1,
            "a number between 0 and 1",
            "Share of the residual branch in the sum.",
        )
    }

    @classmethod
    def conv(cls, config: Mapping[str, Any], *args: int, **settings: Any) -> nn.Module:
        return MagnitudePreservingConv(*args, **settings)

    @classmethod
    def residual(cls, config: Mapping[str, Any]) -> nn.Module:
        return MPAdd(config["residual_balance"])

    def normalize(self, u: Tensor) -> Tensor:
        return u

    def activate(self, w: Tensor) -> Tensor:
        return w if self.activation is None else F.silu(w) / _SILU_MAGNITUDE


class PixelNorm(MagnitudePreserving):
    """MagnitudePreserving on u / sqrt(mean(u^2) + eps), the mean over the channels of each position.

    Karras et al., Progressive Growing of GANs (arXiv:1710.10196).
    """

    options: ClassVar[Mapping[str, Option]] = {"eps": EPS}

    def __init__(self, num_channels: int, *, eps: float, activation: str | None = "silu") -> None:
        super().__init__(num_channels, activation=activation)
        self.eps = eps

    def normalize(self, u: Tensor) -> Tensor:
        return u * torch.rsqrt(u.square().mean(1, keepdim=True) + self.eps)
