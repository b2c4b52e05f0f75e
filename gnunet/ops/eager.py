"""GroupNorm + SiLU in plain torch kernels, on any device; keeps nothing for backward that can be made again.

Statistics are those of the residual after an estimate of the mean is taken off, so that a mean far from zero
costs no digits. A sample's bits do not depend on its batch: what could round differently in another batch
comes from `invariant`. On a CPU the batch is worked off in parts that stay in its caches.

In the names, w is what the activation takes, w = x_hat * gain + offset; dw and so on are gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .autograd import register
from .invariant import multiply_add, silu_, silu_backward_
from .layout import Layout

_NATIVE_POSITIONS = 1024
"""PyTorch's channels_last kernels on the CPU give each group to one thread below so many positions."""


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y as x; mean and rstd of x + add, (N, G), fp32 (float64 where x is); without center no mean, (0, G)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.empty_like(x)
    if x.numel() == 0:
        rstd = x.new_zeros((len(x), num_groups), dtype=dtype)
        return y, torch.zeros_like(rstd) if center else rstd.new_empty((0, num_groups)), rstd
    layout = Layout(x, num_groups)
    added = None if add is None else layout.table(add, dtype)
    if center and _is_native(layout, x, weight, bias, add, scale, shift):
        origin = layout.rough_group_means(layout.view(x))
        if added is not None:
            origin += added.mean(2, keepdim=True)
        u = _shifted(layout, x, -origin if added is None else added - origin)
        sizes = (len(x), layout.channels, layout.positions, num_groups)
        y, rest, rstd = torch.native_group_norm(layout.plain(u), weight, bias, *sizes, eps)
        y = y.as_strided(u.shape, u.stride())
        if silu:
            silu_(layout.view(y))
        return y, origin.squeeze(2).add_(rest), rstd
    gain, offset = _gain_and_offset(layout, dtype, weight, bias, scale, shift)
    values, results = layout.view(x), layout.view(y)
    means, rstds = [], []
    for part in layout.parts(x):
        u = _rows(values, part).to(dtype)
        out = _rows(results, part) if results.dtype == dtype else u
        a = None if added is None else _rows(added, part)
        o = None if offset is None else _rows(offset, part)
        if center:
            origin = layout.rough_group_means(u)
            if a is not None:
                origin += a.mean(2, keepdim=True)
            a = -origin if a is None else a - origin
        if a is not None:
            u = torch.add(u, layout.spread(a), out=out)
        mean_square = layout.group_means(layout.sums(u * u))
        if center:
            rest = layout.group_means(layout.sums(u))
            mean_square.sub_(rest * rest).clamp_min_(0)
            means.append(origin.add_(rest).squeeze(2))
        r = mean_square.add_(eps).rsqrt_()
        rstds.append(r.squeeze(2))

        factor = r if gain is None else r * _rows(gain, part)
        if center:
            o = rest.neg_() * factor if o is None else o - rest * factor
        w = multiply_add(u, layout.spread(factor), None if o is None else layout.spread(o), out=out)
        if silu:
            silu_(w)
        if results.dtype != dtype:
            results[part] = w
    layout.copy_back(results, y)
    rstd = _join(rstds)
    return y, _join(means) if center else rstd.new_empty((0, num_groups)), rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    center: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """-> the gradients asked for by `needs`, in the order x, weight, bias, add, scale, shift."""
    inputs = (x, weight, bias, add, scale, shift)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t, need in zip(inputs, needs, strict=True) if t is not None and need]
    dtype = mean.dtype
    layout = Layout(x, num_groups)
    added = None if add is None else layout.table(add, dtype)
    if center and _is_native(layout, x, weight, bias, add, scale, shift):
        return _native_backward(layout, dy, x, mean, rstd, weight, bias, added, silu, needs)
    gain, offset = _gain_and_offset(layout, dtype, weight, bias, scale, shift)
    dx = torch.empty_like(x)
    values, dys, results = layout.view(x), layout.view(dy), layout.view(dx)
    sums_dw, sums_dw_x_hat, sums_du = [], [], []  # over the positions
    for part in layout.parts(x):
        r = _rows(rstd, part).unsqueeze(2)
        u = _rows(values, part).to(dtype)
        a = None if added is None else _rows(added, part)
        if center:
            origin = _rows(mean, part).unsqueeze(2)
            a = -origin if a is None else a - origin
        if a is not None:
            u = u + layout.spread(a)
        factor = layout.spread(r if gain is None else r * _rows(gain, part))
        dw = _rows(dys, part).to(dtype)
        if silu:
            o = None if offset is None else layout.spread(_rows(offset, part))
            dw = silu_backward_(dw, multiply_add(u, factor, o))
        out = _rows(results, part) if results.dtype == dtype else torch.empty_like(u)
        torch.mul(dw, u, out=out)
        sum_dw, sum_dw_x_hat = layout.sums(dw), layout.sums(out).mul_(r)
        sums_dw.append(sum_dw)
        sums_dw_x_hat.append(sum_dw_x_hat)
        if not (needs[0] or needs[3]):
            continue
        # du = (gain * dw - mean(gain * dw) - x_hat * mean(gain * dw * x_hat)) * rstd, means over the group;
        # the first of them, the level, comes from centring.
        if gain is not None:
            sum_dw, sum_dw_x_hat = sum_dw * _rows(gain, part), sum_dw_x_hat * _rows(gain, part)
        level = layout.spread(layout.group_means(sum_dw).mul_(-r)) if center else None
        slope = layout.group_means(sum_dw_x_hat).mul_(-r).mul_(r)
        du = multiply_add(dw, factor, level, out=out)
        du = multiply_add(u, layout.spread(slope), du, out=du)
        if needs[3]:
            sums_du.append(layout.sums(du))
        if results.dtype != dtype:
            results[part] = du
    layout.copy_back(results, dx)

    dw_sum, dw_x_hat_sum = _join(sums_dw), _join(sums_dw_x_hat)
    growth = None if scale is None else 1 + layout.table(scale, dtype)
    grads: list[Tensor | None] = [dx if needs[0] else None, None, None, None, None, None]
    if needs[1]:
        grads[1] = (dw_x_hat_sum if growth is None else dw_x_hat_sum * growth).sum(0)
    if needs[2]:
        grads[2] = (dw_sum if growth is None else dw_sum * growth).sum(0)
    if needs[3]:
        grads[3] = _join(sums_du)
    if needs[4]:
        dscale = dw_x_hat_sum if weight is None else dw_x_hat_sum * layout.table(weight, dtype)
        grads[4] = dscale if bias is None else dscale + dw_sum * layout.table(bias, dtype)
    if needs[5]:
        grads[5] = dw_sum
    return [
        grad.reshape(t.shape).to(t.dtype)
        for grad, t in zip(grads, inputs, strict=True)
        if grad is not None and t is not None
    ]


def _gain_and_offset(
    layout: Layout,
    dtype: torch.dtype,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Tables weight * (1 + scale) and bias * (1 + scale) + shift; None where that is 1, or 0."""
    gain, offset = (None if t is None else layout.table(t, dtype) for t in (weight, bias))
    if scale is not None:
        growth = 1 + layout.table(scale, dtype)
        gain = growth if gain is None else gain * growth
        offset = None if offset is None else offset * growth
    if shift is not None:
        table = layout.table(shift, dtype)
        offset = table if offset is None else offset + table
    return gain, offset


def _is_native(layout: Layout, x: Tensor, *tables: Tensor | None) -> bool:
    """Whether PyTorch's CPU kernels for group norm, on input whose mean is about 0, keep this module's promises.

    They are much faster on small tensors, but know no scale and shift.
    """
    weight, bias, add, scale, shift = tables
    if x.device.type != "cpu" or x.dim() == 2 or weight is None or bias is None:
        return False
    if scale is not None or shift is not None:
        return False
    if any(t is not None and t.dtype != torch.float32 for t in (x, weight, bias, add)):
        return False
    return layout.is_dense and (not layout.is_rows or (x.dim() > 3 and layout.positions < _NATIVE_POSITIONS))


def _shifted(layout: Layout, x: Tensor, table: Tensor) -> Tensor:
    """x plus a table, in x's shape and layout."""
    u = torch.empty_like(x)
    torch.add(layout.view(x), layout.spread(table), out=layout.view(u))
    return u


def _native_backward(
    layout: Layout,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    added: Tensor | None,
    silu: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """`backward` by PyTorch's kernel, where `_is_native`."""
    origin, r = mean.unsqueeze(2), rstd.unsqueeze(2)
    u = _shifted(layout, x, -origin if added is None else added - origin)
    dw = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
    if silu:
        gain, offset = _gain_and_offset(layout, mean.dtype, weight, bias, None, None)
        assert gain is not None and offset is not None
        dw = torch.empty_like(x)
        w = multiply_add(layout.view(u), layout.spread(r * gain), layout.spread(offset), out=layout.view(dw))
        silu_backward_(layout.view(dy), w)
    sizes = (len(x), layout.channels, layout.positions, layout.num_groups)
    du, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        layout.plain(dw), layout.plain(u), torch.zeros_like(mean), rstd, weight, *sizes, [True, True, True]
    )
    du = du.as_strided(u.shape, u.stride())
    grads = [du] if needs[0] else []
    grads += [grad for grad, need in ((dweight, needs[1]), (dbias, needs[2])) if need]
    return [*grads, layout.sums(layout.view(du)).reshape(len(x), -1)] if needs[3] else grads


def _rows(table: Tensor, part: slice) -> Tensor:
    """The samples in `part`; of a table that has one row for all samples, that row."""
    return table if len(table) <= part.stop - part.start else table[part]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


group_norm_silu = register("eager_group_norm_silu", forward, backward)
