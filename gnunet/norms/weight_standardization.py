"""Weight standardization, beside group normalization and, scaled, instead of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import ReparametrizedConv, filter_dims, per_filter
from .group import GroupNorm
from .layer import NormAct
from .options import Option, is_number

_LEAST_VARIANCE = 1e-4
"""Of a filter's weights, times their number: what a constant filter is divided by."""
_SILU_GAIN = 1.78718722210
"""1 / the standard deviation of silu(z), z standard normal."""


class StandardizedConv(ReparametrizedConv):
    """Filters (weight - mean) / (std * sqrt(fan_in)), mean and std of the filter's own weights.

    Qiao et al., Weight Standardization (arXiv:1903.10520), whose filters are sqrt(fan_in) times as large. A
    norm behind the convolution cancels that factor; where a sum is behind it, as at the end of a residual
    block, this one keeps the variance of the input.
    """

    def effective_weight(self, weight: Tensor) -> Tensor:
        fan_in = weight[0].numel()
        variance, mean = torch.var_mean(weight, filter_dims(weight), correction=0, keepdim=True)
        return (weight - mean) * torch.rsqrt((variance * fan_in).clamp_min(_LEAST_VARIANCE))


class ScaledStandardizedConv(StandardizedConv):
    """A StandardizedConv with a gain for each filter, (out_channels,), at first 1."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.gain = nn.Parameter(torch.ones(self.out_channels))

    def effective_weight(self, weight: Tensor) -> Tensor:
        return super().effective_weight(weight) * per_filter(self.gain, weight)


class WeightStandardization(GroupNorm):
    """Group normalization between convolutions of `StandardizedConv`."""

    @classmethod
    def conv(cls, config: Mapping[str, Any], *args: int, **settings: Any) -> nn.Module:
        return StandardizedConv(*args, **settings)


class ScaledResidual(nn.Module):
    """x + scale * gain * h, with a learned gain that starts at 0 (SkipInit; De and Smith, arXiv:2002.10444)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.gain = nn.Parameter(torch.zeros(1))  # not a scalar, which FSDP2 cannot shard

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x, h: of one shape -> as x."""
        return x + h * (self.scale * self.gain).to(h.dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class ScaledWS(NormAct):
    """No statistics: u / input_std, and SiLU scaled to keep a unit variance, between `ScaledStandardizedConv`s.

    Brock et al., Characterizing Signal Propagation to Close the Performance Gap in Unnormalized ResNets
    (arXiv:2101.08692) and High-Performance Large-Scale Image Recognition Without Normalization
    (arXiv:2102.06171). `input_std` is the standard deviation that the plan of the network expects of a layer's
    input, worked out from: a convolution or a change of resolution keeps the variance, a residual sum adds
    residual_scale ** 2, a concatenation has the mean over its channels. Residual blocks end in `ScaledResidual`.
    """

    local = True
    affine = ()
    options: ClassVar[Mapping[str, Option]] = {
        "input_std": Option(
            1.0,
            lambda value: is_number(value) and value > 0,
            "a number above 0",
            "Standard deviation of the layer's input, which a network works out.",
        )
    }
    block_options: ClassVar[Mapping[str, Option]] = {
        "residual_scale": Option(
            0.2,
            lambda value: is_number(value) and value > 0,
            "a number above 0",
            "What each residual branch is scaled by, beside a learned gain that starts at 0.",
        )
    }

    def __init__(self, num_channels: int, *, input_std: float = 1.0, activation: str | None = "silu") -> None:
        super().__init__(num_channels, activation=activation)
        self.input_std = input_std

    @classmethod
    def conv(cls, config: Mapping[str, Any], *args: int, **settings: Any) -> nn.Module:
        return ScaledStandardizedConv(*args, **settings)

    @classmethod
    def residual(cls, config: Mapping[str, Any]) -> nn.Module:
        return ScaledResidual(config["residual_scale"])

    def normalize(self, u: Tensor) -> Tensor:
        return u / self.input_std

    def activate(self, w: Tensor) -> Tensor:
        return w if self.activation is None else F.silu(w) * _SILU_GAIN
