"""The operator's arguments, which travel as one tuple through autograd and the backends, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class NormArgs(NamedTuple):
    """The arguments of `gnunet.ops.group_norm_silu`, after its checks: those of TENSORS first."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    add: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    num_groups: int
    eps: float
    silu: bool
    center: bool

    @property
    def tensors(self) -> tuple[Any, ...]:
        """x, weight, bias, add, scale, shift: what has a gradient, in the order of the gradients."""
        return self[:6]

    @property
    def options(self) -> tuple[Any, ...]:
        """What is not a tensor."""
        return self[6:]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of statistics and intermediate results."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def has_tables(self) -> bool:
        """Whether add, scale or shift is given."""
        return any(t is not None for t in (self.add, self.scale, self.shift))

    def needed(self, needs: Sequence[bool], dx: Tensor | None, *others: Tensor | None) -> list[Tensor]:
        """The gradients that are needed, in the shapes and dtypes of their tensors; dx as it is."""
        tensors = zip(self.tensors[1:], others, needs[1:], strict=True)
        small = [g.reshape(t.shape).to(t.dtype) for t, g, need in tensors if need and t is not None and g is not None]
        return [dx, *small] if needs[0] and dx is not None else small

    def signature(self) -> Hashable:
        """Everything but the tensors' values and addresses: what a backend may prepare itself for."""
        x, weight, bias, add, scale, shift, num_groups, eps, silu, center = self
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


TENSORS = NormArgs._fields[:6]  # the names of `NormArgs.tensors`


class Affine(NamedTuple):
    """weight, bias, scale and shift as tables of channels, with one row for all samples or one for each."""

    weight: Tensor | None
    bias: Tensor | None
    one_plus_scale: Tensor | None
    shift: Tensor | None

    @classmethod
    def of(cls, args: NormArgs, to_table: Callable[[Tensor], Tensor]) -> Affine:
        """The arguments, converted by `to_table`."""
        tables = (None if t is None else to_table(t) for t in (args.weight, args.bias, args.scale, args.shift))
        weight, bias, scale, shift = tables
        return cls(weight, bias, None if scale is None else 1 + scale, shift)

    def gradients(
        self, needs: Sequence[bool], sum_dw: Tensor, sum_dw_x_hat: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of weight, bias, scale and shift that are needed, from sums over the positions, (N, *table)."""
        need_weight, need_bias, need_scale, need_shift = needs
        scale = self.one_plus_scale
        dweight = dbias = dscale = None
        if need_weight:
            dweight = (sum_dw_x_hat if scale is None else sum_dw_x_hat * scale).sum(0)
        if need_bias:
            dbias = (sum_dw if scale is None else sum_dw * scale).sum(0)
        if need_scale:
            dscale = sum_dw_x_hat if self.weight is None else sum_dw_x_hat * self.weight
            dscale = dscale if self.bias is None else dscale + sum_dw * self.bias
        return dweight, dbias, dscale, sum_dw if need_shift else None


def effective_affine(
    weight: Tensor | None, bias: Tensor | None, one_plus_scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """weight_eff = weight * (1 + scale) and bias_eff = bias * (1 + scale) + shift; None stands for 1 and 0."""
    if one_plus_scale is not None:
        weight = one_plus_scale if weight is None else weight * one_plus_scale
        bias = None if bias is None else bias * one_plus_scale
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return weight, bias
