"""From a norm config to the layer, and to what goes with it in a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batch import BatchNorm, BatchRenorm, GhostBatchNorm, SwitchableNorm, SyncBatchNorm
from .conv import CONVOLUTIONS, ScaledWS, WeightNorm, WeightStandardization
from .group import FRN, EvoNormS0, GroupNorm, GroupRMSNorm, InstanceNorm, LayerNorm
from .layer import NoNorm, NormLayer
from .magnitude import MagnitudePreserving, MagnitudePreservingConv, MagnitudePreservingLinear, PixelNorm
from .pointwise import Derf, DyT, LayerChannelNorm, RMSNorm
from .signature import validate_options

NORMS: dict[str, type[NormLayer]] = {
    "group": GroupNorm,
    "layer": LayerNorm,
    "instance": InstanceNorm,
    "none": NoNorm,
    "group_rms": GroupRMSNorm,
    "layer_channel": LayerChannelNorm,
    "rms": RMSNorm,
    "batch": BatchNorm,
    "sync_batch": SyncBatchNorm,
    "ghost_batch": GhostBatchNorm,
    "batch_renorm": BatchRenorm,
    "switchable": SwitchableNorm,
    "weight_norm": WeightNorm,
    "weight_standardization": WeightStandardization,
    "scaled_ws": ScaledWS,
    "frn": FRN,
    "evonorm_s0": EvoNormS0,
    "pixel": PixelNorm,
    "magnitude_preserving": MagnitudePreserving,
    "dyt": DyT,
    "derf": Derf,
}


class ConcatNorm(nn.Module):
    """A norm layer for each part of the channels of a concatenation, so that no statistics are taken across parts."""

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.sizes = [part.num_channels for part in parts]
        self.num_channels, self.activation = sum(self.sizes), parts[0].activation
        self.batch_dependent = any(part.batch_dependent for part in parts)
        self.is_pointwise = all(part.is_pointwise for part in parts)
        self.has_state = any(part.has_state for part in parts)
        self.supports_checkpointing = all(part.supports_checkpointing for part in parts)

    def forward(self, x: Tensor, **conditioning: Tensor | None) -> Tensor:
        """x: (N, C, *spatial); conditioning: add, scale, shift, (N, C) -> y as x."""
        tables = {name: t.split(self.sizes, dim=1) for name, t in conditioning.items() if t is not None}
        outputs = []
        for i, (part, x_part) in enumerate(zip(self.parts, x.split(self.sizes, dim=1), strict=True)):
            outputs.append(part(x_part, **{name: table[i] for name, table in tables.items()}))
        return torch.cat(outputs, dim=1)


def kind_of(layer: NormLayer) -> str:
    """The key of NORMS that a layer was made by."""
    return next(kind for kind, norm in NORMS.items() if type(layer) is norm)


def make_norm(norm_config: Mapping[str, Any], num_channels: int, *, activation: str | None, ndim: int = 2) -> nn.Module:
    """A `NormLayer`: forward(x, *, add=None, scale=None, shift=None) with x (N, C, *spatial) and the rest (N, C).

    Args:
        norm_config: `kind`, a key of NORMS ("group" if missing), and options of that kind. Options of other kinds are
            ignored, so that an override can change the kind alone.
        activation: "silu" or None, applied last. frn and evonorm_s0 have their own in place of SiLU.
        ndim: spatial dimensions of the input. No layer depends on it.

    Raises:
        ValueError: an unknown key or kind, an invalid value, or groups that do not divide num_channels.
    """
    norm, options, *_ = _read(norm_config)
    layer: nn.Module = norm(num_channels, **{**options, "activation": activation})  # type: ignore[call-arg, assignment]
    return layer


def make_conv(
    norm_config: Mapping[str, Any],
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int = 0,
    bias: bool = True,
    ndim: int = 2,
) -> nn.Module:
    """The convolution to use with a norm: torch's, or the kind's `conv_layer`.

    Its parameters are `weight`, initialized as torch does (none: times sqrt(3), which keeps the variance of the input),
    `bias`, except for pixel and magnitude_preserving, and `gain`, (out_channels,), where the formula has one.

    Raises:
        ValueError: the norm config is not valid, or ndim is not 1, 2 or 3.
    """
    if ndim not in CONVOLUTIONS:
        raise ValueError(f"ndim must be one of {list(CONVOLUTIONS)}; got {ndim!r}")
    norm, *_ = _read(norm_config)
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "bias": bias}
    if norm.conv_layer is None:
        return _torch_conv(norm, ndim, in_channels, out_channels, kernel_size, **settings)
    return norm.conv_layer(in_channels, out_channels, kernel_size, **settings, ndim=ndim)


def _torch_conv(norm: type[NormLayer], ndim: int, *args: Any, **settings: Any) -> nn.Module:
    conv: nn.Conv2d = CONVOLUTIONS[ndim](*args, **settings)
    if norm is NoNorm:
        with torch.no_grad():
            conv.weight.mul_(math.sqrt(3))  # torch's have a variance of 1 / (3 * fan_in)
    return conv


def make_residual(norm_config: Mapping[str, Any]) -> nn.Module:
    """The end of a residual block: forward(x, h) -> x + h, or the kind's `residual_layer`.

    x is the block's input, h the output of its layers. Raises ValueError if the norm config is not valid.
    """
    norm, _, options, _ = _read(norm_config)
    return norm.residual_layer(**options)


def make_input(
    norm_config: Mapping[str, Any], in_channels: int, out_channels: int, *, image_channels: int
) -> tuple[nn.Module | None, nn.Module]:
    """What scales a network's input, forward(sample, timestep), or None; and its first 3x3 convolution.

    image_channels: how many of in_channels, the first ones, are the noisy image. Raises ValueError if the norm config
    is not valid.
    """
    norm, _, _, options = _read(norm_config)
    if norm.input_layer is None or norm.first_conv is None:
        return None, _torch_conv(norm, 2, in_channels, out_channels, 3, padding=1)
    with_one = norm.preserves_magnitude
    scale = norm.input_layer(image_channels, with_one, **options)
    return scale, norm.first_conv(in_channels + with_one, out_channels, 3, padding=1)


def make_output(norm_config: Mapping[str, Any], in_channels: int, out_channels: int) -> nn.Module:
    """The last 3x3 convolution of a network: torch's, or to preserve magnitudes one with a gain of 0 at first."""
    if _read(norm_config)[0].preserves_magnitude:
        return MagnitudePreservingConv(in_channels, out_channels, 3, padding=1, zero_gain=True)
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def make_linear(
    norm_config: Mapping[str, Any], in_features: int, out_features: int, *, zero_gain: bool = False
) -> nn.Linear:
    """A linear layer: torch's, or one that preserves magnitudes, with a gain of 0 at first if zero_gain."""
    if _read(norm_config)[0].preserves_magnitude:
        return MagnitudePreservingLinear(in_features, out_features, zero_gain=zero_gain)
    return nn.Linear(in_features, out_features)


def _read(norm_config: Mapping[str, Any]) -> tuple[type[NormLayer], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The class of a config's kind, and the options of its constructor, its residual layer's and its input layer's."""
    values = dict(norm_config)
    kind = values.pop("kind", "group")
    if kind not in list(NORMS):
        raise ValueError(f"kind must be one of {', '.join(NORMS)}; got {kind!r}")
    keys = dict.fromkeys(key for norm in NORMS.values() for key in norm.options())
    if unknown := [key for key in values if key not in keys]:
        raise ValueError(f"unknown key {', '.join(map(repr, unknown))}; valid are kind, {', '.join(keys)}")
    norm = NORMS[kind]
    layers = (norm, norm.residual_layer, norm.input_layer)
    options, of_residual, of_input = (validate_options(layer, values) if layer else {} for layer in layers)
    return norm, options, of_residual, of_input
