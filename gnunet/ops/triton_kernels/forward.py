"""The forward kernels: `fwd_single_pass`; or `fwd_partial_stats` and `fwd_normalize`.

See `common` for the memory formats and names, and `tiling` for what goes where.
"""

from __future__ import annotations

import triton.language as tl

from .common import (
    activate,
    add_pairs,
    base_offset,
    effective_affine,
    group_sums,
    group_sums_of_two,
    jit,
    load_fp32,
    of_channels,
    program_coords,
    rstd_of,
    split_coords,
    split_tile,
    tile_channels,
    tile_mask,
    tile_offsets,
    tile_stride,
    zero_beyond,
)


@jit
def fwd_single_pass(
    x_ptr, y_ptr, stats_ptr, weight_ptr, bias_ptr, add_ptr, scale_ptr, shift_ptr,
    positions, stats_stride, add_stride_n, scale_stride_n, shift_stride_n, eps,
    SILU: tl.constexpr, CENTER: tl.constexpr, FAST: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN_S: tl.constexpr,
    C: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    EVEN_S: tl.constexpr, EVEN_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y and statistics of a block of groups, which a program holds in its registers."""
    S = positions * ALIGN_S
    n, _, block = program_coords(1, GROUP_BLOCKS, CHANNELS_LAST, False)
    s = tl.arange(0, BLOCK_S)
    c_in_tile, c, c_mask = tile_channels(block, 0, C, GROUP, GROUPS, EVEN_C, BLOCK_C)
    mask = tile_mask(s, S, c_mask, EVEN_S)
    start = base_offset(n, 0, block * (GROUP * GROUPS), S, C, CHANNELS_LAST)
    offsets = tile_offsets(s, c_in_tile, S, C, CHANNELS_LAST)

    u = load_fp32(x_ptr + start + offsets, mask)
    weight_eff, bias_eff = effective_affine(
        n, c, c_mask, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride_n, shift_stride_n
    )
    if add_ptr is not None:
        u += load_fp32(add_ptr + n * add_stride_n + c, c_mask)[None, :]
    size = S * 1.0 * GROUP
    d = zero_beyond(u, s, S, EVEN_S)
    mean = tl.zeros((GROUPS,), tl.float32)
    mean_correction = mean
    if CENTER:
        # The mean is rounded; what it is off by is found with the variance, so that no precision is lost.
        mean = group_sums(tl.sum(d, 0), GROUPS) / size
        d = zero_beyond(u - tl.where(c_mask, of_channels(mean, GROUPS, BLOCK_C), 0.0)[None, :], s, S, EVEN_S)
        sums, squares = tl.reduce((d, d * d), 0, add_pairs)
        sums, squares = group_sums_of_two(sums, squares, GROUPS)
        mean_correction = sums / size
    else:
        squares = group_sums(tl.sum(d * d, 0), GROUPS)
    rstd = rstd_of(squares / size, mean_correction, eps, CENTER)
    _store_stats(n, block, mean + mean_correction, rstd, stats_ptr, stats_stride, G, GROUPS, CENTER)
    weight_eff *= of_channels(rstd, GROUPS, BLOCK_C)
    bias_eff -= of_channels(mean_correction, GROUPS, BLOCK_C) * weight_eff
    w = d * weight_eff[None, :] + bias_eff[None, :]
    tl.store(y_ptr + start + offsets, activate(w, SILU, FAST), mask)


@jit
def fwd_partial_stats(
    x_ptr, stats_ptr, add_ptr,
    positions, stats_stride, add_stride_n, position_splits, partial_stride,
    CENTER: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN_S: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr, EVEN_S: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT_SIZE: tl.constexpr, CHANNEL_SPLITS: tl.constexpr,
):  # fmt: skip
    """For a split of a block of groups, the part of each group in it: mean, and sum of squared differences from it.

    They are stored behind the statistics.
    """
    splits = position_splits * CHANNEL_SPLITS
    partial_ptr = stats_ptr + (2 * stats_stride if CENTER else stats_stride)
    n, split, block = program_coords(splits, GROUP_BLOCKS, CHANNELS_LAST, False)
    S = positions * ALIGN_S
    _, size, part_c, s, c, c_mask, offsets = split_tile(
        n, block, split, S, position_splits, CHANNELS_LAST, C, GROUP, GROUPS, EVEN_C, BLOCK_S, BLOCK_C, SPLIT_SIZE,
        CHANNEL_SPLITS,
    )  # fmt: skip
    x_ptr += offsets
    stride = tile_stride(C, BLOCK_S, CHANNELS_LAST)

    # For each channel, counted from its mean over the first tile, which is near enough to lose no precision. Every
    # tile is loaded while the one before it is reduced.
    x = load_fp32(x_ptr, tile_mask(s, size, c_mask, EVEN_S))
    x_ptr += stride
    ahead = tl.load(x_ptr, tile_mask(s, size - BLOCK_S, c_mask, EVEN_S), other=0.0)
    mean = tl.sum(x, 0) / tl.minimum(size, BLOCK_S)
    sums = zero_beyond(x - mean[None, :], s, size, EVEN_S)
    squares = sums * sums
    for done in range(BLOCK_S, size, BLOCK_S):
        d = zero_beyond(ahead.to(tl.float32) - mean[None, :], s, size - done, EVEN_S)
        x_ptr += stride
        ahead = tl.load(x_ptr, tile_mask(s, size - done - BLOCK_S, c_mask, EVEN_S), other=0.0)
        sums += d
        squares += d * d
    correction, m2 = tl.reduce((sums, squares), 0, add_pairs)
    correction /= size
    m2 = tl.maximum(m2 - correction * correction * size, 0.0)

    # Then over the channels of each group.
    mean += correction
    if add_ptr is not None:
        mean += load_fp32(add_ptr + n * add_stride_n + c, c_mask)
    width = tl.minimum(GROUP - part_c * BLOCK_C, BLOCK_C) if CHANNEL_SPLITS > 1 else GROUP
    group_mean = group_sums(mean, GROUPS) / width  # mean is 0 in idle columns
    d = tl.where(c_mask, mean - of_channels(group_mean, GROUPS, BLOCK_C), 0.0)
    mean_correction, group_m2 = group_sums_of_two(d, m2 + d * d * size, GROUPS)
    mean_correction /= width
    group_m2 = tl.maximum(group_m2 - mean_correction * mean_correction * (size * 1.0 * width), 0.0)
    g = block * GROUPS + tl.arange(0, GROUPS)
    g_mask = g < G
    partial_ptr += (n * G + g) * splits + split
    tl.store(partial_ptr, group_mean + mean_correction, g_mask)
    tl.store(partial_ptr + partial_stride, group_m2, g_mask)


@jit
def fwd_normalize(
    x_ptr, y_ptr, stats_ptr, weight_ptr, bias_ptr, add_ptr, scale_ptr, shift_ptr,
    positions, stats_stride, add_stride_n, scale_stride_n, shift_stride_n, eps, position_splits, partial_stride,
    SILU: tl.constexpr, CENTER: tl.constexpr, FAST: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN_S: tl.constexpr,
    C: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    EVEN_S: tl.constexpr, EVEN_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT_SIZE: tl.constexpr,
    CHANNEL_SPLITS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y of a split, from the last to the first: `fwd_partial_stats` went the other way and left the end in L2."""
    S = positions * ALIGN_S
    splits = position_splits * CHANNEL_SPLITS
    partial_ptr = stats_ptr + (2 * stats_stride if CENTER else stats_stride)
    n, split, block = program_coords(splits, GROUP_BLOCKS, CHANNELS_LAST, True)

    # Mean and rstd of the block's groups, (GROUPS,), from those of their splits (Chan et al., 1979).
    k = tl.arange(0, BLOCK_K)
    g = block * GROUPS + tl.arange(0, GROUPS)
    mask = (k < splits)[:, None] & (g < G)[None, :]
    partial_ptr += n * G * splits + g[None, :] * splits + k[:, None]
    split_mean = tl.load(partial_ptr, mask, other=0.0)
    split_m2 = tl.load(partial_ptr + partial_stride, mask, other=0.0)
    part_s, part_c = split_coords(k, position_splits, CHANNEL_SPLITS, CHANNELS_LAST)
    count = tl.minimum(S - tl.cast(part_s, tl.int64) * SPLIT_SIZE, SPLIT_SIZE).to(tl.float32)
    count *= tl.minimum(GROUP - part_c * BLOCK_C, BLOCK_C) if CHANNEL_SPLITS > 1 else GROUP
    count = tl.where(k < splits, count, 0.0)[:, None]
    total = S * 1.0 * GROUP
    mean = tl.zeros((GROUPS,), tl.float32)
    if CENTER:
        mean = tl.sum(split_mean * count, 0) / total
        split_mean = tl.where(mask, split_mean - mean[None, :], 0.0)
    sums, squares = tl.reduce((split_mean * count, split_m2 + split_mean * split_mean * count), 0, add_pairs)
    mean_correction = sums / total if CENTER else mean
    mean += mean_correction
    rstd = rstd_of(squares / total, mean_correction, eps, CENTER)
    if split == 0:
        _store_stats(n, block, mean, rstd, stats_ptr, stats_stride, G, GROUPS, CENTER)

    _, size, _, s, c, c_mask, offsets = split_tile(
        n, block, split, S, position_splits, CHANNELS_LAST, C, GROUP, GROUPS, EVEN_C, BLOCK_S, BLOCK_C, SPLIT_SIZE,
        CHANNEL_SPLITS,
    )  # fmt: skip
    stride = tile_stride(C, BLOCK_S, CHANNELS_LAST)
    x_ptr += offsets
    y_ptr += offsets

    ahead = tl.load(x_ptr, tile_mask(s, size, c_mask, EVEN_S), other=0.0)
    weight_eff, bias_eff = effective_affine(
        n, c, c_mask, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride_n, shift_stride_n
    )
    center = of_channels(mean, GROUPS, BLOCK_C)
    if add_ptr is not None:
        center -= load_fp32(add_ptr + n * add_stride_n + c, c_mask)
    weight_eff *= of_channels(rstd, GROUPS, BLOCK_C)
    for done in range(0, size, BLOCK_S):
        x = ahead.to(tl.float32)
        x_ptr += stride
        ahead = tl.load(x_ptr, tile_mask(s, size - done - BLOCK_S, c_mask, EVEN_S), other=0.0)
        w = (x - center[None, :]) * weight_eff[None, :] + bias_eff[None, :]
        tl.store(y_ptr, activate(w, SILU, FAST), tile_mask(s, size - done, c_mask, EVEN_S))
        y_ptr += stride


@jit
def _store_stats(
    n, block, mean, rstd, stats_ptr, stats_stride, G: tl.constexpr, GROUPS: tl.constexpr,
    CENTER: tl.constexpr,
):  # fmt: skip
    g = block * GROUPS + tl.arange(0, GROUPS)
    mask = g < G
    if CENTER:
        tl.store(stats_ptr + n * G + g, mean, mask)
        stats_ptr += stats_stride
    tl.store(stats_ptr + n * G + g, rstd, mask)
