"""GroupNorm + SiLU in plain torch kernels, on any device; keeps nothing for backward that can be recomputed.

Statistics are those of the residual after an estimate of the mean is taken off, so that a mean far from zero
loses no precision. A sample's bits do not depend on its batch: what could round differently in another batch
comes from `batch_invariant`. On a CPU the batch is worked off in chunks that stay in its caches.

In the names, w is what the activation takes, w = x_hat * weight_eff + bias_eff; dw and so on are gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .affine import Affine
from .arguments import NormArgs
from .autograd import apply
from .batch_invariant import fma, silu_, silu_backward_
from .layout import Layout

_NATIVE_POSITIONS = 1024
"""PyTorch's channels_last kernels on the CPU give each group to one thread below so many positions."""


def forward(args: NormArgs) -> tuple[Tensor, Tensor]:
    """See `autograd.Operator`."""
    x, num_groups, weight, bias, eps, add, _, _, silu, center = args
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y, x.new_zeros((1 + center, len(x), num_groups), dtype=dtype)
    layout = Layout(x, num_groups)
    added = None if add is None else layout.per_channel(add, dtype)
    if _can_use_native(layout, args):
        origin = layout.estimate_group_means(layout.view(x))
        if added is not None:
            origin += added.mean(2, keepdim=True)
        u = _center(layout, x, -origin if added is None else added - origin)
        sizes = (len(x), layout.channels, layout.positions, num_groups)
        assert weight is not None and bias is not None
        affine = weight.contiguous(), bias.contiguous()  # it takes them to be
        y, mean_correction, rstd = torch.native_group_norm(layout.with_default_strides(u), *affine, *sizes, eps)
        y = y.as_strided(u.shape, u.stride())
        if silu:
            silu_(layout.view(y))
        return y, torch.stack((origin.squeeze(2).add_(mean_correction), rstd))
    weight_eff, bias_eff = Affine.of(args, partial(layout.per_channel, dtype=dtype)).effective()
    values, results = layout.view(x), layout.view(y)
    stats = x.new_empty((1 + center, len(x), num_groups), dtype=dtype)
    for chunk in layout.batch_chunks(x):
        u = _slice_batch(values, chunk).to(dtype)
        out = _slice_batch(results, chunk) if results.dtype == dtype else u
        a = None if added is None else _slice_batch(added, chunk)
        o = None if bias_eff is None else _slice_batch(bias_eff, chunk)
        if center:
            origin = layout.estimate_group_means(u)
            if a is not None:
                origin += a.mean(2, keepdim=True)
            a = -origin if a is None else a - origin
        if a is not None:
            u = torch.add(u, layout.broadcast(a), out=out)
        mean_square = layout.group_means(layout.sums(u * u))
        if center:
            mean_correction = layout.group_means(layout.sums(u))
            mean_square.sub_(mean_correction * mean_correction).clamp_min_(0)
            stats[0, chunk] = origin.add_(mean_correction).squeeze(2)
        r = mean_square.add_(eps).rsqrt_()
        stats[-1, chunk] = r.squeeze(2)

        factor = r if weight_eff is None else r * _slice_batch(weight_eff, chunk)
        if center:
            o = mean_correction.neg_() * factor if o is None else o - mean_correction * factor
        w = fma(u, layout.broadcast(factor), None if o is None else layout.broadcast(o), out=out)
        if silu:
            silu_(w)
        if results.dtype != dtype:
            results[chunk] = w
    layout.write_back(results, y)
    return y, stats


def backward(dy: Tensor, stats: Tensor, args: NormArgs, needs: Sequence[bool]) -> list[Tensor]:
    """See `autograd.Operator`."""
    x, num_groups, _, _, _, add, _, _, silu, center = args
    if x.numel() == 0:
        return [torch.zeros_like(t) for t, need in zip(args.tensors, needs, strict=True) if t is not None and need]
    dtype, rstd = stats.dtype, stats[-1]
    layout = Layout(x, num_groups)
    added = None if add is None else layout.per_channel(add, dtype)
    if _can_use_native(layout, args):
        return _native_backward(layout, dy, stats, args, added, needs)
    affine = Affine.of(args, partial(layout.per_channel, dtype=dtype))
    weight_eff, bias_eff = affine.effective()
    dx = torch.empty_like(x)
    values, dys, results = layout.view(x), layout.view(dy), layout.view(dx)
    sums_dw, sums_dw_x_hat, sums_du = [], [], []  # over the positions
    for chunk in layout.batch_chunks(x):
        r = _slice_batch(rstd, chunk).unsqueeze(2)
        u = _slice_batch(values, chunk).to(dtype)
        a = None if added is None else _slice_batch(added, chunk)
        if center:
            origin = _slice_batch(stats[0], chunk).unsqueeze(2)
            a = -origin if a is None else a - origin
        if a is not None:
            u = u + layout.broadcast(a)
        factor = layout.broadcast(r if weight_eff is None else r * _slice_batch(weight_eff, chunk))
        dw = _slice_batch(dys, chunk).to(dtype)
        if silu:
            o = None if bias_eff is None else layout.broadcast(_slice_batch(bias_eff, chunk))
            dw = silu_backward_(dw, fma(u, factor, o))
        out = _slice_batch(results, chunk) if results.dtype == dtype else torch.empty_like(u)
        torch.mul(dw, u, out=out)
        sum_dw, sum_dw_x_hat = layout.sums(dw), layout.sums(out).mul_(r)
        sums_dw.append(sum_dw)
        sums_dw_x_hat.append(sum_dw_x_hat)
        if not (needs[0] or needs[3]):
            continue
        # du = (weight_eff * dw - mean(weight_eff * dw) - x_hat * mean(weight_eff * dw * x_hat)) * rstd, means over
        # the group, the first of which comes from centering.
        if weight_eff is not None:
            weights = _slice_batch(weight_eff, chunk)
            sum_dw, sum_dw_x_hat = sum_dw * weights, sum_dw_x_hat * weights
        mean_dy = layout.broadcast(layout.group_means(sum_dw).mul_(-r)) if center else None
        mean_dy_xhat = layout.group_means(sum_dw_x_hat).mul_(-r).mul_(r)
        du = fma(dw, factor, mean_dy, out=out)
        du = fma(u, layout.broadcast(mean_dy_xhat), du, out=du)
        if needs[3]:
            sums_du.append(layout.sums(du))
        if results.dtype != dtype:
            results[chunk] = du
    layout.write_back(results, dx)

    sums = _join(sums_dw), _join(sums_dw_x_hat)
    dweight, dbias, dscale, dshift = affine.gradients([needs[i] for i in (1, 2, 4, 5)], *sums)
    dadd = _join(sums_du) if needs[3] else None
    grads = zip((dx if needs[0] else None, dweight, dbias, dadd, dscale, dshift), args.tensors, strict=True)
    return [grad.reshape(t.shape).to(t.dtype) for grad, t in grads if grad is not None and t is not None]


def _can_use_native(layout: Layout, args: NormArgs) -> bool:
    """Whether PyTorch's CPU kernels for group norm, on input whose mean is about 0, keep this module's promises.

    They are much faster on small tensors, but know no scale and shift, and reduce a single group in another order than
    one of several.
    """
    x, _, weight, bias, _, add, scale, shift, _, center = args
    if x.device.type != "cpu" or x.dim() == 2 or weight is None or bias is None or layout.num_groups == 1:
        return False
    if not center or scale is not None or shift is not None:
        return False
    if any(t is not None and t.dtype != torch.float32 for t in (x, weight, bias, add)):
        return False
    return layout.is_dense and (not layout.is_rows or (x.dim() > 3 and layout.positions < _NATIVE_POSITIONS))


def _center(layout: Layout, x: Tensor, table: Tensor) -> Tensor:
    """x plus a table, in x's shape and layout."""
    u = torch.empty_like(x)
    torch.add(layout.view(x), layout.broadcast(table), out=layout.view(u))
    return u


def _native_backward(
    layout: Layout, dy: Tensor, stats: Tensor, args: NormArgs, added: Tensor | None, needs: Sequence[bool]
) -> list[Tensor]:
    """`backward` by PyTorch's kernel, where `_can_use_native`."""
    x, _, weight, _, _, _, _, _, silu, _ = args
    mean, rstd = stats
    assert weight is not None
    origin, r = mean.unsqueeze(2), rstd.unsqueeze(2)
    u = _center(layout, x, -origin if added is None else added - origin)
    dw = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
    if silu:
        weight_eff, bias_eff = Affine.of(args, partial(layout.per_channel, dtype=mean.dtype)).effective()
        assert weight_eff is not None and bias_eff is not None
        dw = torch.empty_like(x)
        w = fma(layout.view(u), layout.broadcast(r * weight_eff), layout.broadcast(bias_eff), out=layout.view(dw))
        silu_backward_(layout.view(dy), w)
    sizes = (len(x), layout.channels, layout.positions, layout.num_groups)
    du, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        layout.with_default_strides(dw), layout.with_default_strides(u), torch.zeros_like(mean), rstd,
        weight.contiguous(), *sizes, [True, True, True],
    )  # fmt: skip
    du = du.as_strided(u.shape, u.stride())
    grads = [du] if needs[0] else []
    grads += [grad for grad, need in ((dweight, needs[1]), (dbias, needs[2])) if need]
    return [*grads, layout.sums(layout.view(du)).reshape(len(x), -1)] if needs[3] else grads


def _slice_batch(table: Tensor, chunk: slice) -> Tensor:
    """The samples of a chunk; of a table that has one row for all samples, that row."""
    return table if len(table) <= chunk.stop - chunk.start else table[chunk]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Operator:
    forward = staticmethod(forward)
    backward = staticmethod(backward)


group_norm_silu = partial(apply, _Operator())
