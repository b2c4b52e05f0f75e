"""The backward kernels, by how large a group is: `tile`, `loop`, or `sums`, `merge` and `elements` in turn.

All gradients follow from sums over the positions, for each sample and channel, of dw and of dw * x_hat; that of
`add` from the sum of x_hat too. See `parts` for the layouts and names, and `plan` for what goes where.
"""

from __future__ import annotations

import triton.language as tl

from .parts import (
    activation_gradient,
    center_and_rstd,
    gain_and_offset,
    group_sums,
    jit,
    offsets_of,
    place,
    read,
    start_of,
    step_of,
)


@jit
def tile(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    scale_ptr,
    shift_ptr,
    add_row,
    scale_row,
    shift_row,
    dx_ptr,
    sum_dw_ptr,
    sum_dw_x_hat_ptr,
    dadd_ptr,
    dscale_ptr,
    dshift_ptr,
    positions,
    channels,
    bundles,
    SILU: tl.constexpr,
    CENTER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN_S: tl.constexpr,
    ALIGN_C: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of GROUPS groups of a sample, which a program holds in its registers."""
    S, C = positions * ALIGN_S, channels * ALIGN_C
    n, bundle = tl.program_id(0) // bundles, tl.program_id(0) % bundles
    local, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    c = bundle * (GROUP * GROUPS) + local
    inside = (local < GROUP * GROUPS) & (c < C)
    mask = (s < S)[:, None] & inside[None, :]
    start = start_of(n, 0, bundle * (GROUP * GROUPS), S, C, CHANNELS_LAST)
    offsets = offsets_of(s, local, S, C, CHANNELS_LAST)

    x, dw = read(x_ptr + start + offsets, mask), read(dy_ptr + start + offsets, mask)
    center, rstd = center_and_rstd(n, c, inside, C, C // GROUP, mean_ptr, rstd_ptr, add_ptr, add_row, CENTER)
    gain, offset = gain_and_offset(n, c, inside, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row)
    d = tl.where(mask, x - center[None, :], 0.0)
    dw *= activation_gradient(d * (gain * rstd)[None, :] + offset[None, :], SILU)
    level, slope = _reduce(
        n, c, local, inside, S, C, tl.sum(dw, 0), tl.sum(dw * d, 0), tl.sum(d, 0), gain, rstd, weight_ptr, bias_ptr,
        sum_dw_ptr, sum_dw_x_hat_ptr, dadd_ptr, dscale_ptr, dshift_ptr, CENTER, GROUP, GROUPS, PADDED_GROUPS,
    )  # fmt: skip
    if dx_ptr is not None:
        dx = dw * (gain * rstd)[None, :] - level[None, :] - d * slope[None, :]
        tl.store(dx_ptr + start + offsets, dx, mask)


@jit
def loop(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    scale_ptr,
    shift_ptr,
    add_row,
    scale_row,
    shift_row,
    dx_ptr,
    sum_dw_ptr,
    sum_dw_x_hat_ptr,
    dadd_ptr,
    dscale_ptr,
    dshift_ptr,
    positions,
    channels,
    bundles,
    SILU: tl.constexpr,
    CENTER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN_S: tl.constexpr,
    ALIGN_C: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """As `tile`, for groups that a program reads twice, the second time from its caches."""
    S, C = positions * ALIGN_S, channels * ALIGN_C
    n, bundle = tl.program_id(0) // bundles, tl.program_id(0) % bundles
    local, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    c = bundle * (GROUP * GROUPS) + local
    inside = (local < GROUP * GROUPS) & (c < C)
    start = start_of(n, 0, bundle * (GROUP * GROUPS), S, C, CHANNELS_LAST)
    offsets = offsets_of(s, local, S, C, CHANNELS_LAST)
    step = step_of(C, BLOCK_S, CHANNELS_LAST)
    dy_ptr += start
    x_ptr += start

    center, rstd = center_and_rstd(n, c, inside, C, C // GROUP, mean_ptr, rstd_ptr, add_ptr, add_row, CENTER)
    gain, offset = gain_and_offset(n, c, inside, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row)
    factor = gain * rstd
    sum_dw, sum_dw_d, sum_d = _sums_of(
        dy_ptr, x_ptr, s, offsets, inside, S, step, center, factor, offset, SILU, dadd_ptr is not None, BLOCK_S, BLOCK_C
    )
    level, slope = _reduce(
        n, c, local, inside, S, C, sum_dw, sum_dw_d, sum_d, gain, rstd, weight_ptr, bias_ptr,
        sum_dw_ptr, sum_dw_x_hat_ptr, dadd_ptr, dscale_ptr, dshift_ptr, CENTER, GROUP, GROUPS, PADDED_GROUPS,
    )  # fmt: skip
    if dx_ptr is not None:
        dx_ptr += start
        for done in range(0, S, BLOCK_S):
            mask = (s < S - done)[:, None] & inside[None, :]
            d = read(x_ptr + offsets, mask) - center[None, :]
            dw = read(dy_ptr + offsets, mask)
            dw *= activation_gradient(d * factor[None, :] + offset[None, :], SILU)
            tl.store(dx_ptr + offsets, dw * factor[None, :] - level[None, :] - d * slope[None, :], mask)
            dy_ptr += step
            x_ptr += step
            dx_ptr += step


@jit
def sums(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    scale_ptr,
    shift_ptr,
    add_row,
    scale_row,
    shift_row,
    sums_ptr,
    positions,
    channels,
    num_groups,
    chunk,
    chunks,
    channel_blocks,
    stride,
    NEED_D: tl.constexpr,
    SILU: tl.constexpr,
    CENTER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN_S: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For each sample, `chunk` of positions and channel: sums of dw, of dw * d and, if NEED_D, of d."""
    S, C = positions * ALIGN_S, channels * ALIGN_C
    n, part, block = place(chunks, channel_blocks, False)
    local, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    c = block * BLOCK_C + local
    first = part.to(tl.int64) * chunk
    size = tl.minimum(S - first, chunk).to(tl.int32)
    start = start_of(n, first, block * BLOCK_C, S, C, CHANNELS_LAST)
    offsets = offsets_of(s, local, S, C, CHANNELS_LAST)
    step = step_of(C, BLOCK_S, CHANNELS_LAST)
    center, rstd = center_and_rstd(n, c, c < C, C, num_groups, mean_ptr, rstd_ptr, add_ptr, add_row, CENTER)
    gain, offset = gain_and_offset(n, c, c < C, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row)
    sum_dw, sum_dw_d, sum_d = _sums_of(
        dy_ptr + start, x_ptr + start, s, offsets, c < C, size, step, center, gain * rstd, offset,
        SILU, NEED_D, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    out = (n.to(tl.int64) * chunks + part) * C + c
    tl.store(sums_ptr + out, sum_dw, c < C)
    tl.store(sums_ptr + stride + out, sum_dw_d, c < C)
    if NEED_D:
        tl.store(sums_ptr + 2 * stride + out, sum_d, c < C)


@jit
def merge(
    sums_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    scale_row,
    sum_dw_ptr,
    sum_dw_x_hat_ptr,
    dadd_ptr,
    dscale_ptr,
    dshift_ptr,
    level_ptr,
    slope_ptr,
    positions,
    channels,
    num_groups,
    chunks,
    stride,
    CENTER: tl.constexpr,
    ALIGN_S: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For a sample's group, from `sums`: the small gradients, and level and slope for `elements`."""
    S, C = positions * ALIGN_S, channels * ALIGN_C
    n, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    group_channels = C // num_groups
    sums_ptr += n.to(tl.int64) * chunks * C
    rstd = tl.load(rstd_ptr + tl.program_id(0))
    total = S * 1.0 * group_channels
    level, slope = 0.0, 0.0
    for done in range(0, group_channels, BLOCK_C):
        local = done + tl.arange(0, BLOCK_C)
        c, mask = group * group_channels + local, local < group_channels
        sum_dw = _sum_of_chunks(sums_ptr, c, mask, C, chunks, BLOCK_CHUNKS, BLOCK_C)
        sum_dw_d = _sum_of_chunks(sums_ptr + stride, c, mask, C, chunks, BLOCK_CHUNKS, BLOCK_C)
        gain, _ = gain_and_offset(n, c, mask, weight_ptr, None, scale_ptr, None, scale_row, 0)
        if CENTER:
            level += tl.sum(gain * sum_dw, 0)
        slope += tl.sum(gain * sum_dw_d, 0)
        _store_sums(
            n, c, mask, C, sum_dw, sum_dw_d * rstd, weight_ptr, bias_ptr,
            sum_dw_ptr, sum_dw_x_hat_ptr, dscale_ptr, dshift_ptr,
        )  # fmt: skip
    level *= rstd / total
    slope *= rstd * rstd * rstd / total
    if CENTER:
        tl.store(level_ptr + tl.program_id(0), level)
    tl.store(slope_ptr + tl.program_id(0), slope)
    if dadd_ptr is not None:
        for done in range(0, group_channels, BLOCK_C):
            local = done + tl.arange(0, BLOCK_C)
            c, mask = group * group_channels + local, local < group_channels
            sum_dw = _sum_of_chunks(sums_ptr, c, mask, C, chunks, BLOCK_CHUNKS, BLOCK_C)
            sum_d = _sum_of_chunks(sums_ptr + 2 * stride, c, mask, C, chunks, BLOCK_CHUNKS, BLOCK_C)
            gain, _ = gain_and_offset(n, c, mask, weight_ptr, None, scale_ptr, None, scale_row, 0)
            tl.store(dadd_ptr + n * C + c, gain * rstd * sum_dw - S * level - sum_d * slope, mask)


@jit
def elements(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    scale_ptr,
    shift_ptr,
    add_row,
    scale_row,
    shift_row,
    level_ptr,
    slope_ptr,
    dx_ptr,
    positions,
    channels,
    num_groups,
    blocks,
    channel_blocks,
    SILU: tl.constexpr,
    CENTER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN_S: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx, from the last tile to the first: `sums` went the other way, and left the end in the L2 cache."""
    S, C = positions * ALIGN_S, channels * ALIGN_C
    n, part, block = place(blocks, channel_blocks, True)
    local, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    c = block * BLOCK_C + local
    first = part.to(tl.int64) * BLOCK_S
    mask = (s < S - first)[:, None] & (c < C)[None, :]
    start = start_of(n, first, block * BLOCK_C, S, C, CHANNELS_LAST)
    offsets = offsets_of(s, local, S, C, CHANNELS_LAST)

    x, dw = read(x_ptr + start + offsets, mask), read(dy_ptr + start + offsets, mask)
    center, rstd = center_and_rstd(n, c, c < C, C, num_groups, mean_ptr, rstd_ptr, add_ptr, add_row, CENTER)
    gain, offset = gain_and_offset(n, c, c < C, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row)
    factor = gain * rstd
    group = n * num_groups + c // (C // num_groups)
    level = read(level_ptr + group, c < C) if CENTER else tl.zeros(c.shape, tl.float32)
    slope = read(slope_ptr + group, c < C)
    d = x - center[None, :]
    dw *= activation_gradient(d * factor[None, :] + offset[None, :], SILU)
    tl.store(dx_ptr + start + offsets, dw * factor[None, :] - level[None, :] - d * slope[None, :], mask)


@jit
def over_batch(
    sum_dw_ptr,
    sum_dw_x_hat_ptr,
    scale_ptr,
    scale_row,
    dweight_ptr,
    dbias_ptr,
    samples,
    C,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dweight and dbias: sums over the samples, in a fixed order."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for done in range(0, samples, BLOCK_N):
        n = done + tl.arange(0, BLOCK_N)
        mask = (n < samples)[:, None] & (c < C)[None, :]
        i = n[:, None] * C + c[None, :]
        sum_dw, sum_dw_x_hat = read(sum_dw_ptr + i, mask), read(sum_dw_x_hat_ptr + i, mask)
        if scale_ptr is not None:
            growth = 1.0 + read(scale_ptr + n[:, None] * scale_row + c[None, :], mask)
            sum_dw *= growth
            sum_dw_x_hat *= growth
        dweight += sum_dw_x_hat
        dbias += sum_dw
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, tl.sum(dweight, 0), c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, tl.sum(dbias, 0), c < C)


@jit
def _sums_of(
    dy_ptr,
    x_ptr,
    s,
    offsets,
    inside,
    size,
    step,
    center,
    factor,
    offset,
    SILU: tl.constexpr,
    NEED_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of dw, of dw * d and, if NEED_D, of d, of each of a tile's channels over `size` positions."""
    sum_dw = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    sum_dw_d = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    sum_d = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for done in range(0, size, BLOCK_S):
        mask = (s < size - done)[:, None] & inside[None, :]
        d = tl.where(mask, read(x_ptr + offsets, mask) - center[None, :], 0.0)
        dw = read(dy_ptr + offsets, mask)
        dw *= activation_gradient(d * factor[None, :] + offset[None, :], SILU)
        sum_dw += dw
        sum_dw_d += dw * d
        if NEED_D:
            sum_d += d
        dy_ptr += step
        x_ptr += step
    return tl.sum(sum_dw, 0), tl.sum(sum_dw_d, 0), tl.sum(sum_d, 0)


@jit
def _reduce(
    n,
    c,
    local,
    inside,
    S,
    C,
    sum_dw,
    sum_dw_d,
    sum_d,
    gain,
    rstd,
    weight_ptr,
    bias_ptr,
    sum_dw_ptr,
    sum_dw_x_hat_ptr,
    dadd_ptr,
    dscale_ptr,
    dshift_ptr,
    CENTER: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
):
    """Store what follows from a tile's sums; dx is gain * rstd * dw less the level and d times the slope returned.

    The level is what centring takes off: without CENTER, 0.
    """
    sum_dw_x_hat = sum_dw_d * rstd
    _store_sums(
        n, c, inside, C, sum_dw, sum_dw_x_hat, weight_ptr, bias_ptr,
        sum_dw_ptr, sum_dw_x_hat_ptr, dscale_ptr, dshift_ptr,
    )  # fmt: skip
    scaling = rstd / (S * GROUP * 1.0)
    level = tl.zeros(c.shape, tl.float32)
    if CENTER:
        level = group_sums(gain * sum_dw, local, GROUP, GROUPS, PADDED_GROUPS) * scaling
    slope = group_sums(gain * sum_dw_x_hat, local, GROUP, GROUPS, PADDED_GROUPS) * scaling * rstd
    if dadd_ptr is not None:
        tl.store(dadd_ptr + n * C + c, gain * rstd * sum_dw - S * level - sum_d * slope, inside)
    return level, slope


@jit
def _store_sums(
    n,
    c,
    mask,
    C,
    sum_dw,
    sum_dw_x_hat,
    weight_ptr,
    bias_ptr,
    sum_dw_ptr,
    sum_dw_x_hat_ptr,
    dscale_ptr,
    dshift_ptr,
):
    """The two sums for `over_batch`, and the gradients of scale and shift."""
    if sum_dw_ptr is not None:
        tl.store(sum_dw_ptr + n * C + c, sum_dw, mask)
        tl.store(sum_dw_x_hat_ptr + n * C + c, sum_dw_x_hat, mask)
    if dscale_ptr is not None:
        weight, bias = gain_and_offset(n, c, mask, weight_ptr, bias_ptr, None, None, 0, 0)
        tl.store(dscale_ptr + n * C + c, weight * sum_dw_x_hat + bias * sum_dw, mask)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + n * C + c, sum_dw, mask)


@jit
def _sum_of_chunks(sums_ptr, c, mask, C, chunks, BLOCK_CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):
    total = tl.zeros((BLOCK_CHUNKS, BLOCK_C), tl.float32)
    for done in range(0, chunks, BLOCK_CHUNKS):
        part = done + tl.arange(0, BLOCK_CHUNKS)
        total += read(sums_ptr + part[:, None] * C + c[None, :], (part < chunks)[:, None] & mask[None, :])
    return tl.sum(total, 0)
