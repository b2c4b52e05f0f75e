"""How work on numbered items is divided among ranks, and how many threads do it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gnunet.processes import Processes


def batches_by_rank(count: int, batch_size: int, world_size: int) -> Iterator[list[range]]:
    """Batches of the indices 0..count-1, one per rank in each round; the last round may have fewer.

    A rank without a batch in the last round should do equal work and discard it: the others wait for it anyway, and
    in a sharded model they need its part of the weights.
    """
    for first in range(0, count, world_size * batch_size):
        starts = range(first, min(first + world_size * batch_size, count), batch_size)
        yield [range(start, min(start + batch_size, count)) for start in starts]


def gather_padded(rows: Tensor, size: int, processes: Processes) -> Tensor:
    """Every rank's rows (n, ...), padded with zeros to (world_size, size, ...), on every rank."""
    padded = rows.new_zeros(size, *rows.shape[1:])
    padded[: len(rows)] = rows
    return processes.gather(padded).view(processes.world_size, *padded.shape)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch's CPU operators in one thread.

    Convolutions, matrix products and factorizations split their sums by the number of threads, which is lower in a
    launch of several processes. On a CPU, use more processes instead of more threads to use more cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
