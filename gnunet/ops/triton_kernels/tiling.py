"""How a tensor is tiled: a function of its shape, memory format and element size.

The batch size is not an input, so that a sample is reduced in the same order, with bit-identical results, in any
batch; it only decides who computes what.

- In a single pass, one program holds a block of whole groups in its registers and reads it once.
- A larger block is reduced in splits, by a program for each, whose partial results a second kernel combines.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from triton import cdiv, next_power_of_2

from gnunet.ops.planned import Shape

_SINGLE_PASS = {"forward": 16384, "backward": 16384, "backward of tables": 8192}
"""Elements of a block of groups that fit the registers of one program, with 16 warps."""
_TILE = {"forward": 4096, "backward": 2048, "backward of tables": 2048}
"""Elements that a program of a split reduction reduces at a time; backward has two tensors and more sums."""
_SPLITS = 256  # splits of a sample that fill a GPU with two programs a multiprocessor at batch size 1
_MIN_TILES, _MAX_TILES = 4, 16
"""Tiles in a split: more amortize the reduction at its end, fewer spread a small sample over more programs."""
_MAX_PARTIALS = 4096  # partial results of the groups of a block, which every program of the second kernel combines
_ROW_BYTES = 64  # the least that a program should read contiguously with channels_last: two sectors of memory
_MIN_ROW = 512  # positions, of contiguous channels, that a tile has at least
_MAX_ROW = 128
"""Channels of a block of groups that no cache holds; with more, each program would combine splits of more groups."""
_SECTOR_BYTES = 32  # the unit in which memory is read
_MIN_BLOCK = 2048  # elements below which a block of groups is too little work for a program, if it can have more groups
_CACHED_BYTES = 128 * 1024  # size of a block of groups that a cache may still hold when it is read again
_SPLIT_WARPS = 8
_THREAD_ELEMENTS = 16
_MAX_WARPS = 16


def align_s(shape: Shape) -> int:
    """A power of two, at most 16, that divides the number of positions, from which Triton infers how wide it can load;
    1 where the number needs 64 bits, which the product with it would not have."""
    return gcd(shape.positions, 16) if shape.positions < 2**31 else 1


@dataclass(frozen=True)
class Tiling:
    """Tiles of block_s positions by block_c columns, powers of two. A block of groups has `groups` whole groups, a
    power of two, each in its own columns; a sample has `group_blocks` of them.

    In a single pass, one tile covers a block of groups. Otherwise the block is reduced in `num_splits` splits: each of
    `channel_splits` parts of its channels, which are more than one where a tile has fewer channels than a group, times
    `position_splits` parts of split_size positions.
    """

    block_s: int
    block_c: int
    groups: int
    group_blocks: int
    num_warps: int
    split_size: int | None = None  # None for a single pass
    channel_splits: int = 1
    position_splits: int = 1

    @property
    def num_splits(self) -> int:
        return self.channel_splits * self.position_splits


def choose_tiling(shape: Shape, direction: str) -> Tiling:
    """For the kernels of "forward", "backward", or "backward of tables", which takes additional registers."""
    block_s = next_power_of_2(max(1, shape.positions))
    if (found := _group_block(shape, block_s, _SINGLE_PASS[direction])) is not None:
        groups, block_c = found
        return Tiling(block_s, block_c, groups, cdiv(shape.num_groups, groups), _num_warps(block_s * block_c))
    return _split_reduction(shape, _TILE[direction])


def _group_block(shape: Shape, block_s: int, limit: int, row_bytes: int = _ROW_BYTES) -> tuple[int, int] | None:
    """How many groups, a power of two, and columns a program takes within `limit` elements; None if none."""
    columns = next_power_of_2(shape.group_channels)
    candidates = []
    for groups in (1 << i for i in range((shape.num_groups - 1).bit_length() + 1)):
        if block_s * groups * columns > limit:
            break
        row = groups * shape.group_channels * shape.itemsize
        is_whole_row = not shape.channels_last or groups >= shape.num_groups  # then rows may be of any length
        if is_whole_row or row >= row_bytes:
            is_aligned = is_whole_row or row % _SECTOR_BYTES == 0
            filled = shape.num_groups / (cdiv(shape.num_groups, groups) * groups)
            # Aligned rows first, then few missing groups, then many programs, unless they are too small.
            size = min(_MIN_BLOCK, block_s * groups * columns)
            candidates.append((is_aligned, filled > 0.7, size, -groups))
    if not candidates:
        return None
    groups = -max(candidates)[-1]
    return groups, groups * columns


def _split_reduction(shape: Shape, tile: int) -> Tiling:
    width = shape.group_channels
    if shape.channels_last:
        found = _group_block(shape, next_power_of_2(shape.positions), _CACHED_BYTES // shape.itemsize)
        found = found or _group_block(shape, _MIN_BLOCK, _MIN_BLOCK * _MAX_ROW, 2 * _ROW_BYTES)
        groups, block_c = found or (1, _narrower(width, min(tile, 4 * _MAX_ROW)))
        block_s = max(1, min(tile // block_c, next_power_of_2(shape.positions)))
        if found is None and block_s * block_c < tile:  # few positions
            block_c = _narrower(width, tile // block_s)
    else:
        # Rows of positions long enough to read, and short enough for a split to have several tiles.
        groups, block_s = 1, min(tile, max(_MIN_ROW, next_power_of_2(cdiv(shape.positions, 2))))
        block_s = min(block_s, next_power_of_2(shape.positions))
        block_c = _narrower(width, tile // block_s)
    channel_splits = cdiv(groups * width, block_c)
    group_blocks = cdiv(shape.num_groups, groups)
    tiles = cdiv(shape.positions, block_s)  # of a part of the channels
    split = max(_MIN_TILES, min(_MAX_TILES, group_blocks * channel_splits * tiles // _SPLITS))
    most = max(1, _MAX_PARTIALS // (groups * channel_splits))
    split = next_power_of_2(max(split, cdiv(tiles, most)))
    return Tiling(
        block_s,
        block_c,
        groups,
        group_blocks,
        _SPLIT_WARPS,
        split_size=split * block_s,
        channel_splits=channel_splits,
        position_splits=cdiv(shape.positions, split * block_s),
    )


def _narrower(width: int, limit: int) -> int:
    """The largest power of two, at most `limit`, in parts of which `width` channels leave few lanes idle."""
    sizes = [1 << i for i in range(limit.bit_length()) if 1 << i < 2 * width]
    return max(sizes, key=lambda size: (cdiv(width, size) * size <= 1.25 * width, size))


def _num_warps(elements: int) -> int:
    return min(_MAX_WARPS, max(1, elements // (32 * _THREAD_ELEMENTS)))
