"""The forward kernels, by how large a group is: `tile`, `loop`, or `moments`, `merge` and `elements` in turn.

See `parts` for the layouts and names, and `plan` for what goes where.
"""

from __future__ import annotations

import triton.language as tl

from .parts import (
    activate,
    center_and_rstd,
    gain_and_offset,
    group_sums,
    jit,
    offsets_of,
    place,
    read,
    rstd_of,
    start_of,
    step_of,
)


@jit
def tile(
    x_ptr,
    y_ptr,
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
    positions,
    channels,
    bundles,
    eps,
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
    """y, mean and rstd of GROUPS groups of a sample, which a program holds in its registers."""
    S, C = positions * ALIGN_S, channels * ALIGN_C
    n, bundle = tl.program_id(0) // bundles, tl.program_id(0) % bundles
    local, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    c = bundle * (GROUP * GROUPS) + local
    inside = (local < GROUP * GROUPS) & (c < C)
    mask = (s < S)[:, None] & inside[None, :]
    start = start_of(n, 0, bundle * (GROUP * GROUPS), S, C, CHANNELS_LAST)
    offsets = offsets_of(s, local, S, C, CHANNELS_LAST)

    u = read(x_ptr + start + offsets, mask)
    if add_ptr is not None:
        u += read(add_ptr + n * add_row + c, inside)[None, :]
    size = S * GROUP * 1.0
    d = tl.where(mask, u, 0.0)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    rest = mean
    if CENTER:
        # The first mean is rounded; what is left of it is taken off with the second, so it costs no digits.
        mean = group_sums(tl.sum(d, 0), local, GROUP, GROUPS, PADDED_GROUPS) / size
        d = tl.where(mask, u - mean[None, :], 0.0)
        rest = group_sums(tl.sum(d, 0), local, GROUP, GROUPS, PADDED_GROUPS) / size
    squares = group_sums(tl.sum(d * d, 0), local, GROUP, GROUPS, PADDED_GROUPS) / size
    rstd = rstd_of(squares, rest, eps, CENTER)
    _store_moments(n, c, inside, C, mean + rest, rstd, mean_ptr, rstd_ptr, GROUP, CENTER)
    gain, offset = gain_and_offset(n, c, inside, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row)
    gain *= rstd
    w = d * gain[None, :] + (offset - rest * gain)[None, :]
    tl.store(y_ptr + start + offsets, activate(w, SILU), mask)


@jit
def loop(
    x_ptr,
    y_ptr,
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
    positions,
    channels,
    bundles,
    eps,
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
    x_ptr += start
    y_ptr += start

    channel_mean, channel_m2 = _moments_of(x_ptr, s, offsets, inside, S, step, BLOCK_S)
    center = tl.zeros((BLOCK_C,), tl.float32)
    if add_ptr is not None:
        center -= read(add_ptr + n * add_row + c, inside)
    d = tl.where(inside, channel_mean - center, 0.0)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    rest = mean
    if CENTER:
        # The mean of the channels' means, again in two steps.
        mean = group_sums(d, local, GROUP, GROUPS, PADDED_GROUPS) / GROUP
        d = tl.where(inside, d - mean, 0.0)
        rest = group_sums(d, local, GROUP, GROUPS, PADDED_GROUPS) / GROUP
    squares = group_sums(channel_m2 / S + d * d, local, GROUP, GROUPS, PADDED_GROUPS) / GROUP
    rstd = rstd_of(squares, rest, eps, CENTER)
    _store_moments(n, c, inside, C, mean + rest, rstd, mean_ptr, rstd_ptr, GROUP, CENTER)
    gain, offset = gain_and_offset(n, c, inside, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row)
    gain *= rstd
    center += mean
    offset -= rest * gain
    for done in range(0, S, BLOCK_S):
        mask = (s < S - done)[:, None] & inside[None, :]
        w = (read(x_ptr + offsets, mask) - center[None, :]) * gain[None, :] + offset[None, :]
        tl.store(y_ptr + offsets, activate(w, SILU), mask)
        x_ptr += step
        y_ptr += step


@jit
def moments(
    x_ptr,
    chunk_mean_ptr,
    chunk_m2_ptr,
    positions,
    channels,
    chunk,
    chunks,
    channel_blocks,
    CHANNELS_LAST: tl.constexpr,
    ALIGN_S: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For each sample, `chunk` of positions and channel: x's mean, and the sum of squared differences from it."""
    S, C = positions * ALIGN_S, channels * ALIGN_C
    n, part, block = place(chunks, channel_blocks, False)
    local, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    c = block * BLOCK_C + local
    first = part.to(tl.int64) * chunk
    size = tl.minimum(S - first, chunk).to(tl.int32)
    x_ptr += start_of(n, first, block * BLOCK_C, S, C, CHANNELS_LAST)
    offsets = offsets_of(s, local, S, C, CHANNELS_LAST)
    step = step_of(C, BLOCK_S, CHANNELS_LAST)
    mean, m2 = _moments_of(x_ptr, s, offsets, c < C, size, step, BLOCK_S)
    out = (n.to(tl.int64) * chunks + part) * C + c
    tl.store(chunk_mean_ptr + out, mean, c < C)
    tl.store(chunk_m2_ptr + out, m2, c < C)


@jit
def merge(
    chunk_mean_ptr,
    chunk_m2_ptr,
    add_ptr,
    add_row,
    mean_ptr,
    rstd_ptr,
    positions,
    channels,
    num_groups,
    chunk,
    chunks,
    eps,
    CENTER: tl.constexpr,
    ALIGN_S: tl.constexpr,
    ALIGN_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """mean and rstd of a sample's group from `moments` of its chunks and channels (Chan et al., 1979)."""
    S, C = positions * ALIGN_S, channels * ALIGN_C
    n, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    group_channels = C // num_groups
    first = n.to(tl.int64) * chunks * C + group * group_channels
    chunk_mean_ptr += first
    chunk_m2_ptr += first
    own = n * add_row + group * group_channels
    total = S * 1.0 * group_channels

    origin = 0.0
    if CENTER:
        origin = tl.load(chunk_mean_ptr)
        if add_ptr is not None:
            origin += tl.load(add_ptr + own).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for done in range(0, chunks * group_channels, BLOCK):
        i = done + tl.arange(0, BLOCK)
        part, c = i // group_channels, i % group_channels
        mask = i < chunks * group_channels
        size = tl.minimum(S - part.to(tl.int64) * chunk, chunk).to(tl.float32)
        d = read(chunk_mean_ptr + part * C + c, mask) - origin
        if add_ptr is not None:
            d += read(add_ptr + own + c, mask)
        d = tl.where(mask, d, 0.0)
        sums += d * size
        squares += d * d * size + read(chunk_m2_ptr + part * C + c, mask)
    rest = 0.0
    if CENTER:
        rest = tl.sum(sums, 0) / total
        tl.store(mean_ptr + tl.program_id(0), origin + rest)
    tl.store(rstd_ptr + tl.program_id(0), rstd_of(tl.sum(squares, 0) / total, rest, eps, CENTER))


@jit
def elements(
    x_ptr,
    y_ptr,
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
    """y, from the last tile to the first: `moments` went the other way, and left the end in the L2 cache."""
    S, C = positions * ALIGN_S, channels * ALIGN_C
    n, part, block = place(blocks, channel_blocks, True)
    local, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    c = block * BLOCK_C + local
    first = part.to(tl.int64) * BLOCK_S
    mask = (s < S - first)[:, None] & (c < C)[None, :]
    start = start_of(n, first, block * BLOCK_C, S, C, CHANNELS_LAST)
    offsets = offsets_of(s, local, S, C, CHANNELS_LAST)

    x = read(x_ptr + start + offsets, mask)
    center, rstd = center_and_rstd(n, c, c < C, C, num_groups, mean_ptr, rstd_ptr, add_ptr, add_row, CENTER)
    gain, offset = gain_and_offset(n, c, c < C, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_row, shift_row)
    w = (x - center[None, :]) * (gain * rstd)[None, :] + offset[None, :]
    tl.store(y_ptr + start + offsets, activate(w, SILU), mask)


@jit
def _moments_of(x_ptr, s, offsets, inside, size, step, BLOCK_S: tl.constexpr):
    """Mean, and sum of squared differences from it, of each of a tile's channels over `size` positions."""
    # All is counted from the first tile's mean, which is near enough to the whole's to cost no digits.
    mask = (s < size)[:, None] & inside[None, :]
    x = read(x_ptr + offsets, mask)
    mean = tl.sum(x, 0) / tl.minimum(size, BLOCK_S)
    sums = tl.where(mask, x - mean[None, :], 0.0)
    squares = sums * sums
    for done in range(BLOCK_S, size, BLOCK_S):
        x_ptr += step
        mask = (s < size - done)[:, None] & inside[None, :]
        d = tl.where(mask, read(x_ptr + offsets, mask) - mean[None, :], 0.0)
        sums += d
        squares += d * d
    rest = tl.sum(sums, 0) / size
    return mean + rest, tl.maximum(tl.sum(squares, 0) - rest * rest * size, 0.0)


@jit
def _store_moments(n, c, inside, C, mean, rstd, mean_ptr, rstd_ptr, GROUP: tl.constexpr, CENTER: tl.constexpr):
    first_of_group = inside & (c % GROUP == 0)
    group = n * (C // GROUP) + c // GROUP
    if CENTER:
        tl.store(mean_ptr + group, mean, first_of_group)
    tl.store(rstd_ptr + group, rstd, first_of_group)
