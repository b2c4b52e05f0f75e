"""From a norm config to a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from .group import GroupNorm, InstanceNorm, LayerNorm
from .none import NoNorm


class NormLayer(Protocol):
    """What every norm layer is, beside an nn.Module: norm, conditioning and activation in one call.

    batch_dependent: a sample's output depends on the rest of the batch. local: statistics are those of one
    position. has_state: it keeps buffers that a forward pass in training changes.
    """

    batch_dependent: bool
    local: bool
    has_state: bool

    def __call__(
        self,
        x: Tensor,
        *,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor: ...


NORMS: dict[str, type[GroupNorm] | type[NoNorm]] = {
    "group": GroupNorm,
    "layer": LayerNorm,
    "instance": InstanceNorm,
    "none": NoNorm,
}

DEFAULTS: dict[str, Any] = {
    "kind": "group",
    "groups": 32,
    "channels_per_group": None,
    "eps": 1e-5,
    "backend": "auto",
}


def check_norm(norm_config: Mapping[str, Any], num_channels: int) -> str | None:
    """What is wrong with a norm config for a layer of num_channels, in words, or None. Builds nothing."""
    unknown = [key for key in norm_config if key not in DEFAULTS]
    if unknown:
        return f"unknown key {', '.join(map(repr, unknown))}; valid are {', '.join(DEFAULTS)}"
    config = {**DEFAULTS, **norm_config}
    if config["kind"] not in NORMS:
        return f"kind must be one of {', '.join(NORMS)}; got {config['kind']!r}"
    return NORMS[config["kind"]].check(config, num_channels)


def make_norm(
    norm_config: Mapping[str, Any], num_channels: int, *, activation: str | None, ndim: int = 2
) -> nn.Module:
    """The norm layer for num_channels that a plain mapping describes.

    Args:
        norm_config: `kind` (group, layer, instance, none); `groups` or `channels_per_group` for group, the
            latter deciding where both are given; `eps`; `backend`. Keys left out are those of DEFAULTS.
        num_channels: C.
        activation: "silu" or None, applied last.
        ndim: spatial dimensions of the input.

    Returns:
        A `NormLayer`: forward(x, *, add=None, scale=None, shift=None) on (N, C, *spatial) and (N, C).

    Raises:
        ValueError: with the text of `check_norm`.
    """
    error = check_norm(norm_config, num_channels)
    if error:
        raise ValueError(f"norm: {error}")
    config = {**DEFAULTS, **norm_config}
    return NORMS[config["kind"]].from_config(config, num_channels, activation=activation, ndim=ndim)
