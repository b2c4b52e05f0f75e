"""What the forward and the backward kernels share.

A tensor is (N, S, C) in memory, channels_last, or (N, C, S), contiguous: S positions, C channels, a group is C / G
channels in a row. A tile is always (positions, channels), whichever of the two lies densely in memory. Each
kernel does its arithmetic in fp32, adds in an order that depends on S, C and G alone, and writes every number once.

In the names, as in `eager`: u = x + add, d = u - mean, w = d * rstd * gain + offset, y = silu(w); dw and so on
are gradients. Without CENTER the mean is 0, and mean_ptr points nowhere. `s` are positions and `c` channels; `local`
are channels counted from a tile's first.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

jit: Any = triton.jit  # The decorator is untyped, and what it makes is never called from Python.


@jit
def place(parts, channel_blocks, BACKWARDS: tl.constexpr):
    """Sample, part of the positions and block of channels of this program, from the first or from the last."""
    pid = tl.program_id(0)
    if BACKWARDS:
        pid = tl.num_programs(0) - 1 - pid
    return pid // channel_blocks // parts, pid // channel_blocks % parts, pid % channel_blocks


@jit
def start_of(n, s, c, S, C, CHANNELS_LAST: tl.constexpr):
    """Offset of position s, channel c of sample n: in 64 bits, so that 32 do for what is added within a tile."""
    if CHANNELS_LAST:
        return (n.to(tl.int64) * S + s) * C + c
    else:
        return (n.to(tl.int64) * C + c) * S + s


@jit
def offsets_of(s, local, S, C, CHANNELS_LAST: tl.constexpr):
    """Offsets of a tile's elements from its first."""
    if CHANNELS_LAST:
        return s[:, None] * C + local[None, :]
    else:
        return s[:, None] + local[None, :] * S


@jit
def step_of(C, BLOCK_S: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """How far it is to the tile of the next BLOCK_S positions."""
    if CHANNELS_LAST:
        return C * BLOCK_S
    else:
        return BLOCK_S


@jit
def read(ptr, mask):
    """As fp32, zero outside of the mask."""
    return tl.load(ptr, mask, other=0.0).to(tl.float32)


@jit
def gain_and_offset(n, c, mask, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row):
    """weight * (1 + scale) and bias * (1 + scale) + shift of channels c of sample n; None is 1, or 0."""
    gain = tl.full(c.shape, 1.0, tl.float32)
    offset = tl.zeros(c.shape, tl.float32)
    if weight_ptr is not None:
        gain = read(weight_ptr + c, mask)
    if bias_ptr is not None:
        offset = read(bias_ptr + c, mask)
    if scale_ptr is not None:
        growth = 1.0 + read(scale_ptr + n * scale_row + c, mask)
        gain *= growth
        offset *= growth
    if shift_ptr is not None:
        offset += read(shift_ptr + n * shift_row + c, mask)
    return gain, offset


@jit
def center_and_rstd(n, c, mask, C, num_groups, mean_ptr, rstd_ptr, add_ptr, add_row, CENTER: tl.constexpr):
    """mean - add, from which d is counted, and rstd, for channels c of sample n."""
    group = n * num_groups + c // (C // num_groups)
    center = read(mean_ptr + group, mask) if CENTER else tl.zeros(c.shape, tl.float32)
    rstd = read(rstd_ptr + group, mask)
    if add_ptr is not None:
        center -= read(add_ptr + n * add_row + c, mask)
    return center, rstd


@jit
def group_sums(sums, local, GROUP: tl.constexpr, GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr):
    """Sums for each channel of a tile that holds GROUPS whole groups of GROUP channels -> those of its group."""
    if GROUP == 1:
        return sums
    elif GROUPS == 1:
        return tl.zeros_like(sums) + tl.sum(sums, 0)
    else:
        belongs = (local // GROUP)[:, None] == tl.arange(0, PADDED_GROUPS)[None, :]
        of_groups = tl.sum(tl.where(belongs, sums[:, None], 0.0), 0)
        return tl.sum(tl.where(belongs, of_groups[None, :], 0.0), 1)


@jit
def rstd_of(mean_square, rest, eps, CENTER: tl.constexpr):
    """From the mean square of d; with CENTER, of d about a point that the mean is `rest` away from."""
    if CENTER:
        mean_square = tl.maximum(mean_square - rest * rest, 0.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))


@jit
def activate(w, SILU: tl.constexpr):
    if SILU:
        return w * tl.sigmoid(w)
    else:
        return w


@jit
def activation_gradient(w, SILU: tl.constexpr):
    if SILU:
        sigmoid = tl.sigmoid(w)
        return sigmoid * (1.0 + w * (1.0 - sigmoid))
    else:
        return tl.full(w.shape, 1.0, tl.float32)
