"""The operator's arguments, as its implementations take them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class NormArgs(NamedTuple):
    """The arguments of `gnunet.ops.group_norm_silu`, after its checks."""

    x: Tensor
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    add: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    silu: bool
    center: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """x, weight, bias, add, scale, shift: what has a gradient, in the order of the gradients."""
        return self.x, self.weight, self.bias, self.add, self.scale, self.shift

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed, whatever x and the others are given in."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def has_tables(self) -> bool:
        """Whether add, scale or shift is given."""
        return any(t is not None for t in (self.add, self.scale, self.shift))

    def needed(self, needs: Sequence[bool], dx: Tensor | None, *others: Tensor | None) -> list[Tensor]:
        """The gradients that are needed, all but dx in the shapes and dtypes of what they are of."""
        tensors = zip(self.tensors[1:], others, needs[1:], strict=True)
        small = [g.reshape(t.shape).to(t.dtype) for t, g, need in tensors if need and t is not None and g is not None]
        return [dx, *small] if needs[0] and dx is not None else small

    def signature(self) -> Hashable:
        """All but the tensors' values and addresses: what an implementation may prepare itself for."""
        x, num_groups, weight, bias, eps, add, scale, shift, silu, center = self
        return (
            x.shape,
            x.stride(),
            x.dtype,
            x.device,
            num_groups,
            None if weight is None else (weight.shape, weight.stride(), weight.dtype, weight.device),
            None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.device),
            eps,
            None if add is None else (add.shape, add.stride(), add.dtype, add.device),
            None if scale is None else (scale.shape, scale.stride(), scale.dtype, scale.device),
            None if shift is None else (shift.shape, shift.stride(), shift.dtype, shift.device),
            silu,
            center,
        )
