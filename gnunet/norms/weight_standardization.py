"""Weight standardization, with group normalization and, scaled, without a normalization of activations."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor, nn
from typing_extensions import Doc

from .conv import ReparametrizedConv, filter_dims, per_filter
from .group import GroupNorm
from .layer import NormAct

_MIN_VARIANCE = 1e-4
"""Lower bound of the variance of a filter's weights times their number, for constant filters."""
_SILU_GAIN = 1.78718722210
"""1 / the standard deviation of silu(z), z standard normal."""


class StandardizedConv(ReparametrizedConv):
    """Filters (weight - mean) / (std * sqrt(fan_in)), with mean and std over the weights of the filter.

    Qiao et al., Weight Standardization (arXiv:1903.10520), whose filters are sqrt(fan_in) times as large. A norm
    after the convolution cancels that factor; before a sum, as at the end of a residual block, these filters keep the
    variance of the input.
    """

    def effective_weight(self, weight: Tensor) -> Tensor:
        fan_in = weight[0].numel()
        variance, mean = torch.var_mean(weight, filter_dims(weight), correction=0, keepdim=True)
        return (weight - mean) * torch.rsqrt((variance * fan_in).clamp_min(_MIN_VARIANCE))


class ScaledStandardizedConv(StandardizedConv):
    """A StandardizedConv with a gain for each filter, (out_channels,), initialized to 1."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels))

    def effective_weight(self, weight: Tensor) -> Tensor:
        return super().effective_weight(weight) * per_filter(self.gain, weight)


class WeightStandardization(GroupNorm):
    """Group normalization between convolutions of `StandardizedConv`."""

    conv_layer = StandardizedConv


class ScaledResidual(nn.Module):
    """x + scale * gain * h, with a learned gain, initialized to 0 (SkipInit; De and Smith, arXiv:2002.10444)."""

    def __init__(
        self,
        residual_scale: Annotated[
            float,
            Gt(0),
            Le(1000),
            Doc("Scale of each residual branch, in addition to a learned gain that starts at 0."),
        ] = 0.2,
    ) -> None:
        super().__init__()
        self.scale = residual_scale
        self.gain = nn.Parameter(torch.zeros(1))  # not a scalar, which FSDP2 cannot shard

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return x + h * (self.scale * self.gain).to(h.dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class ScaledWS(NormAct):
    """No statistics: u / input_std, and SiLU scaled to unit variance, between `ScaledStandardizedConv`s.

    Brock et al., Characterizing Signal Propagation to Close the Performance Gap in Unnormalized ResNets
    (arXiv:2101.08692) and High-Performance Large-Scale Image Recognition Without Normalization (arXiv:2102.06171).
    `input_std` is the expected standard deviation of the layer's input, which a network derives from its structure:
    convolutions and changes of resolution keep the variance, a residual sum adds residual_scale ** 2, a concatenation
    has the mean over its channels. Residual blocks end in `ScaledResidual`.
    """

    is_pointwise = True
    affine = ()
    conv_layer = ScaledStandardizedConv
    residual_layer = ScaledResidual

    def __init__(
        self,
        num_channels: int,
        *,
        input_std: Annotated[float, Gt(0), Doc("Standard deviation of the layer's input.")] = 1.0,
        activation: str | None = "silu",
    ) -> None:
        super().__init__(num_channels, activation=activation)
        self.input_std = input_std

    def normalize(self, u: Tensor) -> Tensor:
        return u / self.input_std

    def activate(self, w: Tensor) -> Tensor:
        return w if self.activation is None else F.silu(w) * _SILU_GAIN
