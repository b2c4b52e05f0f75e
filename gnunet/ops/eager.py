"""GroupNorm + SiLU in plain torch operations, on any device; keeps nothing for backward that can be recomputed.

Statistics are those of the residual after an estimate of the mean is subtracted, so that a mean far from zero loses no
precision. On a CPU, PyTorch's own kernels for group norm compute them where they can, and the batch is processed in
chunks that stay in the caches.

In the names, w is what the activation takes, w = x_hat * weight_eff + bias_eff; dw and so on are gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Affine, NormArgs, effective_affine
from .autograd import apply, library_operator
from .layout import Layout, dense, with_strides_of

_MAX_NATIVE_POSITIONS = 4096
"""PyTorch's channels_last kernel adds positions one by one: with more, rstd would lose over two digits."""


def forward(args: NormArgs) -> tuple[Tensor, Tensor]:
    x, dtype = args.x, args.dtype
    if x.numel() == 0:
        return torch.empty_like(x), x.new_zeros((1 + args.center, x.shape[0], args.num_groups), dtype=dtype)
    args = dense(args)
    layout = Layout(args.x, args.num_groups)
    is_native = _can_use_native(layout, args)
    weight_eff, bias_eff = effective_affine(*Affine.of(args, partial(layout.per_channel, dtype=dtype)))
    added = None if args.add is None else layout.per_channel(args.add, dtype)
    y = torch.empty_like(args.x)
    values, results = layout.view(args.x), layout.view(y)
    means, rstds = [], []
    for chunk in layout.batch_chunks():
        u, a = values[chunk], _slice_batch(added, chunk)
        mean = layout.estimate_group_means(u, dtype) if args.center else None
        if mean is not None and a is not None:
            mean += a.mean(2, keepdim=True)
        u = _subtract(layout, u, mean, a, dtype)
        weight, bias = _slice_batch(weight_eff, chunk), _slice_batch(bias_eff, chunk)
        mean_correction: Tensor | None
        if is_native:
            w, mean_correction, rstd = _normalize_native(layout, u, weight, bias, args)
        else:
            w, mean_correction, rstd = _normalize(layout, u, weight, bias, args, results[chunk])
        if mean is not None and mean_correction is not None:
            means.append(mean.squeeze(2).add_(mean_correction))
        rstds.append(rstd)
        y = layout.write(y, chunk, F.silu(w, inplace=True) if args.silu else w)
    stats = torch.stack([_join(parts) for parts in (means, rstds) if parts])
    return (y if args.x is x else with_strides_of(y, torch.empty_like(x))), stats


def backward(dy: Tensor, stats: Tensor, args: NormArgs, needs: Sequence[bool]) -> list[Tensor]:
    x, dtype = args.x, stats.dtype
    if x.numel() == 0:
        zeros = [t if t is None else t.new_zeros(t.shape) for t in args.tensors]
        return args.needed(needs, torch.zeros_like(x), *zeros[1:])
    args = dense(args)
    layout = Layout(args.x, args.num_groups)
    is_native = _can_use_native(layout, args, backward=True)
    affine = Affine.of(args, partial(layout.per_channel, dtype=dtype))
    weight_eff, bias_eff = effective_affine(*affine)
    added = None if args.add is None else layout.per_channel(args.add, dtype)
    dx = torch.empty_like(args.x)
    values, dys, results = layout.view(args.x), layout.view(with_strides_of(dy, args.x)), layout.view(dx)
    sums_dw, sums_dw_x_hat, sums_du = [], [], []  # over the positions
    for chunk in layout.batch_chunks():
        mean, rstd = stats[0, chunk].unsqueeze(2) if args.center else None, stats[-1, chunk].unsqueeze(2)
        u = _subtract(layout, values[chunk], mean, _slice_batch(added, chunk), dtype)
        weight, bias = _slice_batch(weight_eff, chunk), _slice_batch(bias_eff, chunk)
        dw = dys[chunk].to(dtype)
        if args.silu:
            factor = layout.broadcast(rstd if weight is None else rstd * weight)
            w = fma(u, factor, None if bias is None else layout.broadcast(bias))
            dw = torch.ops.aten.silu_backward.grad_input(dw, w, grad_input=w)
        need_du = needs[0] or needs[3]
        if is_native:
            du, sum_dw, sum_dw_x_hat = _gradients_native(layout, dw, u, rstd, weight, need_du)
        else:
            du, sum_dw, sum_dw_x_hat = _gradients(layout, dw, u, rstd, weight, args.center, need_du, results[chunk])
        sums_dw.append(sum_dw)
        sums_dw_x_hat.append(sum_dw_x_hat)
        if du is not None and needs[3]:
            sums_du.append(layout.sums(du))
        if du is not None and needs[0]:
            dx = layout.write(dx, chunk, du)
    sums = _join(sums_dw), _join(sums_dw_x_hat)
    dweight, dbias, dscale, dshift = affine.gradients([needs[i] for i in (1, 2, 4, 5)], *sums)
    dadd = _join(sums_du) if needs[3] else None
    if needs[0] and args.x is not x:
        dx = with_strides_of(dx, torch.empty_like(x))
    return args.needed(needs, dx, dweight, dbias, dadd, dscale, dshift)


def _subtract(layout: Layout, x: Tensor, mean: Tensor | None, added: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x + added - mean of a chunk, a new tensor unless there is nothing to do; the last two are tables."""
    if mean is None:
        return x.to(dtype) if added is None else x + layout.broadcast(added)
    table = layout.broadcast(mean if added is None else mean - added)
    return x - table if x.dtype == dtype else x.to(dtype).sub_(table)


def _normalize(
    layout: Layout, u: Tensor, weight: Tensor | None, bias: Tensor | None, args: NormArgs, out: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """w, in `out` if that has u's dtype; the groups' means of u, if they are subtracted, and rstd, both (N, G)."""
    square = torch.mul(u, u, out=out if out.dtype == u.dtype else None)
    mean_square = layout.group_means(layout.sums(square))
    mean = None
    if args.center:
        mean = layout.group_means(layout.sums(u))
        mean_square = (mean_square - mean * mean).clamp_min_(0)
    rstd = torch.rsqrt(mean_square + args.eps)
    factor = rstd if weight is None else rstd * weight
    if mean is not None:
        bias = -mean * factor if bias is None else bias - mean * factor
    w = fma(u, layout.broadcast(factor), None if bias is None else layout.broadcast(bias), out=square)
    return w, None if mean is None else mean.squeeze(2), rstd.squeeze(2)


def _gradients(
    layout: Layout, dw: Tensor, u: Tensor, rstd: Tensor, weight: Tensor | None, center: bool, need_du: bool, out: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """du if needed, in `out` if of u's dtype, and tables of sums of dw and dw * x_hat; u is x + add less its means."""
    du = torch.mul(dw, u, out=out if out.dtype == u.dtype else None)
    sum_dw, sum_dw_x_hat = layout.sums(dw), layout.sums(du).mul_(rstd)
    if not need_du:
        return None, sum_dw, sum_dw_x_hat
    # du = (weight_eff * dw - mean(weight_eff * dw) - x_hat * mean(weight_eff * dw * x_hat)) * rstd, means over the
    # group, the first of which comes from centering.
    sums = (sum_dw, sum_dw_x_hat) if weight is None else (sum_dw * weight, sum_dw_x_hat * weight)
    mean_dy, mean_dy_xhat = (layout.group_means(t).mul_(-rstd) for t in sums)
    factor = layout.broadcast(rstd if weight is None else rstd * weight)
    du = fma(dw, factor, layout.broadcast(mean_dy) if center else None, out=du)
    return fma(u, layout.broadcast(mean_dy_xhat.mul_(rstd)), du, out=du), sum_dw, sum_dw_x_hat


def _can_use_native(layout: Layout, args: NormArgs, backward: bool = False) -> bool:
    """Whether PyTorch's CPU kernels for group norm are used. They have the same weight and bias for all samples."""
    if args.x.device.type != "cpu" or not args.center or layout.positions == 1:
        return False
    if not layout.is_rows:
        return True
    return layout.positions <= _MAX_NATIVE_POSITIONS and not (backward and _has_affine_per_sample(args))


def _normalize_native(
    layout: Layout, u: Tensor, weight: Tensor | None, bias: Tensor | None, args: NormArgs
) -> tuple[Tensor, Tensor, Tensor]:
    """`_normalize` where `_can_use_native`."""
    n, c, s, g = u.shape[0], layout.channels, layout.positions, layout.num_groups
    if not layout.is_rows:  # all channels as those of one sample, so that each has its own weight and bias
        weight, bias = (None if t is None else t.expand(n, -1, -1).reshape(-1).contiguous() for t in (weight, bias))
        w, mean, rstd = torch.native_group_norm(u.view(1, n * c, s), weight, bias, 1, n * c, s, n * g, args.eps)
        return w.view(u.shape), mean.view(n, g), rstd.view(n, g)
    rows = layout.channels_last_4d(u)
    if not _has_affine_per_sample(args):
        weight, bias = (None if t is None else t.reshape(-1) for t in (weight, bias))
        w, mean, rstd = torch.native_group_norm(rows, weight, bias, n, c, s, g, args.eps)
        return w.as_strided(u.shape, u.stride()), mean, rstd
    w, mean, rstd = torch.native_group_norm(rows, None, None, n, c, s, g, args.eps)
    w = w.as_strided(u.shape, u.stride())
    if weight is not None:
        return fma(w, layout.broadcast(weight), None if bias is None else layout.broadcast(bias), out=w), mean, rstd
    return w if bias is None else w.add_(layout.broadcast(bias)), mean, rstd


def _gradients_native(
    layout: Layout, dw: Tensor, u: Tensor, rstd: Tensor, weight: Tensor | None, need_du: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """`_gradients` where `_can_use_native`; the sums over rows are those of all samples of the chunk."""
    n, c, s, g = u.shape[0], layout.channels, layout.positions, layout.num_groups
    if layout.is_rows:
        given = layout.channels_last_4d(dw), layout.channels_last_4d(u)
    else:
        weight = None if weight is None else weight.expand(n, -1, -1)
        n, c, g = 1, n * c, n * g
        given = dw.view(n, c, s), u.view(n, c, s)
    rstd = rstd.view(n, g)
    weight = u.new_ones(c) if weight is None else weight.reshape(-1).contiguous()  # the kernel takes it to be
    # PyTorch's channels_last kernel crashes unless du is requested.
    du, sum_dw_x_hat, sum_dw = torch.ops.aten.native_group_norm_backward(
        *given, torch.zeros_like(rstd), rstd, weight, n, c, s, g, [need_du or layout.is_rows, True, True]
    )
    table = (-1, layout.num_groups, layout.group_channels)
    return du.as_strided(u.shape, u.stride()) if need_du else None, sum_dw.view(table), sum_dw_x_hat.view(table)


def _has_affine_per_sample(args: NormArgs) -> bool:
    return args.scale is not None or args.shift is not None


def _slice_batch(table: Tensor | None, chunk: slice) -> Tensor | None:
    """The samples of a chunk; the one row of a table that is the same for all samples."""
    return table if table is None or len(table) == 1 else table[chunk]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fma(a: Tensor, b: Tensor, c: Tensor | None, out: Tensor | None = None) -> Tensor:
    """a * b + c, where None is 0."""
    if c is None:
        return torch.mul(a, b, out=out)
    if a.shape[-1] in (b.shape[-1], c.shape[-1]):
        return torch.addcmul(c, a, b, out=out)
    return torch.mul(a, b, out=out).add_(c)  # on a CPU addcmul is not vectorized here


_operator: Any = SimpleNamespace(forward=forward, backward=backward)
group_norm_silu = partial(apply, _operator)
traced_group_norm_silu = library_operator("eager_group_norm_silu", _operator, traceable=False)
