"""How a tensor is divided among clusters of thread blocks: a function of its shape, memory format and element size.

The batch size is not an input, as in the Triton kernels' tiling: a sample's results are bit-identical in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

from gnunet.ops.planned import Shape

_VECTOR_BYTES = 16  # the widest load
_SECTOR = 32  # the unit in bytes in which memory is read
_ROW_BYTES = 64  # the least that a thread block should read contiguously with channels_last
_MOST_OVERHEAD = 1.15  # the most bytes of the sectors that such a piece touches, relative to its own
_MIN_BLOCK = 4096  # bytes of a block of contiguous groups below which it takes more of them
_PART_BYTES = 32 * 1024
"""The part of a block of groups that a thread block takes of each tensor, as long as a cluster can have more ranks: so
several are on a multiprocessor, and some compute while others wait for memory."""
_VECTORS, _FEW_VECTORS = 16, 8
"""Vectors that a thread takes one after the other, as long as there are more threads: the second number of contiguous
channels, and with channels last where a multiprocessor would have too few threads otherwise."""
_RESIDENT_THREADS = 768  # threads of a multiprocessor below which they are too few
_MIN_THREADS, _MIN_THREADS_OF_ROWS, _MAX_THREADS, _LIMIT_THREADS = 64, 128, 512, 1024
"""Threads of a thread block; the second with channels_last, if a thread then has _LEAST_VECTORS."""
_LEAST_VECTORS = 4
_REGISTERS, _FORWARD_REGISTERS, _BACKWARD_REGISTERS = 65536, 60, 64
"""Registers of a multiprocessor, and about the fewest that a thread is limited to."""
_TABLE_REGISTERS = 48
_RESIDENT, _RESIDENT_OF_CLUSTERS = 32, 8
"""The most thread blocks of a multiprocessor."""
PORTABLE_RANKS = 8
"""The most thread blocks of a cluster that every GPU with clusters runs; larger ones are for what only they hold."""


class Gpu(NamedTuple):
    """The properties of a GPU that the tiling depends on."""

    shared_bytes: int  # the most shared memory of a thread block
    max_ranks: int  # the most thread blocks of a cluster: 8 on every GPU with clusters, 16 on the large ones, else 1


H100 = Gpu(227 * 1024, 16)


@dataclass(frozen=True)
class Tiling:
    """The tiling of one direction. group_norm_silu.cu has the same names in capitals."""

    width: int  # channels of a block of groups
    vector: int  # elements of a load
    lanes: int  # threads across the channels of a block
    rows: int  # threads across its positions
    fold: int  # rows of the same channels in a warp, if these are all that it has, a power of two; else 1
    threads: int
    ranks: int
    steps: int  # vectors of a tensor that a thread processes
    held: tuple[int, ...]  # how many of them stay in shared memory, for each tensor that is read
    thread_sums: int  # numbers that the threads of a block exchange through shared memory
    shared_bytes: int

    @property
    def fits(self) -> bool:
        """Whether everything is read once."""
        return self.share_held == 1

    @property
    def share_held(self) -> float:
        """The share of what is read that stays in shared memory."""
        return sum(self.held) / (len(self.held) * self.steps)

    def resident(self, gpu: Gpu) -> int:
        """Thread blocks that a multiprocessor has room for in shared memory."""
        most = _RESIDENT_OF_CLUSTERS if self.ranks > 1 else _RESIDENT
        return max(1, min(most, (gpu.shared_bytes + 1024) // (self.shared_bytes + 1024)))

    def limited(self, gpu: Gpu, has_tables: bool) -> int:
        """`resident`, limited also by the registers that threads need, more where tables are given."""
        registers = _BACKWARD_REGISTERS if len(self.held) > 1 else _FORWARD_REGISTERS
        registers += _TABLE_REGISTERS if has_tables else 0
        return max(1, min(self.resident(gpu), _REGISTERS // (self.threads * registers)))


def choose_tiling(shape: Shape, gpu: Gpu, tensors: int, channel_sums: int) -> Tiling | None:
    """The tiling for kernels that read `tensors` tensors and add up `channel_sums` quantities for each channel, besides
    two for each group; None where a group has more channels than a thread block can process."""
    tilings = (_tiling(shape, width, vector, gpu, tensors, channel_sums) for width, vector in _blocks(shape))
    found = [tiling for tiling in tilings if tiling is not None]
    # What holds most, if possible by clusters of a size that every GPU has; of equal ones the first.
    return max(
        found, key=lambda tiling: (tiling.share_held, tiling.fits and tiling.ranks <= PORTABLE_RANKS), default=None
    )


def _blocks(shape: Shape) -> Iterator[tuple[int, int]]:
    """Channels and vectors of blocks of groups, the better ones first."""
    widths = [g * shape.group_channels for g in range(1, shape.num_groups + 1) if shape.num_groups % g == 0]
    most = _VECTOR_BYTES // shape.itemsize
    if not shape.channels_last:
        vector = gcd(shape.positions, most)
        wide = (w for w in widths if w * shape.positions * shape.itemsize >= _MIN_BLOCK)
        yield from ((width, vector) for width in (next(wide, widths[-1]), widths[0]))
        return

    def quality(width: int) -> tuple[bool, ...]:
        row, vector = width * shape.itemsize, gcd(shape.channels, width, most)
        is_whole = width == shape.channels
        is_small, is_short = row * shape.positions < _MIN_BLOCK, row < _ROW_BYTES
        is_unaligned = _sector_overhead(width, shape) > _MOST_OVERHEAD
        return is_small and not is_whole, is_unaligned, vector < most, is_short and not is_whole

    least = min(_SECTOR, shape.channels * shape.itemsize)
    for width in sorted(widths, key=quality):  # of equal ones the narrowest
        if width * shape.itemsize >= least:
            yield width, gcd(shape.channels, width, most)


def _sector_overhead(width: int, shape: Shape) -> float:
    """With channels_last, the bytes of the sectors that rows of blocks of this width touch, relative to their own."""
    row, whole = width * shape.itemsize, shape.channels * shape.itemsize
    touched = sum((start + row - 1) // _SECTOR - start // _SECTOR + 1 for start in range(0, whole, row))
    return touched * _SECTOR / whole


def _tiling(shape: Shape, width: int, vector: int, gpu: Gpu, tensors: int, channel_sums: int) -> Tiling | None:
    channels = vector if shape.channels_last else 1  # of a thread
    lanes, all_steps = width // channels, shape.positions if shape.channels_last else shape.positions // vector
    if lanes > _LIMIT_THREADS or shape.positions >= 2**31:
        return None
    vector_bytes = vector * shape.itemsize
    groups, span = width // shape.group_channels, _span(channels, shape.group_channels)

    def by(ranks: int) -> Tiling | None:
        tiling = of(ranks, _VECTORS) if shape.channels_last else None
        if tiling is not None and tiling.threads * tiling.resident(gpu) >= _RESIDENT_THREADS:
            return tiling
        return of(ranks, _FEW_VECTORS)

    def of(ranks: int, vectors: int) -> Tiling | None:
        of_rank = -(-all_steps // ranks)
        least = min(_MIN_THREADS_OF_ROWS, lanes * of_rank // _LEAST_VECTORS) if shape.channels_last else 0
        wanted = min(_MAX_THREADS, max(_MIN_THREADS, least, -(-lanes * of_rank // vectors)))
        rows, fold = _rows(shape.channels_last, lanes, of_rank, wanted)
        threads, steps = -(-lanes * rows // 32) * 32, -(-of_rank // rows)
        if channel_sums:
            thread_sums = (2 * span * lanes + channel_sums * width) * (rows // fold)
        else:
            thread_sums = 4 * span * lanes * rows
        scratch = 4 * (thread_sums + (2 * ranks + 3) * groups + channel_sums * ranks * width)
        room = (gpu.shared_bytes - scratch) // (threads * vector_bytes)
        if room < 0:
            return None
        held = (min(steps, room), min(steps, room - min(steps, room)))[:tensors]
        shared = sum(held) * threads * vector_bytes + scratch
        return Tiling(width, vector, lanes, rows, fold, threads, ranks, steps, held, thread_sums, shared)

    ranks = 1
    while ranks < min(PORTABLE_RANKS, gpu.max_ranks) and lanes * all_steps * vector_bytes > ranks * _PART_BYTES:
        ranks *= 2
    candidates = [by(ranks), *([by(gpu.max_ranks)] if ranks < gpu.max_ranks else [])]
    found = [tiling for tiling in candidates if tiling is not None]
    return max(found, key=lambda tiling: tiling.share_held, default=None)  # of equal ones the smaller cluster


def _rows(channels_last: bool, lanes: int, steps: int, wanted: int) -> tuple[int, int]:
    """Rows of a thread block of about `wanted` threads, and how many of them a warp adds up."""
    if not channels_last:
        rows = max(1, min(_power_of_two(steps), _power_of_two(wanted // lanes + 1) // 2))
        while rows * lanes > _LIMIT_THREADS:
            rows //= 2
        return rows, min(rows, 32)
    whole = 32 // gcd(lanes, 32)  # rows that fill warps
    rows = max(1, round(wanted / lanes))
    if steps < rows:
        rows = max(1, steps)
    if whole <= rows:
        rows = rows // whole * whole
    elif whole * lanes <= wanted:
        rows = whole
    elif rows * lanes > 32:
        rows = max(1, round(rows * lanes / 32) * 32 // lanes)  # that nearly fill warps
    rows = min(rows, _LIMIT_THREADS // lanes)
    is_folded = lanes < 32 and 32 % lanes == 0 and lanes * rows % 32 == 0
    return rows, 32 // lanes if is_folded else 1


def _span(channels: int, group: int) -> int:
    """The most groups that adjacent channels, an aligned vector of them, are of."""
    if channels % group == 0:
        return channels // group
    return 1 if group % channels == 0 else (channels + group - 2) // group + 1


def _power_of_two(number: int) -> int:
    """The least power of two >= number."""
    return 1 << (max(1, number) - 1).bit_length()
