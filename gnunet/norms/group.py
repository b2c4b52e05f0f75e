"""Normalization over groups of channels, and its two extremes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gnunet.ops import GroupNormSiLU, backend_names


def valid_groups(num_channels: int) -> list[int]:
    """The group counts that divide num_channels, ascending."""
    return [groups for groups in range(1, num_channels + 1) if num_channels % groups == 0]


class GroupNorm(GroupNormSiLU):
    """Group normalization (Wu and He, arXiv:1803.08494) by `groups`, or `channels_per_group` if given."""

    batch_dependent = False
    local = False
    has_state = False

    @classmethod
    def groups_for(cls, config: Mapping[str, Any], num_channels: int) -> int:
        """How many groups this config means for a layer; 0 where there is no such whole number."""
        per_group = config["channels_per_group"]
        if per_group is None:
            groups: int = config["groups"]
            return groups if groups > 0 and num_channels % groups == 0 else 0
        return num_channels // per_group if per_group > 0 and num_channels % per_group == 0 else 0

    @classmethod
    def check(cls, config: Mapping[str, Any], num_channels: int) -> str | None:
        """What is wrong with this config for a layer of num_channels, or None."""
        if config["backend"] not in backend_names():
            return f"backend must be one of {backend_names()}; got {config['backend']!r}"
        if cls.groups_for(config, num_channels):
            return None
        key = "groups" if config["channels_per_group"] is None else "channels_per_group"
        return (
            f"{key} = {config[key]} does not divide {num_channels} channels; "
            f"{key} that do: {', '.join(map(str, valid_groups(num_channels)))}"
        )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], num_channels: int, *, activation: str | None, ndim: int
    ) -> GroupNorm:
        """The layer for a config that `check` found nothing wrong with; any number of spatial dims."""
        groups = cls.groups_for(config, num_channels)
        return cls(groups, num_channels, config["eps"], activation=activation, backend=config["backend"])


class LayerNorm(GroupNorm):
    """Normalization over a sample's channels and positions: one group (Ba et al., arXiv:1607.06450)."""

    @classmethod
    def groups_for(cls, config: Mapping[str, Any], num_channels: int) -> int:
        return 1


class InstanceNorm(GroupNorm):
    """Normalization of every channel by itself: a group for each (Ulyanov et al., arXiv:1607.08022)."""

    @classmethod
    def groups_for(cls, config: Mapping[str, Any], num_channels: int) -> int:
        return num_channels
