"""Normalization over groups of channels and positions: by the fused operator, or with an activation of its own."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import Tensor, nn
from typing_extensions import Doc

from gnunet.ops import GroupNormSiLU

from .layer import Eps, NormAct, NormLayer, append_dims, spatial_dims

Groups = Annotated[
    Annotated[int, Gt(0)] | None, Doc("Number of groups in every layer; null if channels_per_group is given.")
]
ChannelsPerGroup = Annotated[Annotated[int, Gt(0)] | None, Doc("Channels in each group, as an alternative to groups.")]
Backend = Annotated[
    Literal["auto", "eager", "reference", "triton", "cuda"],
    Doc("The implementation of the operator; does not change what is computed."),
]


def resolve_groups(num_channels: int, groups: int | None, channels_per_group: int | None) -> int:
    """The number of groups; channels_per_group takes precedence."""
    name, number = ("groups", groups) if channels_per_group is None else ("channels_per_group", channels_per_group)
    if number is None:
        raise ValueError("one of groups and channels_per_group must be a number; got None for both")
    if num_channels % number:
        valid = ", ".join(str(n) for n in range(1, num_channels + 1) if num_channels % n == 0)
        raise ValueError(f"{name} = {number} does not divide {num_channels} channels; valid: {valid}")
    return number if channels_per_group is None else num_channels // number


class GroupNorm(NormLayer, GroupNormSiLU):
    """(u - mean) / sqrt(var + eps) over groups of channels and all positions: group normalization.

    Wu and He, Group Normalization (arXiv:1803.08494).
    """

    def __init__(
        self,
        num_channels: int,
        *,
        groups: Groups = 32,
        channels_per_group: ChannelsPerGroup = None,
        eps: Eps = 1e-5,
        backend: Backend = "auto",
        activation: str | None = "silu",
    ) -> None:
        groups = resolve_groups(num_channels, groups, channels_per_group)
        super().__init__(groups, num_channels, eps, activation=activation, backend=backend)


class GroupRMSNorm(GroupNorm):
    """u / sqrt(mean(u^2) + eps) over groups of channels and all positions: group normalization without centering.

    After Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv:1910.07467), and configuration C of
    Karras et al. (arXiv:2312.02696). Weight and bias are those of group normalization.
    """

    def __init__(self, num_channels: int, **options: object) -> None:
        super().__init__(num_channels, **options)  # type: ignore[arg-type]
        self.center = False


class LayerNorm(NormLayer, GroupNormSiLU):
    """Group normalization with one group: over all channels and positions of a sample.

    Ba et al., Layer Normalization (arXiv:1607.06450).
    """

    def __init__(
        self, num_channels: int, *, eps: Eps = 1e-5, backend: Backend = "auto", activation: str | None = "silu"
    ) -> None:
        super().__init__(1, num_channels, eps, activation=activation, backend=backend)


class InstanceNorm(LayerNorm):
    """Group normalization with one channel in each group.

    Ulyanov et al., Instance Normalization (arXiv:1607.08022).
    """

    def __init__(self, num_channels: int, **options: object) -> None:
        super().__init__(num_channels, **options)  # type: ignore[arg-type]
        self.num_groups = num_channels


class FRN(NormAct):
    """u / sqrt(mean(u^2) + eps) over the positions of each channel, and max(w, threshold[c]) as activation.

    The thresholded linear unit takes the place of SiLU in a layer with activation; its threshold is initialized to 0.
    For inputs with a single position, only u / |u| is left. Singh and Krishnan, Filter Response Normalization Layer
    (arXiv:1911.09737).
    """

    def __init__(self, num_channels: int, *, eps: Eps = 1e-5, activation: str | None = "silu") -> None:
        super().__init__(num_channels, activation=activation)
        self.eps = eps
        self.threshold = None if activation is None else nn.Parameter(torch.zeros(num_channels))

    def normalize(self, u: Tensor) -> Tensor:
        return u * torch.rsqrt(u.square().mean(spatial_dims(u), keepdim=True) + self.eps)

    def activate(self, w: Tensor) -> Tensor:
        return w if self.threshold is None else torch.maximum(w, append_dims(self.threshold, w))


class EvoNormS0(NormAct):
    """u * sigmoid(gate[c] * u) / sqrt(var + eps) over groups of channels and all positions.

    In a layer with activation the numerator takes the place of SiLU, and no activation follows the conditioning;
    without activation it is u / sqrt(var + eps). The gate is initialized to 1. Liu et al., Evolving
    Normalization-Activation Layers (arXiv:2004.02967).
    """

    def __init__(
        self,
        num_channels: int,
        *,
        groups: Groups = 32,
        channels_per_group: ChannelsPerGroup = None,
        eps: Eps = 1e-5,
        activation: str | None = "silu",
    ) -> None:
        super().__init__(num_channels, activation=activation)
        self.groups, self.eps = resolve_groups(num_channels, groups, channels_per_group), eps
        self.gate = None if activation is None else nn.Parameter(torch.ones(num_channels))

    def normalize(self, u: Tensor) -> Tensor:
        # Splitting the channel dimension is a view in every memory format.
        grouped = u.unflatten(1, (self.groups, -1))
        variance = grouped.var(tuple(range(2, grouped.dim())), correction=0, keepdim=True)
        numerator = u if self.gate is None else u * torch.sigmoid(append_dims(self.gate, u) * u)
        return (numerator.unflatten(1, (self.groups, -1)) * torch.rsqrt(variance + self.eps)).flatten(1, 2)

    def activate(self, w: Tensor) -> Tensor:
        return w
