"""GroupNorm + SiLU, forward and backward, in torch operations for a compiler to fuse with what is around them.

Forward and backward each take one pass over the feature map for sums and one for the result. What a group shares is
stored as a table of channels, so that no loop over the map has to find a channel's group: on a CPU torch.compile does
not vectorize such a loop, and leaves out elements where it slices the result (PyTorch 2.13).

In the names, w is what the activation takes, w = x_hat * weight_eff + bias_eff; dw and so on are gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager, reference
from .arguments import Affine, NormArgs, effective_affine
from .autograd import library_operator
from .layout import SAMPLING_STRIDE

_UNROLLED = 8  # torch.compile unrolls a sum of fewer numbers than this and computes it where it is used


def forward(args: NormArgs) -> tuple[Tensor, Tensor]:
    x, *_, num_groups, eps, silu, center = args
    if x.numel() == 0:
        return eager.forward(args)
    u, affine = _added(args), _affine(args)
    mean = None
    if center:
        # The mean of some positions is subtracted first, so that no large mean is squared.
        sample = u.flatten(2)[:, :, ::SAMPLING_STRIDE] if u.dim() > 2 else u
        origin = _in_memory(_group_means(sample, num_groups))
        centered = u - _broadcast(origin, x)
        correction = _group_means(centered, num_groups)
        variance = (_group_means(centered * centered, num_groups) - correction * correction).clamp_min(0)
        mean, rstd = _in_memory(origin + correction), _in_memory(torch.rsqrt(variance + eps))
        u = u - _broadcast(mean, x)
    else:
        rstd = _in_memory(torch.rsqrt(_group_means(u * u, num_groups) + eps))
    w = _scale_and_shift(u, rstd, *effective_affine(*affine))
    y = torch.empty_like(x).copy_(F.silu(w) if silu else w)
    stats = rstd[None] if mean is None else torch.stack((mean, rstd))
    return y, stats.unflatten(2, (num_groups, -1))[..., 0].contiguous()


def backward(dy: Tensor, stats: Tensor, args: NormArgs, needs: Sequence[bool]) -> list[Tensor]:
    x, *_, num_groups, _, silu, center = args
    if x.numel() == 0:
        return eager.backward(dy, stats, args, needs)
    u, affine = _added(args), _affine(args)
    weight, bias = effective_affine(*affine)
    group_channels = x.shape[1] // num_groups
    *mean, rstd = (_in_memory(t.unsqueeze(2).expand(-1, -1, group_channels).flatten(1)) for t in stats)
    if center:
        u = u - _broadcast(mean[0], x)
    dw = dy.to(stats.dtype)
    if silu:
        dw = torch.ops.aten.silu_backward.default(dw, _scale_and_shift(u, rstd, weight, bias))
    sum_dw, sum_dw_x_hat = _sum_positions(dw), _sum_positions(dw * u) * rstd
    dx = dadd = None
    if needs[0] or needs[3]:
        # du = (weight_eff * dw - mean(weight_eff * dw) - x_hat * mean(weight_eff * dw * x_hat)) * rstd, means over the
        # group, the first of which comes from centering.
        factor = rstd if weight is None else rstd * weight
        size = group_channels * prod(x.shape[2:])
        mean_dy_xhat = _in_memory(_sum_group(sum_dw_x_hat * factor, num_groups) / size * rstd)
        du = dw * _broadcast(factor, x) - u * _broadcast(mean_dy_xhat, x)
        if center:
            du = du - _broadcast(_in_memory(_sum_group(sum_dw * factor, num_groups) / size), x)
        dx = torch.empty_like(x).copy_(du) if needs[0] else None
        dadd = _sum_positions(du) if needs[3] else None
    dweight, dbias, dscale, dshift = affine.gradients([needs[i] for i in (1, 2, 4, 5)], sum_dw, sum_dw_x_hat)
    return args.needed(needs, dx, dweight, dbias, dadd, dscale, dshift)


def _added(args: NormArgs) -> Tensor:
    """x + add in the dtype of the statistics."""
    x = args.x.to(args.dtype)
    return x if args.add is None else x + _broadcast(args.add.to(x.dtype), x)


def _affine(args: NormArgs) -> Affine:
    return Affine.of(args, lambda t: t.to(args.dtype).reshape(-1, args.x.shape[1]))


def _broadcast(table: Tensor, x: Tensor) -> Tensor:
    """A table, (N or 1, C), in the shape that broadcasts over x."""
    return table.reshape(*table.shape, *(1,) * (x.dim() - 2))


def _scale_and_shift(u: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    w = u * _broadcast(rstd if weight is None else rstd * weight, u)
    return w if bias is None else w + _broadcast(bias, u)


def _sum_positions(t: Tensor) -> Tensor:
    return t.flatten(2).sum(2) if t.dim() > 2 else t.clone()  # a gradient must not be an alias of dy


def _sum_group(table: Tensor, num_groups: int) -> Tensor:
    """For each channel the sum over its group."""
    grouped = table.unflatten(1, (num_groups, 1, -1))
    return grouped.expand(-1, -1, grouped.shape[3], -1).sum(3).flatten(1)


def _group_means(t: Tensor, num_groups: int) -> Tensor:
    """A table with the mean of each channel's group."""
    return _sum_group(_sum_positions(t), num_groups) / (prod(t.shape[1:]) // num_groups)


def _in_memory(table: Tensor) -> Tensor:
    """The table as a reduction's result, which torch.compile stores, and does not recompute where it is broadcast."""
    return table.unsqueeze(2).expand(-1, -1, _UNROLLED).amax(2)


_operator: Any = SimpleNamespace(forward=forward, backward=backward)
_group_norm_silu = library_operator("group_norm_silu", _operator, traceable=True)


def group_norm_silu(args: NormArgs) -> Tensor:
    """y, differentiable, as torch's tracers see it: this module when compiling, the eager operator under a dispatch
    mode, and in an exported program the reference formula, which runs without this package."""
    if torch.compiler._is_exporting_flag:  # torch.compiler.is_exporting() is always true to PyTorch 2.9's torch.compile
        return reference.group_norm_silu(args)
    return _group_norm_silu(args) if torch.compiler.is_compiling() else eager.traced_group_norm_silu(args)
