"""What every norm layer is, and the conditioning and activation around a normalization written in torch operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnunet.ops import ACTIVATIONS

from .options import EPS, Option, first_problem

CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


class Sum(nn.Module):
    """The sum that closes a residual block."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x: what the block got; h: what its layers made of it; both of one shape -> as x."""
        return x + h


class NormLayer(ABC):
    """One kind of normalization: the layer, and what goes with it in a network.

    An instance is an nn.Module: norm, conditioning and activation in one call, `forward(x, *, add=None,
    scale=None, shift=None)` on x (N, C, *spatial) with 0 to 3 spatial dims and tables (N, C). Classmethods
    say how to build it, the convolutions around it and the sum that closes a residual block.
    """

    batch_dependent: ClassVar[bool] = False
    """A sample's output depends on the rest of the batch, in training."""
    local: ClassVar[bool] = False
    """Statistics, if it has any, are those of one position."""
    has_state: ClassVar[bool] = False
    """It keeps buffers that a forward pass in training changes."""
    repeatable: ClassVar[bool] = True
    """Run again in backward (torch.utils.checkpoint), a forward pass in training gives the same."""
    options: ClassVar[Mapping[str, Option]] = {}
    """The keys of a norm config that the layer reads."""
    block_options: ClassVar[Mapping[str, Option]] = {}
    """Those that `conv` and `residual` read."""

    @classmethod
    def check(cls, config: Mapping[str, Any], num_channels: int) -> str | None:
        """What is wrong with this config for a layer of num_channels, in words, or None."""
        return first_problem({**cls.options, **cls.block_options}, config)

    @classmethod
    @abstractmethod
    def from_config(
        cls, config: Mapping[str, Any], num_channels: int, *, activation: str | None, ndim: int
    ) -> nn.Module:
        """The layer for a config that `check` found nothing wrong with."""

    @classmethod
    def conv(
        cls,
        config: Mapping[str, Any],
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int,
        padding: int,
        bias: bool,
        ndim: int,
    ) -> nn.Module:
        """A convolution for this kind; torch's own where the kind does not change it."""
        convolution = CONVOLUTIONS[ndim]
        return convolution(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias)

    @classmethod
    def residual(cls, config: Mapping[str, Any]) -> nn.Module:
        """forward(x, h) -> the output of a residual block, from its input and what its layers made of it."""
        return Sum()


class NormAct(NormLayer, nn.Module):
    """The conditioning and the activation around `normalize`, which is all that most kinds have to write.

        u = x + add[n, c] ;  v = normalize(u) * weight[c] + bias[c] ;  w = v * (1 + scale[n, c]) + shift[n, c]
        y = silu(w), or w where activation is None

    All of it is fp32 (float64 where x is), also under autocast; y has x's dtype and memory format.

    Raises:
        ValueError: an unknown activation; in forward, tables that do not fit x.
    """

    options: ClassVar[Mapping[str, Option]] = {"eps": EPS}
    affine: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """Which of the two parameters, (C,), it has. Weight starts at 1, bias at 0."""

    def __init__(self, num_channels: int, *, activation: str | None = "silu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(ACTIVATIONS)}; got {activation!r}")
        self.num_channels, self.activation = num_channels, activation
        self.weight = nn.Parameter(torch.ones(num_channels)) if "weight" in self.affine else None
        self.bias = nn.Parameter(torch.zeros(num_channels)) if "bias" in self.affine else None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], num_channels: int, *, activation: str | None, ndim: int
    ) -> nn.Module:
        """The constructor with the config's values of `options` as its further arguments."""
        return cls(num_channels, activation=activation, **{key: config[key] for key in cls.options})

    @abstractmethod
    def normalize(self, u: Tensor) -> Tensor:
        """u: (N, C, *spatial), 1 to 3 spatial dims, fp32 or float64 -> as u."""

    def activate(self, w: Tensor) -> Tensor:
        """What `activation` stands for."""
        return F.silu(w) if self.activation == "silu" else w

    def forward(
        self,
        x: Tensor,
        *,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """x: (N, C, *spatial); add, scale, shift: (N, C) -> y as x."""
        for name, table in (("add", add), ("scale", scale), ("shift", shift)):
            if table is not None and table.shape != x.shape[:2]:
                given = f"{tuple(table.shape)} with x of {tuple(x.shape)}"
                raise ValueError(f"{name} must have shape {tuple(x.shape[:2])}; got {given}")
        with torch.autocast(x.device.type, enabled=False):
            u = (x if x.dim() > 2 else x.unsqueeze(2)).to(_statistics_dtype(x))
            if add is not None:
                u = u + append_dims(add, u)
            y = self.activate(self._conditioned(self.normalize(u), scale, shift)).to(x.dtype)
        return y if x.dim() > 2 else y.squeeze(2)

    def _conditioned(self, v: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        """v * gain + offset, with the parameters and the tables in one gain and one offset."""
        gain, offset = (None if p is None else append_dims(p, v) for p in (self.weight, self.bias))
        if scale is not None:
            growth = 1 + append_dims(scale, v)
            gain = growth if gain is None else gain * growth
            offset = None if offset is None else offset * growth
        if shift is not None:
            table = append_dims(shift, v)
            offset = table if offset is None else offset + table
        if gain is None:
            return v if offset is None else v + offset
        return v * gain if offset is None else torch.addcmul(offset, v, gain)

    def extra_repr(self) -> str:
        settings = [f"{key}={getattr(self, key)!r}" for key in self.options if hasattr(self, key)]
        return ", ".join([str(self.num_channels), *settings, f"activation={self.activation!r}"])


def append_dims(table: Tensor, u: Tensor) -> Tensor:
    """(C,) or (N, C), also where N or C is 1, in u's dtype, to be broadcast over u, (N, C, *spatial)."""
    return table.to(u.dtype).reshape(*table.shape, *(1,) * (u.dim() - 2))


def spatial_dims(u: Tensor) -> tuple[int, ...]:
    """The spatial dimensions of u, (N, C, *spatial)."""
    return tuple(range(2, u.dim()))


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
