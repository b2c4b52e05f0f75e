"""Convolutions whose weight is computed from their parameters in every forward pass, and the kinds that have them."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor, nn
from typing_extensions import Doc

from gnunet.ops.reference import without_autocast

from .group import GroupNorm
from .layer import NoNorm, NormAct, append_dims
from .network_input import UnitInput

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MIN_VARIANCE = 1e-4  # lower bound of the variance of a filter's weights times their number, for constant filters
_SILU_GAIN = 1.78718722210  # 1 / the standard deviation of silu(z), z standard normal
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ReparametrizedConv(nn.Module):
    """A convolution by `effective_weight`. Its parameters are those of a convolution, initialized as torch does.

    The effective weight is computed in float32 (float64 if the parameters are), also under autocast, and has the
    dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        conv = CONVOLUTIONS[ndim](in_channels, out_channels, kernel_size, bias=bias)
        self.weight, self.bias = conv.weight, conv.bias
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, conv.kernel_size
        self.stride, self.padding = (stride,) * ndim, (padding,) * ndim

    def effective_weight(self, weight: Tensor) -> Tensor:
        """weight: (out_channels, in_channels, *kernel), float32 or float64 -> the weight to convolve with."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        convolve = _FUNCTIONS[len(self.kernel_size)]
        return convolve(x, compute_weight(self), self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}"
        )


def compute_weight(layer: Any) -> Tensor:
    """The `effective_weight` of a layer."""
    weight: Tensor = layer.weight
    with without_autocast(weight.device):
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return layer.effective_weight(weight.to(dtype)).to(weight.dtype)


def filter_dims(weight: Tensor) -> tuple[int, ...]:
    """The dimensions of one filter in weight, (out_channels, in_channels, *kernel)."""
    return tuple(range(1, weight.dim()))


class WeightNormConv(ReparametrizedConv):
    """Filters gain * weight / |weight|, with a gain for each, (out_channels,), initialized to |weight|.

    Salimans and Kingma, Weight Normalization (arXiv:1602.07868), without its data-dependent initialization. The
    filters of a new layer are those of torch's convolution.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(_filter_norms(self.weight.detach()).flatten())

    def effective_weight(self, weight: Tensor) -> Tensor:
        return weight * (append_dims(self.gain[:, None], weight) / _filter_norms(weight))


class UnitGainConv(WeightNormConv):
    """A WeightNormConv whose gains are 1 at first, and bias 0, so that it keeps the variance of its input."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        nn.init.ones_(self.gain)
        nn.init.zeros_(self.bias)


class WeightNorm(NoNorm):
    """No normalization of activations, and filters of `WeightNormConv`."""

    conv_layer = WeightNormConv


def _filter_norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=filter_dims(weight), keepdim=True)


class StandardizedConv(ReparametrizedConv):
    """Filters (weight - mean) / (std * sqrt(fan_in)), with mean and std over the weights of the filter.

    Qiao et al., Weight Standardization (arXiv:1903.10520), whose filters are sqrt(fan_in) times as large, by the
    unbiased std. A norm after the convolution cancels that factor but for the bias, which is larger relative to these
    filters; before a sum, as at the end of a residual block, they keep the variance of the input.
    """

    def effective_weight(self, weight: Tensor) -> Tensor:
        fan_in = weight[0].numel()
        variance, mean = torch.var_mean(weight, filter_dims(weight), correction=0, keepdim=True)
        return (weight - mean) * torch.rsqrt((variance * fan_in).clamp_min(_MIN_VARIANCE))


class ScaledStandardizedConv(StandardizedConv):
    """A StandardizedConv with a gain for each filter, (out_channels,), initialized to 1; the bias is 0 at first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def effective_weight(self, weight: Tensor) -> Tensor:
        return super().effective_weight(weight) * append_dims(self.gain[:, None], weight)


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
    has the mean over its channels. Residual blocks end in `ScaledResidual`. A network's input is scaled to unit
    variance (`UnitInput`); its first convolution, `UnitGainConv`, keeps the mean of a patch, which standardized filters
    lose. Without adaptive gradient clipping, which the second paper adds for large batches, and with torch's linear
    layers in attention.
    """

    is_pointwise = True
    affine = ()
    conv_layer = ScaledStandardizedConv
    input_layer, first_conv = UnitInput, UnitGainConv
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
