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

from .conv import ReparametrizedConv, compute_weight, filter_dims
from .layer import NoNorm
from .network_input import UnitInput
from .pointwise import RMSNorm

SILU_MAGNITUDE = 0.59646921112  # the magnitude of silu(z), z standard normal
_EPS = 1e-12


class UnitFilters(nn.Module):
    """Filters weight / |weight|: uncorrelated input of unit magnitude gives output of unit magnitude.

    Gradients can only lengthen a weight, and a longer one learns more slowly. So `force_weight_norm` should restore a
    magnitude of 1, which is |weight| = sqrt(fan_in), after every optimizer step. With zero_gain, the filters have a
    common learned gain, (1,), that is 0 at first.
    """

    weight: Tensor

    def _init_filters(self, zero_gain: bool) -> None:
        self.gain = nn.Parameter(torch.zeros(1)) if zero_gain else None  # not a scalar, which FSDP2 cannot shard
        self.force_weight_norm()

    def effective_weight(self, weight: Tensor) -> Tensor:
        return _unit_filters(weight) if self.gain is None else _unit_filters(weight) * self.gain

    @torch.no_grad()
    def force_weight_norm(self, where: Tensor | None = None) -> None:
        """Give every filter of `weight` a magnitude of 1, which does not change the layer's output."""
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        forced = _unit_filters(self.weight.to(dtype)) * math.sqrt(math.prod(self.weight.shape[1:]))
        self.weight.copy_(forced if where is None else torch.where(where, forced, self.weight))


def _unit_filters(weight: Tensor) -> Tensor:
    return weight * torch.rsqrt(weight.square().sum(filter_dims(weight), keepdim=True) + _EPS)


class MagnitudePreservingConv(UnitFilters, ReparametrizedConv):
    """A convolution with `UnitFilters`, without bias."""

    def __init__(self, *args: Any, zero_gain: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": False})
        self._init_filters(zero_gain)


class MagnitudePreservingLinear(UnitFilters, nn.Linear):
    """A linear layer with `UnitFilters`, without bias."""

    def __init__(self, in_features: int, out_features: int, *, zero_gain: bool = False) -> None:
        super().__init__(in_features, out_features, bias=False)
        self._init_filters(zero_gain)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, compute_weight(self))


def force_weight_norm(model: nn.Module, where: Tensor | None = None) -> None:
    """Restore a magnitude of 1 in the weights of a model's magnitude-preserving layers, if it has any.

    To be called after each optimizer step. where: bool (), on the model's device; if false, nothing changes.
    """
    for module in model.modules():
        if isinstance(module, UnitFilters):
            module.force_weight_norm(where)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that gives standard normal numbers a magnitude of 1."""
    return F.silu(x) / SILU_MAGNITUDE


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


def concat_gains(*channels: int) -> list[float]:
    """Factors of the parts of a concatenation, by their numbers of channels, after which each contributes the same to a
    magnitude of 1 (MP-Cat with t = 1/2)."""
    return [math.sqrt(sum(channels) / len(channels) / each) for each in channels]


class MagnitudePreserving(NoNorm):
    """No normalization of activations: SiLU scaled to unit magnitude, between `MagnitudePreservingConv`s.

    Residual blocks end in `MPAdd`, with t = residual_balance. The network's input is scaled to unit variance
    (`UnitInput`); its linear layers, embeddings, attention and concatenations preserve magnitudes, too, and the gains
    of conditioning and output begin at 0. Unlike in the paper's configuration G, nothing is normalized in the encoder
    (kind pixel normalizes before every SiLU), and resampling is that of the network.
    """

    conv_layer = MagnitudePreservingConv
    residual_layer = MPAdd
    input_layer, first_conv = UnitInput, MagnitudePreservingConv
    preserves_magnitude = True

    def activate(self, w: Tensor) -> Tensor:
        return w if self.activation is None else mp_silu(w)


class PixelNorm(RMSNorm, MagnitudePreserving):
    """MagnitudePreserving on u / sqrt(mean(u^2) + eps), with the mean over the channels of each position.

    Karras et al., Progressive Growing of GANs (arXiv:1710.10196).
    """

    affine = ()
