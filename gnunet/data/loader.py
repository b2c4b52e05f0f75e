"""The training loader: which example indices a rank's micro-batches hold, and processes that draw them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler, get_worker_info

from gnunet.data.dataset import TrainingDataset
from gnunet.errors import ConfigError


class MicroBatchSampler(Sampler[list[int]]):
    """The example indices of one rank's micro-batches, in order.

    The global batch that starts at example s holds s .. s + batch_size - 1; micro-batch m of rank r holds
    s + (m * world_size + r) * micro_batch_size + j. So what a step trains on does not depend on how it is
    shared out.

    Args:
        first: example at which training starts, a multiple of batch_size.
        last: example at which it ends; the last batch is the first that reaches it.
        batch_size: examples in one step over all ranks and micro-batches.
        micro_batch_size: examples in one forward pass on one rank.
        rank, world_size: which of how many processes this is.

    Raises:
        ConfigError: sizes that do not divide.
    """

    def __init__(self, first: int, last: int, *, batch_size: int, micro_batch_size: int, rank: int, world_size: int):
        if batch_size % (unit := micro_batch_size * world_size):
            raise ConfigError(
                f"train.batch_size is {batch_size}, which does not split into micro-batches of "
                f"{micro_batch_size} on {world_size} processes; a multiple of {unit} does"
            )
        if first % batch_size:
            raise ConfigError(
                f"training cannot start at image {first}, inside a batch of train.batch_size {batch_size}"
            )
        self.steps = range(first, last, batch_size)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.world_size * self.micro_batch_size
        for step in self.steps:
            for start in range(step + self.rank * self.micro_batch_size, step + self.batch_size, stride):
                yield list(range(start, start + self.micro_batch_size))

    def __len__(self) -> int:
        return len(self.steps) * (self.batch_size // (self.world_size * self.micro_batch_size))


def training_loader(
    examples: TrainingDataset,
    *,
    first: int,
    last: int,
    batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader of one rank's micro-batches, each as `TrainingDataset.__getitems__` gives it.

    Its bytes do not depend on num_workers. It keeps no state: to resume, make another with a later `first`.
    Arguments as `MicroBatchSampler`'s; raises what that raises.
    """
    return DataLoader(
        examples,
        batch_sampler=MicroBatchSampler(
            first,
            last,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
        ),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        prefetch_factor=4 if num_workers else None,
    )


class SharedMemoryBatch:
    """A batch that leaves its process as one block of shared memory and arrives as a plain dict of tensors.

    torch hands over each tensor's memory through a connection of its own, which for the few images of a
    micro-batch takes longer than to draw them: one block instead of five doubles the loader's speed.
    """

    def __init__(self, batch: dict[str, torch.Tensor]):
        self.batch = batch

    def __reduce__(self) -> tuple:
        layout, parts = [], []
        # Widest types first, so that each part begins at a multiple of its element size.
        for name, tensor in sorted(self.batch.items(), key=lambda item: -item[1].element_size()):
            flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
            layout.append((name, tensor.dtype, tensor.shape, tensor.stride(), flat.numel()))
            parts.append(flat)
        return _open_parcel, (torch.cat(parts), layout)


def _open_parcel(block: torch.Tensor, layout: list[tuple]) -> dict[str, torch.Tensor]:
    parts = block.split([size for *_, size in layout])
    return {
        name: part.view(dtype).as_strided(shape, stride, part.storage_offset() // dtype.itemsize)
        for (name, dtype, shape, stride, _), part in zip(layout, parts, strict=True)
    }


def _collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | SharedMemoryBatch:
    """Examples come collated already; in a worker they are wrapped for the way."""
    return SharedMemoryBatch(batch) if get_worker_info() else batch


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    _ignore_signals_in_worker()


def _ignore_signals_in_worker() -> None:
    """Survive SIGINT and SIGTERM sent to the whole process group, so that the trainer can end in good order.

    SIGTERM from the parent itself still ends the process: that is how Python stops its children at exit, and
    it would wait for ever for one that ignores it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):  # macOS and Windows lack it
        return

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()
