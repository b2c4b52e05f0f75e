"""GroupNorm + SiLU in plain torch kernels, on any device; keeps nothing for backward that can be recomputed.

Statistics are those of the residual after an estimate of the mean is taken off, so that a mean far from zero
loses no precision. A sample's bits do not depend on its batch: what could round differently in another batch
comes from `batch_invariant`, or from PyTorch's kernels for group norm where these leave a sample to one thread.
On a CPU the batch is worked off in chunks that stay in its caches.

In the names, w is what the activation takes, w = x_hat * weight_eff + bias_eff; dw and so on are gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .affine import Affine
from .arguments import NormArgs
from .autograd import apply, library_operator
from .batch_invariant import fma, silu_, silu_backward_
from .layout import Layout

_SHARED_POSITIONS = 1024
"""From so many positions on, PyTorch's channels_last kernels on the CPU deal out the positions of the batch, not its
groups, to the threads: samples stay whole where the threads divide their number."""
_MAX_NATIVE_POSITIONS = 4096  # those kernels add up position after position, which at 4096 costs two digits of rstd
_MAX_NATIVE_THREADS = 8  # with more, a batch is filled up with too many samples


def forward(args: NormArgs) -> tuple[Tensor, Tensor]:
    """See `autograd.Operator`."""
    x, num_groups, weight, bias, eps, add, _, _, silu, center = args
    dtype = args.dtype
    if x.numel() == 0:
        return torch.empty_like(x), x.new_zeros((1 + center, x.shape[0], num_groups), dtype=dtype)
    layout = Layout(x, num_groups)
    added = None if add is None else layout.per_channel(add, dtype)
    if _can_use_native(layout, args):
        return _native_forward(layout, args, added)
    y = torch.empty_like(x)
    weight_eff, bias_eff = Affine.of(args, partial(layout.per_channel, dtype=dtype)).effective()
    values, results = layout.view(x), layout.view(y)
    stats = x.new_empty((1 + center, x.shape[0], num_groups), dtype=dtype)
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
    return args.needed(needs, dx, dweight, dbias, dadd, dscale, dshift)


def _can_use_native(layout: Layout, args: NormArgs) -> bool:
    """Whether PyTorch's CPU kernels for group norm, on fp32 input whose mean is about 0, keep this module's promises.

    They are much faster, but know no scale and shift, and reduce a single group in another order than one of several.
    """
    x, _, weight, bias, _, _, scale, shift, _, center = args
    if x.device.type != "cpu" or x.dim() == 2 or weight is None or bias is None or layout.num_groups == 1:
        return False
    if not center or scale is not None or shift is not None or x.dtype == torch.float64 or not layout.is_dense:
        return False
    if not layout.is_rows:
        return True
    is_bounded = layout.positions <= _MAX_NATIVE_POSITIONS and torch.get_num_threads() <= _MAX_NATIVE_THREADS
    return x.dim() > 3 and (is_bounded or layout.positions < _SHARED_POSITIONS)


def _native_multiple(layout: Layout) -> int:
    """Of how many samples a batch has to be a multiple for PyTorch's kernels to leave each to one thread."""
    return torch.get_num_threads() if layout.is_rows and layout.positions >= _SHARED_POSITIONS else 1


def _native_input(layout: Layout, values: Tensor, table: Tensor | None = None) -> Tensor:
    """A 3-D tensor, plus a table, in fp32; followed by samples of zeros up to the multiple."""
    samples = values.shape[0]
    rest = -samples % _native_multiple(layout)
    if rest == 0 and values.dtype == torch.float32:
        return values if table is None else values + layout.broadcast(table)
    u = torch.empty((samples + rest, *values.shape[1:]), dtype=torch.float32)
    part = u[:samples].copy_(values)
    if table is not None:
        part += layout.broadcast(table)
    u[samples:].zero_()
    return u


def _native_output(layout: Layout, part: Tensor, chunk: slice, x: Tensor, y: Tensor | None) -> Tensor:
    """y, like x, with a chunk of its samples from a 3-D result; that itself, where it is all of y."""
    if part.shape[0] == x.shape[0] and part.dtype == x.dtype:
        return part.as_strided(x.shape, x.stride()).detach()  # no view, which autograd would not let be changed
    y = torch.empty_like(x) if y is None else y
    values = layout.view(y)[chunk]
    values.copy_(part[: values.shape[0]])
    return y


def _native_forward(layout: Layout, args: NormArgs, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """`forward` by PyTorch's kernel, where `_can_use_native`."""
    x, num_groups, weight, bias, eps, _, _, _, silu, _ = args
    assert weight is not None and bias is not None
    affine = weight.float().contiguous(), bias.float().contiguous()  # it takes them to be
    values, y = layout.view(x), None
    stats = torch.empty((2, x.shape[0], num_groups), dtype=torch.float32)
    for chunk in layout.batch_chunks(x, _native_multiple(layout)):
        part = values[chunk]
        origin = layout.estimate_group_means(part)
        if added is None:
            u = _native_input(layout, part, -origin)
        else:
            origin += added[chunk].mean(2, keepdim=True)
            u = _native_input(layout, part, added[chunk] - origin)
        sizes = u.shape[0], layout.channels, layout.positions, num_groups
        w, mean_correction, rstd = torch.native_group_norm(layout.unview(u), *affine, *sizes, eps)
        w = layout.view(w)
        if silu:
            silu_(w)
        samples = part.shape[0]
        torch.add(origin.squeeze(2), mean_correction[:samples], out=stats[0, chunk])
        stats[1, chunk] = rstd[:samples]
        y = _native_output(layout, w, chunk, x, y)
    assert y is not None
    return y, stats


def _native_backward(
    layout: Layout, dy: Tensor, stats: Tensor, args: NormArgs, added: Tensor | None, needs: Sequence[bool]
) -> list[Tensor]:
    """`backward` by PyTorch's kernel, where `_can_use_native`."""
    x, num_groups, weight, _, _, _, _, _, silu, _ = args
    assert weight is not None
    values, dys, dx = layout.view(x), layout.view(dy), None
    weight_eff, bias_eff = Affine.of(args, partial(layout.per_channel, dtype=torch.float32)).effective()
    assert weight_eff is not None and bias_eff is not None
    weight = weight.float().contiguous()  # it takes it to be
    dweights, dbiases, dadds = [], [], []
    for chunk in layout.batch_chunks(x, _native_multiple(layout)):
        origin, r = stats[:, chunk].unsqueeze(3)
        part = values[chunk]
        u = _native_input(layout, part, -origin if added is None else added[chunk] - origin)
        dw = dys[chunk].float()
        samples = part.shape[0]
        if silu:
            w = fma(u[:samples], layout.broadcast(r * weight_eff), layout.broadcast(bias_eff))
            dw = silu_backward_(dw, w)
        dw = _native_input(layout, dw)
        rstd = F.pad(stats[1, chunk], (0, 0, 0, u.shape[0] - samples), value=1.0)
        sizes = u.shape[0], layout.channels, layout.positions, num_groups
        du, dweight, dbias = torch.ops.aten.native_group_norm_backward(
            layout.unview(dw), layout.unview(u), torch.zeros_like(rstd), rstd, weight, *sizes,
            [True, True, True],
        )  # fmt: skip
        du = layout.view(du)
        dweights.append(dweight)
        dbiases.append(dbias)
        if needs[3]:
            dadds.append(layout.sums(du[:samples]))
        dx = _native_output(layout, du, chunk, x, dx)
    dweight, dbias = (parts[0] if len(parts) == 1 else torch.stack(parts).sum(0) for parts in (dweights, dbiases))
    dadd = _join(dadds) if needs[3] else None
    assert dx is not None
    return args.needed(needs, dx, dweight, dbias, dadd, None, None)


def _slice_batch(table: Tensor, chunk: slice) -> Tensor:
    """The samples of a chunk; of a table that has one row for all samples, that row."""
    return table if table.shape[0] <= chunk.stop - chunk.start else table[chunk]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Operator:
    forward = staticmethod(forward)
    backward = staticmethod(backward)


group_norm_silu = partial(apply, _Operator())
traced_group_norm_silu = library_operator("eager_group_norm_silu", _Operator(), traceable=False)
