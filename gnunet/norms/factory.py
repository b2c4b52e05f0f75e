"""From a norm config to the layer, and to what goes with it in a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .batch import BatchNorm, GhostBatchNorm, SyncBatchNorm
from .batch_renorm import BatchRenorm
from .channel_norm import LayerChannelNorm, RMSNorm
from .concat_norm import SplitNorm
from .dyt import Derf, DyT
from .evonorm import EvoNormS0
from .frn import FRN
from .group import GroupNorm, GroupRMSNorm, InstanceNorm, LayerNorm
from .layer import CONVOLUTIONS, NormLayer
from .magnitude import MagnitudePreserving, PixelNorm
from .none import NoNorm
from .options import first_problem
from .switchable import SwitchableNorm
from .weight_norm import WeightNorm
from .weight_standardization import ScaledWS, WeightStandardization

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

DEFAULTS: dict[str, Any] = {"kind": "group"} | {
    key: option.default for norm in NORMS.values() for key, option in {**norm.options, **norm.block_options}.items()
}


def check_norm(norm_config: Mapping[str, Any], num_channels: int) -> str | None:
    """What is wrong with a norm config for a layer of num_channels, in words, or None. Builds nothing."""
    error = _check_keys(norm_config)
    if error:
        return error
    config = {**DEFAULTS, **norm_config}
    return NORMS[config["kind"]].check(config, num_channels)


def make_norm(norm_config: Mapping[str, Any], num_channels: int, *, activation: str | None, ndim: int = 2) -> nn.Module:
    """The norm layer for num_channels that a plain mapping describes.

    Args:
        norm_config: `kind`, a key of NORMS, and the keys that its class names in `options`. Keys left out are
            those of DEFAULTS; keys of other kinds are not looked at.
        num_channels: C.
        activation: "silu" or None, applied last. frn and evonorm_s0 have one of their own in SiLU's place.
        ndim: spatial dimensions of the input.

    Returns:
        A `NormLayer`: forward(x, *, add=None, scale=None, shift=None) on (N, C, *spatial) and (N, C).

    Raises:
        ValueError: with the text of `check_norm`.
    """
    _refuse(check_norm(norm_config, num_channels))
    norm, config = _kind_and_config(norm_config)
    return norm.from_config(config, num_channels, activation=activation, ndim=ndim)


def make_split_norm(
    norm_config: Mapping[str, Any], parts: Sequence[int], *, activation: str | None, ndim: int = 2
) -> nn.Module:
    """`make_norm` for a concatenation of parts with so many channels each, normalized apart: a `SplitNorm`.

    `groups` is the number of groups in each part.

    Raises:
        ValueError: with the text of `check_norm` for a part.
    """
    return SplitNorm([make_norm(norm_config, channels, activation=activation, ndim=ndim) for channels in parts])


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
    """The convolution that goes with a norm: torch's own, but for the kinds that change its weight.

    Those are weight_norm, weight_standardization, scaled_ws, pixel and magnitude_preserving. Parameters are
    `weight`, drawn as torch's are, and `bias`, and `gain`, (out_channels,), where the formula has one; pixel and
    magnitude_preserving have no bias.

    Raises:
        ValueError: an unknown key or kind; an ndim other than 1, 2 and 3.
    """
    if ndim not in CONVOLUTIONS:
        raise ValueError(f"ndim must be one of {list(CONVOLUTIONS)}; got {ndim!r}")
    norm, config = _kind_and_config(norm_config)
    return norm.conv(
        config, in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias, ndim=ndim
    )


def make_residual(norm_config: Mapping[str, Any]) -> nn.Module:
    """How a residual block ends with this norm: forward(x, h) -> x + h, or what the kind needs in its stead.

    x is the block's input, h what its layers made of it. scaled_ws scales h, by a gain that starts at 0; pixel
    and magnitude_preserving keep the magnitude of the sum.

    Raises:
        ValueError: an unknown key or kind; a value of the sum's own keys that is not valid.
    """
    norm, config = _kind_and_config(norm_config)
    _refuse(first_problem(norm.block_options, config))
    return norm.residual(config)


def _check_keys(norm_config: Mapping[str, Any]) -> str | None:
    """What is wrong with a norm config's keys and kind, in words, or None."""
    unknown = [key for key in norm_config if key not in DEFAULTS]
    if unknown:
        return f"unknown key {', '.join(map(repr, unknown))}; valid are {', '.join(DEFAULTS)}"
    kind = norm_config.get("kind", DEFAULTS["kind"])
    return None if kind in NORMS else f"kind must be one of {', '.join(NORMS)}; got {kind!r}"


def _kind_and_config(norm_config: Mapping[str, Any]) -> tuple[type[NormLayer], dict[str, Any]]:
    """The class of a config's kind, and the config with all keys; refuses what `_check_keys` does."""
    _refuse(_check_keys(norm_config))
    config = {**DEFAULTS, **norm_config}
    return NORMS[config["kind"]], config


def _refuse(error: str | None) -> None:
    if error:
        raise ValueError(f"norm: {error}")
