"""The base of every norm layer, and the conditioning and activation around a normalization in torch operations."""

from __future__ import annotations

import inspect
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn
from typing_extensions import Doc

from gnunet.ops import ACTIVATIONS
from gnunet.ops.arguments import effective_affine
from gnunet.ops.reference import append_dims, without_autocast

from .signature import options_of

Eps = Annotated[float, Gt(0), Doc("Added to the variance inside the root.")]


class ResidualAdd(nn.Module):
    """The sum x + h at the end of a residual block."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return x + h


class NormLayer:
    """A mixin for one kind of normalization: an nn.Module, and what goes with it in a network.

    The module is called as `forward(x, *, add=None, scale=None, shift=None)` with x (N, C, *spatial), of any number of
    spatial dims, and add, scale, shift (N, C): norm, conditioning and activation in one. Its constructor takes
    `num_channels`, `activation` ("silu" or None), and the kind's options as arguments with a default and an annotation,
    such as `eps: Annotated[float, Gt(0), Doc("...")] = 1e-5`. From these the config keys, their checks and their help
    are made.
    """

    batch_dependent: ClassVar[bool] = False  # in training, a sample's output depends on the rest of the batch
    is_pointwise: ClassVar[bool] = False  # statistics, if there are any, are those of a single position
    has_state: ClassVar[bool] = False  # it has buffers that change in the forward pass in training
    supports_checkpointing: ClassVar[bool] = True
    """Recomputing the forward pass in the backward pass (torch.utils.checkpoint) gives the same result."""
    conv_layer: ClassVar[type[nn.Module] | None] = None
    """The convolutions to use with this kind, a `ReparametrizedConv`; None: torch's."""
    input_layer: ClassVar[type[nn.Module] | None] = None
    """What scales a network's input, `UnitInput`, before a first convolution of `first_conv`; None: nothing, and
    torch's convolution. Its constructor's arguments are options too."""
    first_conv: ClassVar[type[nn.Module] | None] = None
    preserves_magnitude: ClassVar[bool] = False
    """All layers of a network with this kind should: linear layers, embeddings, attention, concatenations."""
    residual_layer: ClassVar[type[nn.Module]] = ResidualAdd
    """The end of a residual block with this kind, `forward(x, h)`. Its constructor's arguments are options too."""

    @classmethod
    def options(cls) -> dict[str, inspect.Parameter]:
        """The keys of a norm config that this kind reads, with their annotations and defaults."""
        classes: list[type] = [cls, cls.residual_layer, *([cls.input_layer] if cls.input_layer else [])]
        options = {name: option for each in classes for name, option in options_of(each).items()}
        del options["activation"]
        return options


class NormAct(NormLayer, nn.Module):
    """The conditioning and the activation around `normalize`, which is all that most kinds have to implement.

        u = x + add[n, c] ;  v = normalize(u) * weight[c] + bias[c] ;  w = v * (1 + scale[n, c]) + shift[n, c]
        y = silu(w), or w if activation is None

    All of it is computed in float32 (float64 if x is), also under autocast; y has x's dtype and memory format.
    """

    affine: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """Which of the two parameters, (C,), it has. Weight is initialized to 1, bias to 0."""

    def __init__(self, num_channels: int, *, activation: str | None = "silu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(ACTIVATIONS)}; got {activation!r}")
        self.num_channels, self.activation = num_channels, activation
        self.weight = nn.Parameter(torch.ones(num_channels)) if "weight" in self.affine else None
        self.bias = nn.Parameter(torch.zeros(num_channels)) if "bias" in self.affine else None

    def normalize(self, u: Tensor) -> Tensor:
        """u: (N, C, *spatial), at least one spatial dim, float32 or float64 -> as u."""
        raise NotImplementedError

    def activate(self, w: Tensor) -> Tensor:
        """The activation, or w if `activation` is None."""
        return F.silu(w) if self.activation == "silu" else w

    def forward(
        self, x: Tensor, *, add: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        for name, table in (("add", add), ("scale", scale), ("shift", shift)):
            if table is not None and table.shape != x.shape[:2]:
                raise ValueError(
                    f"{name} must have shape {tuple(x.shape[:2])}; got {tuple(table.shape)} with x of {tuple(x.shape)}"
                )
        with without_autocast(x.device):
            u = x if x.dim() > 2 else x.unsqueeze(2)
            u = u.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
            if add is not None:
                u = u + append_dims(add, u)
            y = self.activate(self._affine(self.normalize(u), scale, shift)).to(x.dtype)
        return y if x.dim() > 2 else y.squeeze(2)

    def _affine(self, v: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        """(v * weight + bias) * (1 + scale) + shift, as one multiplication and one addition."""
        one_plus_scale = None if scale is None else 1 + append_dims(scale, v)
        weight, bias, shift = (None if t is None else append_dims(t, v) for t in (self.weight, self.bias, shift))
        weight, bias = effective_affine(weight, bias, one_plus_scale, shift)
        if weight is None:
            return v if bias is None else v + bias
        return v * weight if bias is None else torch.addcmul(bias, v, weight)

    def extra_repr(self) -> str:
        settings = [f"{key}={getattr(self, key)!r}" for key in self.options() if hasattr(self, key)]
        return ", ".join([str(self.num_channels), *settings, f"activation={self.activation!r}"])


class NoNorm(NormAct):
    """y = act((x + add) * (1 + scale) + shift): no normalization, and no parameters.

    Weight and bias would repeat those of the convolution before it. Convolutions begin with a variance of 1 / fan_in,
    over SiLU's mean square behind one, and the last layer of a residual branch with 0 (Fixup, arXiv:1901.09321).
    """

    is_pointwise = True
    affine = ()

    def normalize(self, u: Tensor) -> Tensor:
        return u


def spatial_dims(u: Tensor) -> tuple[int, ...]:
    """The spatial dimensions of u, (N, C, *spatial)."""
    return tuple(range(2, u.dim()))
