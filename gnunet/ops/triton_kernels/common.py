"""What the forward and the backward kernels share.

A tensor is (N, S, C) in memory, channels last, or (N, C, S), contiguous: S positions, C channels, G groups of C / G
adjacent channels. A tile is always (positions, channels), whichever of the two is dense in memory. Every kernel
computes in fp32, adds in an order that depends on S, C and G alone, and writes each result once.

In the names, as in `eager`: u = x + add, d = u - mean, w = d * rstd * weight_eff + bias_eff, y = silu(w); dw and so on
are gradients. Without CENTER the mean is 0. `s` are positions and `c` channels; `c_in_tile` are channels counted from a
tile's first. Pointers to tensors that are not given or not needed are None.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

BATCH_DEPENDENT_ARGS = ("stats_stride", "sums_stride", "partial_stride", "means_stride", "combined_stride", "rows")
"""Arguments that depend on the batch size. Triton would specialize kernels on a 1 or a multiple of 16, which might
change the order of additions; torch.compile does."""


def jit(kernel: Callable[..., Any]) -> Any:
    return triton.jit(
        kernel, do_not_specialize=[n for n in inspect.signature(kernel).parameters if n in BATCH_DEPENDENT_ARGS]
    )


@jit
def program_coords(splits, blocks, CHANNELS_LAST: tl.constexpr, BACKWARDS: tl.constexpr):
    """Sample (in 64 bits), split and block of groups of this program, from the first or from the last; neighbors in
    memory follow one another."""
    pid = tl.program_id(0)
    if BACKWARDS:
        pid = tl.num_programs(0) - 1 - pid
    n = (pid // blocks // splits).to(tl.int64)
    if CHANNELS_LAST:
        return n, pid // blocks % splits, pid % blocks
    else:
        return n, pid % splits, pid // splits % blocks


@jit
def split_coords(split, position_splits, CHANNEL_SPLITS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Part of the positions and part of the channels of a block's split."""
    if CHANNELS_LAST:
        return split // CHANNEL_SPLITS, split % CHANNEL_SPLITS
    else:
        return split % position_splits, split // position_splits


@jit
def base_offset(n, s, c, S, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offset of position s, channel c of sample n: in 64 bits, as n is, so that 32 do within a tile."""
    if CHANNELS_LAST:
        return (n * S + s) * C + c
    else:
        return (n * C + c) * S + s


@jit
def tile_offsets(s, c_in_tile, S, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets of a tile's elements from its first."""
    if CHANNELS_LAST:
        return s[:, None] * C + c_in_tile[None, :]
    else:
        return s[:, None] + c_in_tile[None, :] * S


@jit
def tile_stride(C: tl.constexpr, BLOCK_S: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Distance to the tile of the next BLOCK_S positions."""
    return C * BLOCK_S if CHANNELS_LAST else BLOCK_S


@jit
def tile_channels(
    block, part_c, C: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """For each column of a tile: its channel, counted from the tile's first and in the tensor, and whether it exists,
    as all do where EVEN_C. A group has BLOCK_C // GROUPS columns; those beyond its channels are idle."""
    column = tl.arange(0, BLOCK_C)
    width: tl.constexpr = BLOCK_C // GROUPS
    c_in_tile = column if GROUPS == 1 or width == GROUP else column // width * GROUP + column % width
    c = block * (GROUP * GROUPS) + part_c * BLOCK_C + c_in_tile
    if EVEN_C:
        return c_in_tile, c, tl.full(c.shape, True, tl.int1)
    else:
        return c_in_tile, c, (part_c * BLOCK_C + column % width < GROUP) & (c < C)


@jit
def tile_mask(s, size, c_mask, EVEN_S: tl.constexpr):
    """Elements of a tile that exist, where `size` positions are left: all of its positions or none where EVEN_S."""
    if EVEN_S:
        return tl.full((s.shape[0], 1), True, tl.int1) & (c_mask & (size > 0))[None, :]
    else:
        return (s < size)[:, None] & c_mask[None, :]


@jit
def zero_beyond(values, s, size, EVEN_S: tl.constexpr):
    """A tile with zeros at positions that do not exist; in idle columns it must have them already."""
    if EVEN_S:
        return values
    else:
        return tl.where((s < size)[:, None], values, 0.0)


@jit
def split_tile(
    n, block, split, S, position_splits, CHANNELS_LAST: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, EVEN_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    SPLIT_SIZE: tl.constexpr, CHANNEL_SPLITS: tl.constexpr,
):  # fmt: skip
    """For a split: its part of the positions, their number, its part of the channels; and for its first tile:
    positions, channels, which of them exist, offsets."""
    part_s, part_c = split_coords(split, position_splits, CHANNEL_SPLITS, CHANNELS_LAST)
    s = tl.arange(0, BLOCK_S)
    c_in_tile, c, c_mask = tile_channels(block, part_c, C, GROUP, GROUPS, EVEN_C, BLOCK_C)
    first_s = tl.cast(part_s, tl.int64) * SPLIT_SIZE
    size = tl.minimum(S - first_s, SPLIT_SIZE).to(tl.int32)
    offsets = base_offset(n, first_s, block * (GROUP * GROUPS) + part_c * BLOCK_C, S, C, CHANNELS_LAST)
    offsets += tile_offsets(s, c_in_tile, S, C, CHANNELS_LAST)
    return part_s, size, part_c, s, c, c_mask, offsets


@jit
def load_fp32(ptr, mask):
    """Zero outside of the mask."""
    return tl.load(ptr, mask, other=0.0).to(tl.float32)


@jit
def effective_affine(n, c, mask, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride_n, shift_stride_n):
    """weight * (1 + scale) and bias * (1 + scale) + shift of channels c of sample n; None is 1, or 0."""
    weight_eff = tl.full(c.shape, 1.0, tl.float32)
    bias_eff = tl.zeros(c.shape, tl.float32)
    if weight_ptr is not None:
        weight_eff = load_fp32(weight_ptr + c, mask)
    if bias_ptr is not None:
        bias_eff = load_fp32(bias_ptr + c, mask)
    if scale_ptr is not None:
        one_plus_scale = 1.0 + load_fp32(scale_ptr + n * scale_stride_n + c, mask)
        weight_eff *= one_plus_scale
        bias_eff *= one_plus_scale
    if shift_ptr is not None:
        bias_eff += load_fp32(shift_ptr + n * shift_stride_n + c, mask)
    return weight_eff, bias_eff


@jit
def load_mean_rstd(
    n, c, mask, G: tl.constexpr, GROUP: tl.constexpr, stats_ptr, stats_stride, add_ptr, add_stride_n,
    CENTER: tl.constexpr,
):  # fmt: skip
    """mean - add, from which d is counted, and rstd, for channels c of sample n."""
    group = n * G + c // GROUP
    center = tl.zeros(c.shape, tl.float32)
    if CENTER:
        center = load_fp32(stats_ptr + group, mask)
        stats_ptr += stats_stride
    rstd = load_fp32(stats_ptr + group, mask)
    if add_ptr is not None:
        center -= load_fp32(add_ptr + n * add_stride_n + c, mask)
    return center, rstd


@jit
def group_sums(sums, GROUPS: tl.constexpr):
    """Sums for each column of a tile -> those of its groups, (GROUPS,)."""
    if sums.shape[0] == GROUPS:
        return sums
    else:
        return tl.sum(tl.reshape(sums, (GROUPS, sums.shape[0] // GROUPS)), 1)


@jit
def add_pairs(a0, a1, b0, b1):
    """Combines two sums that are reduced together."""
    return a0 + b0, a1 + b1


@jit
def group_sums_of_two(a, b, GROUPS: tl.constexpr):
    """`group_sums` of both, in one reduction."""
    if a.shape[0] == GROUPS:
        return a, b
    else:
        shape: tl.constexpr = (GROUPS, a.shape[0] // GROUPS)
        return tl.reduce((tl.reshape(a, shape), tl.reshape(b, shape)), 1, add_pairs)


@jit
def of_channels(values, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Values of a tile's groups, (GROUPS,) -> one for each of its columns."""
    if BLOCK_C == GROUPS:
        return values
    else:
        return tl.reshape(tl.broadcast_to(values[:, None], (GROUPS, BLOCK_C // GROUPS)), (BLOCK_C,))


@jit
def rstd_of(mean_square, mean_correction, eps, CENTER: tl.constexpr):
    """From the mean square of d; with CENTER, of d about a point that the mean is `mean_correction` away from."""
    if CENTER:
        mean_square = tl.maximum(mean_square - mean_correction * mean_correction, 0.0)
    # torch.compile passes eps in 64 bits.
    return tl.div_rn(1.0, tl.sqrt_rn(mean_square + tl.cast(eps, tl.float32)))


@jit
def sigmoid(w, FAST: tl.constexpr):
    """FAST uses the GPU's approximations: within a relative 3e-6 of the exact value for |w| < 20, which does not show
    in 16 bits, and beyond that within the error of rounding to 0."""
    if FAST:
        return tl.inline_asm_elementwise(
            """
            mul.ftz.f32 $0, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 $0, $0;
            add.ftz.f32 $0, $0, 0f3F800000;
            rcp.approx.ftz.f32 $0, $0;
            """,
            "=f,f",
            [w],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.sigmoid(w)


@jit
def activate(w, SILU: tl.constexpr, FAST: tl.constexpr):
    return w * sigmoid(w, FAST) if SILU else w


@jit
def activation_gradient(w, SILU: tl.constexpr, FAST: tl.constexpr):
    if SILU:
        sigma = sigmoid(w, FAST)
        return sigma * (1.0 + w * (1.0 - sigma))
    else:
        return tl.full(w.shape, 1.0, tl.float32)
