"""The processes of a launch, how work on numbered items is divided among them, and how many threads do it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Processes:
    """This process's rank, the number of processes, and how they exchange tensors; by default a single process."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Concatenates every rank's tensor along the first dimension, on every rank. All ranks must call it."""

    @classmethod
    def of(cls, accelerator: "Accelerator") -> "Processes":
        """Those of an Accelerator."""
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.gather)

    def gather_padded(self, rows: Tensor, size: int) -> Tensor:
        """Every rank's rows (n, ...), padded with zeros to (world_size, size, ...), on every rank."""
        padded = rows.new_zeros(size, *rows.shape[1:])
        padded[: len(rows)] = rows
        return self.gather(padded).view(self.world_size, *padded.shape)


SINGLE_PROCESS = Processes()


def batches_by_rank(count: int, batch_size: int, world_size: int) -> Iterator[list[range]]:
    """Batches of the indices 0..count-1, one per rank in each round; the last round may have fewer.

    A rank without a batch in the last round should do equal work and discard it: the others wait for it anyway, and
    in a sharded model they need its part of the weights.
    """
    for first in range(0, count, world_size * batch_size):
        starts = range(first, min(first + world_size * batch_size, count), batch_size)
        yield [range(start, min(start + batch_size, count)) for start in starts]


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
