"""From a norm config to the layer, and to what goes with it in a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batch import BatchNorm, BatchRenorm, GhostBatchNorm, SwitchableNorm, SyncBatchNorm
from .conv import CONVOLUTIONS, ScaledWS, WeightNorm, WeightStandardization
from .group import FRN, EvoNormS0, GroupNorm, GroupRMSNorm, InstanceNorm, LayerNorm
from .layer import NoNorm, NormLayer
from .magnitude import MagnitudePreserving, PixelNorm
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
    norm, options, _ = _read(norm_config)
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

    Its parameters are `weight`, initialized as torch does, `bias`, except for pixel and magnitude_preserving, and
    `gain`, (out_channels,), where the formula has one.

    Raises:
        ValueError: the norm config is not valid, or ndim is not 1, 2 or 3.
    """
    if ndim not in CONVOLUTIONS:
        raise ValueError(f"ndim must be one of {list(CONVOLUTIONS)}; got {ndim!r}")
    norm, _, _ = _read(norm_config)
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "bias": bias}
    if norm.conv_layer is None:
        return CONVOLUTIONS[ndim](in_channels, out_channels, kernel_size, **settings)
    return norm.conv_layer(in_channels, out_channels, kernel_size, **settings, ndim=ndim)


def make_residual(norm_config: Mapping[str, Any]) -> nn.Module:
    """The end of a residual block: forward(x, h) -> x + h, or the kind's `residual_layer`.

    x is the block's input, h the output of its layers. Raises ValueError if the norm config is not valid.
    """
    norm, _, options = _read(norm_config)
    return norm.residual_layer(**options)


def _read(norm_config: Mapping[str, Any]) -> tuple[type[NormLayer], dict[str, Any], dict[str, Any]]:
    """The class of a config's kind, and the options of its constructor and of its residual layer's."""
    values = dict(norm_config)
    kind = values.pop("kind", "group")
    if kind not in list(NORMS):
        raise ValueError(f"kind must be one of {', '.join(NORMS)}; got {kind!r}")
    keys = dict.fromkeys(key for norm in NORMS.values() for key in norm.options())
    if unknown := [key for key in values if key not in keys]:
        raise ValueError(f"unknown key {', '.join(map(repr, unknown))}; valid are kind, {', '.join(keys)}")
    norm = NORMS[kind]
    return norm, validate_options(norm, values), validate_options(norm.residual_layer, values)
