"""The training loader: which examples each rank's micro-batches hold, and the workers that load them."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, get_worker_info

from gnunet.data.dataset import TrainingDataset
from gnunet.errors import ConfigError, TrainingError

log = logging.getLogger(__name__)


class TrainingLoader(DataLoader):
    """A loader of one rank's micro-batches, as `TrainingDataset.__getitems__` returns them.

    `sizes` are the arguments of `MicroBatchSampler`. The batches do not depend on num_workers. The loader keeps no
    state: to resume, make another with a later `first`. Its iterators raise TrainingError if a worker fails.
    """

    def __init__(self, dataset: TrainingDataset, *, num_workers: int = 0, pin_memory: bool = False, **sizes: int):
        super().__init__(
            dataset,
            batch_sampler=MicroBatchSampler(**sizes),
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            worker_init_fn=_ignore_signals_in_worker,
            prefetch_factor=4 if num_workers else None,
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if not self.num_workers:
            yield from super().__iter__()
            return
        try:
            batches = super().__iter__()
        except OSError as error:  # such as no room in /dev/shm for the locks of their queues
            log.warning("data loader workers cannot be started (%s): the training process loads images", error)
            yield from map(self.dataset.__getitems__, self.batch_sampler)
            return
        try:
            yield from batches
        except Exception as error:
            for worker in batches._workers:  # torch waits 5 seconds for each
                worker.terminate()
            with suppress(RuntimeError):  # which torch raises whenever a child ends, until this is done
                batches._shutdown_workers()
            raise worker_failure(error) from error


def worker_failure(error: Exception) -> TrainingError:
    """The error for users of an exception that torch raises for a worker that died or raised one itself."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # A worker's own exception comes with its traceback, which ends with it.
    reason = lines[-1] if "Traceback" in str(error) else lines[0]
    return TrainingError(
        f"a data loader worker failed: {reason.strip().rstrip('.')}. The same command resumes from the newest "
        "checkpoint; data.num_workers 0 loads images in the training process"
    )


class MicroBatchSampler(Sampler[list[int]]):
    """The example indices of one rank's micro-batches, in order.

    The global batch that starts at example s holds s .. s + batch_size - 1; micro-batch m of rank r holds
    s + (m * world_size + r) * micro_batch_size + j. A step therefore trains on the same examples however it is
    distributed.

    Args:
        first: example at which training starts, a multiple of batch_size.
        last: example at which it ends; the last batch is the first that reaches it.
        batch_size: examples in one step over all ranks and micro-batches, a multiple of micro_batch_size * world_size.
        micro_batch_size: examples in one forward pass on one rank.

    Raises:
        ConfigError: batch_size does not divide first.
    """

    def __init__(
        self, *, first: int, last: int, batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ):
        self.stride = micro_batch_size * world_size
        if first % batch_size:
            raise ConfigError(
                f"train.batch_size: {batch_size} given, to resume at image {first}; valid: a divisor of that"
            )
        self.steps = range(first, last, batch_size)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.offset = rank * micro_batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for start in range(step + self.offset, step + self.batch_size, self.stride):
                yield list(range(start, start + self.micro_batch_size))

    def __len__(self) -> int:
        return len(self.steps) * (self.batch_size // self.stride)


class PackedBatch:
    """A batch that leaves a worker as one block of shared memory and arrives as a dict of tensors.

    torch passes each tensor through a separate connection, which for a few images takes longer than loading them:
    one block instead of five doubles the loader's speed. Where /dev/shm has no room for the block it goes through the
    worker's pipe. torch shares tensors where they are pickled, in a thread whose errors never reach the trainer, which
    would wait for the batch indefinitely; so it is shared here.
    """

    def __init__(self, batch: dict[str, torch.Tensor]):
        self.layout, blocks = [], []
        # Widest types first, so that each tensor begins at a multiple of its element size.
        for name, tensor in sorted(batch.items(), key=lambda item: -item[1].element_size()):
            block = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
            self.layout.append((name, tensor.dtype, tensor.shape, tensor.stride(), block.numel()))
            blocks.append(block)
        self.block = torch.cat(blocks)
        try:
            self.block.share_memory_()
        except RuntimeError:  # which leaves the block as it was
            _warn_of_little_shared_memory(len(self.block))

    def __reduce__(self) -> tuple:
        return _unpack, (self.block if self.block.is_shared() else self.block.numpy(), self.layout)


@cache
def _warn_of_little_shared_memory(num_bytes: int) -> None:
    log.warning(
        "/dev/shm has no room for a batch of %.1f MB: batches are copied through pipes, which is slower (with Docker, "
        "--shm-size=1g)",
        num_bytes / 1e6,
    )


def _unpack(block: Any, layout: list[tuple]) -> dict[str, torch.Tensor]:
    block = torch.as_tensor(block)
    blocks = block.split([size for *_, size in layout])
    return {
        name: block.view(dtype).as_strided(shape, stride, block.storage_offset() // dtype.itemsize)
        for (name, dtype, shape, stride, _), block in zip(layout, blocks, strict=True)
    }


def _collate(batch: Any) -> Any:
    # The data set returns collated batches.
    return PackedBatch(batch) if get_worker_info() else batch


def _ignore_signals_in_worker(worker: int) -> None:
    """Ignore signals sent to the process group (Ctrl-C, a closed terminal), so that the trainer can finish its step.

    SIGTERM from the parent itself still ends the worker: that is how Python stops its children at exit, and it
    would wait indefinitely for one that ignores the signal.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):  # macOS and Windows lack it
        return

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()
