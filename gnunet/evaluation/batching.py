"""How work on numbered things is distributed over processes, and over how many threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def rounds(count: int, size: int, world_size: int) -> Iterator[list[range]]:
    """Ranges of `size` of the numbers 0 to count - 1, one for each process in each round; the last may want some.

    A process without a range in the last round should do work of the same kind all the same and throw it away: the
    others wait for it meanwhile, and in a sharded run they need its rows of the weights.
    """
    for first in range(0, count, world_size * size):
        starts = range(first, min(first + world_size * size, count), size)
        yield [range(start, min(start + size, count)) for start in starts]


def indices_for_rank(indices: range, batch_size: int, rank: int, world: int) -> list[int]:
    """The image indices that `rank` samples: whole batches of consecutive indices, dealt out in turn."""
    return [i for i in indices if i // batch_size % world == rank]


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch's CPU operators in one thread inside; the number of threads is put back after.

    Convolutions, matrix products and factorizations split their sums by the number of threads, and a launch of
    several processes gives each fewer. On a CPU, more processes, not more threads, use more cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
