"""Several runs after one another in one process, alone or as one of several that a launcher started."""

import functools
import itertools
import os

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

_NUMBERS = itertools.count()


def launched_together() -> bool:
    """Whether a launcher (accelerate launch, torchrun) has started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def fresh_start() -> None:
    """Make the next run of this process as if it were the first: forget what the one before has left in Accelerate
    and in torch, and join the other processes of the launch anew, whose group ends with a run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.use_deterministic_algorithms(False)
    if dist.is_initialized():
        dist.destroy_process_group()
    if launched_together():
        store, rank, world_size = _meeting_point()
        on_cpus = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available()
        # Under a name of its own, since the store remembers the addresses of earlier groups.
        store = dist.PrefixStore(f"run-{next(_NUMBERS)}", store)
        dist.init_process_group("gloo" if on_cpus else "nccl", store=store, rank=rank, world_size=world_size)


@functools.cache
def _meeting_point() -> tuple[dist.Store, int, int]:
    """Where the processes of a launch find each other, the rank of this one and their number."""
    return next(iter(dist.rendezvous("env://")))
