"""How a tensor is cut up: a function of its shape, layout and element size, and never of the batch.

A sample is cut in the same way in every batch, so its bits are the same in every batch. What fits goes where:
- `Tile`: a bundle of whole groups in the registers of one program; read once.
- `Loop`: a bundle that one program reads twice, the second time from its caches.
- `Chunks`: larger groups, in many programs: sums of chunks, their merging, then every element.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

_TILE = {"forward": 16384, "backward": 8192}  # elements; with 16 warps 32 a thread, or 16 of each of two tensors
_LOOP_BYTES = 128 * 1024  # of x: the bundles that all multiprocessors work on at a time stay in L2
_BLOCK = 4096  # elements of one tile among many of its group
_ROW_BYTES = 64  # the least that a tile in channels_last should read in one piece: two sectors of memory
_VECTOR_BYTES = 16  # what one thread loads at once
_SMALL = 2048  # elements: bundles should not be smaller
_SEGMENTS = 4096  # elements of the table that tells which of a bundle's groups a channel is in
_PROGRAMS = 1024  # that a sample's chunks should give, to fill a GPU at batch size 1
_THREAD = 16  # elements a thread, up to _MAX_WARPS
_MAX_WARPS = 16


@dataclass(frozen=True)
class Shape:
    """What of a tensor decides the cut. channels_last: in memory (N, S, C), else (N, C, S)."""

    positions: int
    channels: int
    num_groups: int
    itemsize: int
    channels_last: bool

    @property
    def group_channels(self) -> int:
        return self.channels // self.num_groups

    @property
    def alignment(self) -> dict[str, int]:
        """The powers of two, up to 16, that divide the sizes: from them Triton knows how wide it can load."""
        return {"ALIGN_S": gcd(self.positions, 16), "ALIGN_C": gcd(self.channels, 16)}


@dataclass(frozen=True)
class _Blocks:
    """Tiles of block_s positions by block_c channels, powers of two."""

    block_s: int
    block_c: int

    @property
    def num_warps(self) -> int:
        return min(_MAX_WARPS, max(1, self.block_s * self.block_c // (32 * _THREAD)))


@dataclass(frozen=True)
class Tile(_Blocks):
    """A program for each of a sample's `bundles` of `groups` groups: a tile covers them."""

    groups: int
    bundles: int


@dataclass(frozen=True)
class Loop(_Blocks):
    """A program for each of a sample's `bundles` of `groups` groups: a tile covers some of the positions."""

    groups: int
    bundles: int


@dataclass(frozen=True)
class Chunks(_Blocks):
    """Sums are of `chunks` times `chunk` positions; a sample has `blocks` by `channel_blocks` tiles."""

    chunk: int
    chunks: int
    blocks: int
    channel_blocks: int


def cut(shape: Shape, direction: str) -> Tile | Loop | Chunks:
    """For the "forward" or the "backward" kernels."""
    block_s = power_of_two(shape.positions)
    tile = _bundle(shape, block_s, _TILE[direction])
    if tile is not None:
        groups, block_c = tile
        return Tile(block_s, block_c, groups, _count(shape.num_groups, groups))
    loop = _bundle(shape, block_s, _LOOP_BYTES // shape.itemsize)
    if loop is not None:
        groups, block_c = loop
        return Loop(min(block_s, max(1, _BLOCK // block_c)), block_c, groups, _count(shape.num_groups, groups))
    return _chunks(shape)


def power_of_two(size: int) -> int:
    """The least power of two >= size."""
    return 1 << max(0, size - 1).bit_length()


def _bundle(shape: Shape, block_s: int, limit: int) -> tuple[int, int] | None:
    """How many groups, and channels as padded, one program should take, within `limit` elements; None if none."""
    found = []
    for groups in range(1, shape.num_groups + 1):
        width = groups * shape.group_channels
        block_c = power_of_two(width)
        if block_s * block_c > limit:
            break
        if groups > 1 and shape.group_channels > 1 and block_c * power_of_two(groups) > _SEGMENTS:
            break
        is_free = not shape.channels_last or groups == shape.num_groups  # of demands on its rows
        is_wide = is_free or width * shape.itemsize >= _ROW_BYTES
        is_aligned = is_free or width * shape.itemsize % _VECTOR_BYTES == 0
        filled = shape.channels / (_count(shape.num_groups, groups) * block_c)
        if is_wide:
            # Aligned rows first, then few idle lanes, then many programs, if they are not too small.
            found.append((is_aligned, filled > 0.7, min(_SMALL, block_s * block_c), -block_c, filled, groups))
    if not found:
        return None
    *_, block_c, _, groups = max(found)
    return groups, -block_c


def _chunks(shape: Shape) -> Chunks:
    if shape.channels_last:
        # The widest of those that leave the fewest channels idle.
        widths = [width for width in (128, 64, 32) if width <= power_of_two(shape.channels)]
        widths = widths or [power_of_two(shape.channels)]
        block_c = min(widths, key=lambda width: _count(shape.channels, width) * width)
        block_s = max(1, _BLOCK // block_c)
    else:
        block_s = min(_BLOCK, power_of_two(shape.positions))
        block_c = min(_BLOCK // block_s, power_of_two(shape.channels))
    blocks, channel_blocks = _count(shape.positions, block_s), _count(shape.channels, block_c)
    chunk = _count(blocks, max(1, _PROGRAMS // channel_blocks)) * block_s
    return Chunks(block_s, block_c, chunk, _count(shape.positions, chunk), blocks, channel_blocks)


def _count(size: int, part: int) -> int:
    """How many parts make the size."""
    return -(-size // part)
