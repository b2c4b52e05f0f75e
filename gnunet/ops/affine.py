"""weight, bias, scale and shift as one factor and one offset of a channel, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .arguments import NormArgs


class Affine(NamedTuple):
    """Tables with one row for all samples or one for each."""

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

    def effective(self) -> tuple[Tensor | None, Tensor | None]:
        """weight_eff = weight * (1 + scale) and bias_eff = bias * (1 + scale) + shift; None stands for 1 and 0."""
        weight, bias, one_plus_scale, shift = self
        if one_plus_scale is not None:
            weight = one_plus_scale if weight is None else weight * one_plus_scale
            bias = None if bias is None else bias * one_plus_scale
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return weight, bias

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
