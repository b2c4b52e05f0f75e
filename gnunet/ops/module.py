"""The operator as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .group_norm_silu import ACTIVATIONS, backend_names, group_norm_silu


class GroupNormSiLU(nn.Module):
    """torch.nn.GroupNorm with the conditioning and the SiLU of a diffusion U-Net's blocks in one operation.

    Parameters `weight` and `bias`, (C,), are named and initialized as in nn.GroupNorm, so that state dicts load both
    ways; affine=False leaves out both, bias=False the latter. See `gnunet.ops.group_norm_silu` for the formula, shapes,
    dtypes and backends.

    Raises:
        ValueError: num_groups does not divide num_channels; an unknown activation or backend.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        activation: str | None = "silu",
        center: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"num_groups must divide num_channels; got {num_groups} and {num_channels}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(ACTIVATIONS)}; got {activation!r}")
        if backend not in backend_names():
            raise ValueError(f"backend must be one of {backend_names()}; got {backend!r}")
        self.num_groups, self.num_channels, self.eps, self.affine = num_groups, num_channels, eps, affine
        self.activation, self.center, self.backend = activation, center, backend
        self.weight, self.bias = (
            nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype)) if is_given else None
            for is_given in (affine, affine and bias)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, *, add: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """x: (N, C, *spatial); add, scale, shift: (N, C) -> y as x."""
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            add=add,
            scale=scale,
            shift=shift,
            activation=self.activation,
            center=self.center,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"activation={self.activation!r}, center={self.center}, backend={self.backend!r}, "
            f"bias={self.bias is not None}"
        )
