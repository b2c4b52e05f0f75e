"""The processes of a launch, how work on numbered items is divided among them, and how many threads do it."""

from collections.abc import Callable, Iterator, Sequence
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

    def map_batches(
        self, function: Callable[[range], Sequence[Tensor]], count: int, batch_size: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Iterator[tuple[range, list[Tensor]]]:  # fmt: skip
        """Call `function` for batches of the indices 0..count-1, which ranks take in turn; all of them must call this.

        Yields each batch and the tensors that were returned for it, (len(batch), ...), in order, on every rank, after
        each round. `progress` is called after each round with the number of indices done so far.
        """
        batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        for first in range(0, len(batches), self.world_size):
            of_round = batches[first : first + self.world_size]
            # A rank without a batch does that of another: all wait anyway, and a sharded model needs its weights.
            tensors = function(of_round[self.rank % len(of_round)])
            gathered = [self._gather_padded(tensor, batch_size) for tensor in tensors]
            for rank, batch in enumerate(of_round):
                yield batch, [rows[rank, : len(batch)] for rows in gathered]
            progress(of_round[-1].stop)

    def _gather_padded(self, rows: Tensor, size: int) -> Tensor:
        """Every rank's rows (n, ...), padded with zeros to (world_size, size, ...), on every rank."""
        padded = rows.new_zeros(size, *rows.shape[1:])
        padded[: len(rows)] = rows
        return self.gather(padded).view(self.world_size, *padded.shape)


SINGLE_PROCESS = Processes()


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
