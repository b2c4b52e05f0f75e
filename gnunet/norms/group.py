"""Normalization over groups of channels, and its two extremes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from gnunet.ops import GroupNormSiLU, backend_names

from .layer import NormAct, NormLayer
from .options import EPS, Option, is_count

BACKEND = Option(
    "auto",
    lambda value: value in backend_names(),
    f"one of {', '.join(backend_names())}",
    "How the layers are computed; never changes what is computed.",
    str,
)


def _is_count_or_null(value: Any) -> bool:
    return value is None or is_count(value)


def valid_groups(num_channels: int) -> list[int]:
    """The group counts that divide num_channels, ascending."""
    return [groups for groups in range(1, num_channels + 1) if num_channels % groups == 0]


class _Grouped(NormLayer):
    """Layers over groups of channels: by `groups`, or `channels_per_group` if given."""

    options: ClassVar[Mapping[str, Option]] = {
        "groups": Option(
            32,
            _is_count_or_null,
            "a whole number above 0 that divides every layer's channels, or null",
            "Number of groups in every layer; null where channels_per_group is given.",
            int | None,
        ),
        "channels_per_group": Option(
            None,
            _is_count_or_null,
            "a whole number above 0 that divides every layer's channels, or null",
            "Channels in each group, as an alternative to groups.",
            int | None,
        ),
        "eps": EPS,
    }

    @classmethod
    def groups_for(cls, config: Mapping[str, Any], num_channels: int) -> int:
        """How many groups this config means for a layer; 0 where there is no such whole number."""
        per_group = config["channels_per_group"]
        number = config["groups"] if per_group is None else per_group
        if not is_count(number) or num_channels % number:
            return 0
        groups: int = number if per_group is None else num_channels // number
        return groups

    @classmethod
    def check(cls, config: Mapping[str, Any], num_channels: int) -> str | None:
        error = super().check(config, num_channels)
        if error or cls.groups_for(config, num_channels):
            return error
        key = "groups" if config["channels_per_group"] is None else "channels_per_group"
        return (
            f"{key} = {config[key]} does not divide {num_channels} channels; "
            f"{key} that do: {', '.join(map(str, valid_groups(num_channels)))}"
        )


class GroupNorm(_Grouped, GroupNormSiLU):
    """Group normalization (Wu and He, arXiv:1803.08494) by `groups`, or `channels_per_group` if given.

    All of it is the fused operator, `gnunet.ops.group_norm_silu`.
    """

    options: ClassVar[Mapping[str, Option]] = {**_Grouped.options, "backend": BACKEND}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], num_channels: int, *, activation: str | None, ndim: int
    ) -> nn.Module:
        groups = cls.groups_for(config, num_channels)
        return cls(groups, num_channels, config["eps"], activation=activation, backend=config["backend"])


class LayerNorm(GroupNorm):
    """Normalization over a sample's channels and positions: one group (Ba et al., arXiv:1607.06450)."""

    options: ClassVar[Mapping[str, Option]] = {"eps": EPS, "backend": BACKEND}

    @classmethod
    def groups_for(cls, config: Mapping[str, Any], num_channels: int) -> int:
        return 1


class InstanceNorm(LayerNorm):
    """Normalization of every channel by itself: a group for each (Ulyanov et al., arXiv:1607.08022)."""

    @classmethod
    def groups_for(cls, config: Mapping[str, Any], num_channels: int) -> int:
        return num_channels


class GroupRMSNorm(GroupNorm):
    """GroupNorm without its centring: u / sqrt(mean(u^2) + eps) over groups of channels and all positions.

    After Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv:1910.07467), and configuration C of
    Karras et al. (arXiv:2312.02696). It keeps GroupNorm's weight and bias, so that the two differ in one thing.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, **settings: Any) -> None:
        super().__init__(num_groups, num_channels, eps, center=False, **settings)


class GroupedNorm(_Grouped, NormAct):
    """A base of layers in torch operations with statistics over groups of channels and all positions."""

    def __init__(self, num_channels: int, *, groups: int, eps: float, activation: str | None = "silu") -> None:
        super().__init__(num_channels, activation=activation)
        self.groups, self.eps = groups, eps

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], num_channels: int, *, activation: str | None, ndim: int
    ) -> nn.Module:
        groups = cls.groups_for(config, num_channels)
        return cls(num_channels, groups=groups, eps=config["eps"], activation=activation)

    def grouped(self, u: Tensor) -> Tensor:
        """(N, C, *spatial) -> (N, groups, C / groups, *spatial), a view in every memory format."""
        return u.unflatten(1, (self.groups, -1))
