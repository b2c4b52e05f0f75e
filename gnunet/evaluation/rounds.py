"""How work on numbered things is dealt out to processes that stay in step."""

from collections.abc import Iterator


def rounds(count: int, size: int, world_size: int) -> Iterator[list[range]]:
    """Ranges of `size` of the numbers 0 to count - 1, one for each process in each round; the last may want some.

    A process without a range in the last round should do work of the same kind all the same and throw it away: the
    others wait for it meanwhile, and in a sharded run they need its rows of the weights.
    """
    for first in range(0, count, world_size * size):
        starts = range(first, min(first + world_size * size, count), size)
        yield [range(start, min(start + size, count)) for start in starts]
