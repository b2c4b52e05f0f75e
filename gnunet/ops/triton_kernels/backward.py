"""The backward kernels: `bwd_single_pass`, or `bwd_partial_sums` and `bwd_dx`; and after any of them
`bwd_dweight_dbias`, after a split reduction `bwd_combine_sums` first where tables have gradients.

All gradients follow from sums over the positions, for each sample and channel, of dw and of dw * d; that of `add` from
the sum of d too. See `common` for the memory formats and names, and `tiling` for what goes where.
"""

from __future__ import annotations

import triton.language as tl

from .common import (
    activation_gradient,
    add_pairs,
    base_offset,
    effective_affine,
    group_sums_of_two,
    jit,
    load_fp32,
    load_mean_rstd,
    of_channels,
    program_coords,
    split_tile,
    tile_channels,
    tile_mask,
    tile_offsets,
    tile_stride,
    zero_beyond,
)


@jit
def bwd_single_pass(
    dy_ptr, x_ptr, stats_ptr, weight_ptr, bias_ptr, add_ptr, scale_ptr, shift_ptr, dx_ptr, sums_ptr, dadd_ptr,
    dscale_ptr, dshift_ptr,
    positions, stats_stride, add_stride_n, scale_stride_n, shift_stride_n, sums_stride,
    SILU: tl.constexpr, CENTER: tl.constexpr, FAST: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN_S: tl.constexpr,
    C: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    EVEN_S: tl.constexpr, EVEN_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, the tables' gradients and the sums of a block of groups, which a program holds in its registers."""
    S = positions * ALIGN_S
    n, _, block = program_coords(1, GROUP_BLOCKS, CHANNELS_LAST, False)
    s = tl.arange(0, BLOCK_S)
    c_in_tile, c, c_mask = tile_channels(block, 0, C, GROUP, GROUPS, EVEN_C, BLOCK_C)
    mask = tile_mask(s, S, c_mask, EVEN_S)
    start = base_offset(n, 0, block * (GROUP * GROUPS), S, C, CHANNELS_LAST)
    offsets = tile_offsets(s, c_in_tile, S, C, CHANNELS_LAST)

    x, dw = load_fp32(x_ptr + start + offsets, mask), load_fp32(dy_ptr + start + offsets, mask)
    center, rstd = load_mean_rstd(n, c, c_mask, G, GROUP, stats_ptr, stats_stride, add_ptr, add_stride_n, CENTER)
    weight_eff, bias_eff = effective_affine(
        n, c, c_mask, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride_n, shift_stride_n
    )
    d = zero_beyond(x - center[None, :], s, S, EVEN_S)
    dw *= activation_gradient(d * (weight_eff * rstd)[None, :] + bias_eff[None, :], SILU, FAST)
    sum_dw, sum_dw_d = tl.reduce((dw, dw * d), 0, add_pairs)
    if sums_ptr is not None:
        tl.store(sums_ptr + n * C + c, sum_dw, c_mask)
        tl.store(sums_ptr + sums_stride + n * C + c, sum_dw_d, c_mask)
    scaling = rstd / (S * 1.0 * GROUP)
    mean_dy = tl.zeros((BLOCK_C,), tl.float32)
    group_dw, group_dw_d = group_sums_of_two(weight_eff * sum_dw, weight_eff * sum_dw_d, GROUPS)
    if CENTER:
        mean_dy = of_channels(group_dw, GROUPS, BLOCK_C) * scaling
    mean_dy_xhat = of_channels(group_dw_d, GROUPS, BLOCK_C) * scaling * rstd * rstd
    if dadd_ptr is not None:
        dadd = weight_eff * rstd * sum_dw - S * mean_dy - tl.sum(d, 0) * mean_dy_xhat
        tl.store(dadd_ptr + n * C + c, dadd, c_mask)
    _store_dscale_dshift(n, c, c_mask, C, sum_dw, sum_dw_d * rstd, weight_ptr, bias_ptr, dscale_ptr, dshift_ptr)
    if dx_ptr is not None:
        dx = dw * (weight_eff * rstd)[None, :] - mean_dy[None, :] - d * mean_dy_xhat[None, :]
        tl.store(dx_ptr + start + offsets, dx, mask)


@jit
def bwd_partial_sums(
    dy_ptr, x_ptr, stats_ptr, weight_ptr, bias_ptr, add_ptr, scale_ptr, shift_ptr, sums_ptr, partial_ptr,
    positions, stats_stride, add_stride_n, scale_stride_n, shift_stride_n, position_splits, sums_stride,
    partial_stride,
    NEED_D: tl.constexpr, SILU: tl.constexpr, CENTER: tl.constexpr, FAST: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGN_S: tl.constexpr, C: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr, EVEN_S: tl.constexpr, EVEN_C: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr, SPLIT_SIZE: tl.constexpr, CHANNEL_SPLITS: tl.constexpr,
):  # fmt: skip
    """For a split of a block of groups: sums of dw, of dw * d and, if NEED_D, of d of each channel, and the first two,
    times weight_eff, of the part of each group in it."""
    splits = position_splits * CHANNEL_SPLITS
    n, split, block = program_coords(splits, GROUP_BLOCKS, CHANNELS_LAST, False)
    S = positions * ALIGN_S
    part_s, size, _, s, c, c_mask, offsets = split_tile(
        n, block, split, S, position_splits, CHANNELS_LAST, C, GROUP, GROUPS, EVEN_C, BLOCK_S, BLOCK_C, SPLIT_SIZE,
        CHANNEL_SPLITS,
    )  # fmt: skip
    stride = tile_stride(C, BLOCK_S, CHANNELS_LAST)
    dy_ptr += offsets
    x_ptr += offsets

    # Every tile is loaded while the one before it is reduced.
    mask = tile_mask(s, size, c_mask, EVEN_S)
    x_ahead, dy_ahead = tl.load(x_ptr, mask, other=0.0), tl.load(dy_ptr, mask, other=0.0)
    center, rstd = load_mean_rstd(n, c, c_mask, G, GROUP, stats_ptr, stats_stride, add_ptr, add_stride_n, CENTER)
    weight_eff, bias_eff = effective_affine(
        n, c, c_mask, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride_n, shift_stride_n
    )
    factor = weight_eff * rstd
    sum_dw = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    sum_dw_d, sum_d = sum_dw, sum_dw
    for done in range(0, size, BLOCK_S):
        x, dw = x_ahead.to(tl.float32), dy_ahead.to(tl.float32)
        x_ptr += stride
        dy_ptr += stride
        mask = tile_mask(s, size - done - BLOCK_S, c_mask, EVEN_S)
        x_ahead, dy_ahead = tl.load(x_ptr, mask, other=0.0), tl.load(dy_ptr, mask, other=0.0)
        d = zero_beyond(x - center[None, :], s, size - done, EVEN_S)
        dw *= activation_gradient(d * factor[None, :] + bias_eff[None, :], SILU, FAST)
        sum_dw += dw
        sum_dw_d += dw * d
        if NEED_D:
            sum_d += d
    sum_dw, sum_dw_d = tl.reduce((sum_dw, sum_dw_d), 0, add_pairs)

    sums_ptr += (n * position_splits + part_s) * C + c
    tl.store(sums_ptr, sum_dw, c_mask)
    tl.store(sums_ptr + sums_stride, sum_dw_d, c_mask)
    if NEED_D:
        tl.store(sums_ptr + 2 * sums_stride, tl.sum(sum_d, 0), c_mask)
    g = block * GROUPS + tl.arange(0, GROUPS)
    g_mask = g < G
    partial_ptr += (n * G + g) * splits + split
    group_dw, group_dw_d = group_sums_of_two(weight_eff * sum_dw, weight_eff * sum_dw_d, GROUPS)
    tl.store(partial_ptr, group_dw, g_mask)
    tl.store(partial_ptr + partial_stride, group_dw_d, g_mask)


@jit
def bwd_dx(
    dy_ptr, x_ptr, stats_ptr, weight_ptr, bias_ptr, add_ptr, scale_ptr, shift_ptr, partial_ptr, means_ptr, dx_ptr,
    positions, stats_stride, add_stride_n, scale_stride_n, shift_stride_n, position_splits, partial_stride,
    means_stride,
    SILU: tl.constexpr, CENTER: tl.constexpr, FAST: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN_S: tl.constexpr,
    C: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    EVEN_S: tl.constexpr, EVEN_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT_SIZE: tl.constexpr,
    CHANNEL_SPLITS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx of a split, from the last to the first: `bwd_partial_sums` went the other way and left the end in L2."""
    S = positions * ALIGN_S
    splits = position_splits * CHANNEL_SPLITS
    n, split, block = program_coords(splits, GROUP_BLOCKS, CHANNELS_LAST, True)

    # What the means over a group take off its gradient, (GROUPS,), from the sums of its splits. The program of the
    # first split stores it for `bwd_combine_sums`.
    k = tl.arange(0, BLOCK_K)
    g = block * GROUPS + tl.arange(0, GROUPS)
    g_mask = g < G
    mask = (k < splits)[:, None] & g_mask[None, :]
    partial_ptr += n * G * splits + g[None, :] * splits + k[:, None]
    mean_dy_xhat = tl.sum(tl.load(partial_ptr + partial_stride, mask, other=0.0), 0)
    mean_dy = tl.zeros((GROUPS,), tl.float32)
    rstd_ptr = stats_ptr
    if CENTER:
        mean_dy = tl.sum(tl.load(partial_ptr, mask, other=0.0), 0)
        rstd_ptr += stats_stride
    group_rstd = load_fp32(rstd_ptr + n * G + g, g_mask)
    mean_dy *= group_rstd / (S * 1.0 * GROUP)
    mean_dy_xhat *= group_rstd * group_rstd * group_rstd / (S * 1.0 * GROUP)
    if means_ptr is not None:  # noqa: SIM102, the compiler decides the first, each program the second
        if split == 0:
            tl.store(means_ptr + n * G + g, mean_dy, g_mask)
            tl.store(means_ptr + means_stride + n * G + g, mean_dy_xhat, g_mask)

    if dx_ptr is not None:
        _, size, _, s, c, c_mask, offsets = split_tile(
            n, block, split, S, position_splits, CHANNELS_LAST, C, GROUP, GROUPS, EVEN_C, BLOCK_S, BLOCK_C, SPLIT_SIZE,
            CHANNEL_SPLITS,
        )  # fmt: skip
        stride = tile_stride(C, BLOCK_S, CHANNELS_LAST)
        dy_ptr += offsets
        x_ptr += offsets
        dx_ptr += offsets

        mask = tile_mask(s, size, c_mask, EVEN_S)
        x_ahead, dy_ahead = tl.load(x_ptr, mask, other=0.0), tl.load(dy_ptr, mask, other=0.0)
        center, rstd = load_mean_rstd(n, c, c_mask, G, GROUP, stats_ptr, stats_stride, add_ptr, add_stride_n, CENTER)
        weight_eff, bias_eff = effective_affine(
            n, c, c_mask, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride_n, shift_stride_n
        )
        factor = weight_eff * rstd
        mean_dy = of_channels(mean_dy, GROUPS, BLOCK_C)
        mean_dy_xhat = of_channels(mean_dy_xhat, GROUPS, BLOCK_C)
        for done in range(0, size, BLOCK_S):
            x, dw = x_ahead.to(tl.float32), dy_ahead.to(tl.float32)
            x_ptr += stride
            dy_ptr += stride
            mask = tile_mask(s, size - done - BLOCK_S, c_mask, EVEN_S)
            x_ahead, dy_ahead = tl.load(x_ptr, mask, other=0.0), tl.load(dy_ptr, mask, other=0.0)
            d = x - center[None, :]
            dw *= activation_gradient(d * factor[None, :] + bias_eff[None, :], SILU, FAST)
            dx = dw * factor[None, :] - mean_dy[None, :] - d * mean_dy_xhat[None, :]
            tl.store(dx_ptr, dx, tile_mask(s, size - done, c_mask, EVEN_S))
            dx_ptr += stride


@jit
def bwd_combine_sums(
    sums_ptr, stats_ptr, means_ptr, weight_ptr, bias_ptr, scale_ptr, dadd_ptr, dscale_ptr, dshift_ptr, combined_ptr,
    positions, stats_stride, scale_stride_n, position_splits, sums_stride, means_stride, combined_stride,
    CENTER: tl.constexpr, ALIGN_S: tl.constexpr, C: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of a sample's tables, from the sums of its splits, and those sums of all splits."""
    S = positions * ALIGN_S
    blocks = tl.cdiv(C, BLOCK_C)
    n, c = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    sums_ptr += n * position_splits * C
    sum_dw, sum_dw_d = _sum_rows(sums_ptr, sums_stride, position_splits, c, mask, C, BLOCK_K, BLOCK_C)
    if combined_ptr is not None:
        tl.store(combined_ptr + n * C + c, sum_dw, mask)
        tl.store(combined_ptr + combined_stride + n * C + c, sum_dw_d, mask)
    _, rstd = load_mean_rstd(n, c, mask, G, GROUP, stats_ptr, stats_stride, None, 0, CENTER)
    _store_dscale_dshift(n, c, mask, C, sum_dw, sum_dw_d * rstd, weight_ptr, bias_ptr, dscale_ptr, dshift_ptr)
    if dadd_ptr is not None:
        sum_d, _ = _sum_rows(sums_ptr + 2 * sums_stride, 0, position_splits, c, mask, C, BLOCK_K, BLOCK_C)
        weight_eff, _ = effective_affine(n, c, mask, weight_ptr, None, scale_ptr, None, scale_stride_n, 0)
        mean_dy = load_fp32(means_ptr + n * G + c // GROUP, mask)
        mean_dy_xhat = load_fp32(means_ptr + means_stride + n * G + c // GROUP, mask)
        tl.store(dadd_ptr + n * C + c, weight_eff * rstd * sum_dw - S * mean_dy - sum_d * mean_dy_xhat, mask)


@jit
def bwd_dweight_dbias(
    sums_ptr, stats_ptr, scale_ptr, dweight_ptr, dbias_ptr,
    stats_stride, scale_stride_n, rows, rows_of_sample, sums_stride,
    CENTER: tl.constexpr, C: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dweight and dbias from the sums of all samples, in a fixed order."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for done in range(0, rows, BLOCK_K):
        row = done + tl.arange(0, BLOCK_K)
        n = (row // rows_of_sample).to(tl.int64)
        mask = (row < rows)[:, None] & (c < C)[None, :]
        i = row.to(tl.int64)[:, None] * C + c[None, :]
        sum_dw, sum_dw_d = load_fp32(sums_ptr + i, mask), load_fp32(sums_ptr + sums_stride + i, mask)
        _, rstd = load_mean_rstd(
            n[:, None], c[None, :], mask, G, GROUP, stats_ptr, stats_stride, None, 0, CENTER
        )  # fmt: skip
        sum_dw_xhat = sum_dw_d * rstd
        if scale_ptr is not None:
            one_plus_scale = 1.0 + load_fp32(scale_ptr + n[:, None] * scale_stride_n + c[None, :], mask)
            sum_dw *= one_plus_scale
            sum_dw_xhat *= one_plus_scale
        dweight += sum_dw_xhat
        dbias += sum_dw
    dweight, dbias = tl.reduce((dweight, dbias), 0, add_pairs)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, dweight, c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, dbias, c < C)


@jit
def _store_dscale_dshift(
    n, c, mask, C: tl.constexpr, sum_dw, sum_dw_xhat, weight_ptr, bias_ptr, dscale_ptr, dshift_ptr
):  # fmt: skip
    if dscale_ptr is not None:
        weight, bias = effective_affine(n, c, mask, weight_ptr, bias_ptr, None, None, 0, 0)
        tl.store(dscale_ptr + n * C + c, weight * sum_dw_xhat + bias * sum_dw, mask)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + n * C + c, sum_dw, mask)


@jit
def _sum_rows(
    ptr, stride, rows, c, mask, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Over the rows of two matrices of C columns, `stride` apart."""
    first = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for done in range(0, rows, BLOCK_K):
        row = done + tl.arange(0, BLOCK_K)
        i = row.to(tl.int64)[:, None] * C + c[None, :]
        of_rows = (row < rows)[:, None] & mask[None, :]
        first += load_fp32(ptr + i, of_rows)
        second += load_fp32(ptr + stride + i, of_rows)
    return tl.reduce((first, second), 0, add_pairs)
