"""The Accelerator of a run or of a program: device, precision, trackers, and what its processes do together."""

import ctypes
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
    str_to_bool,
)
from safetensors import SafetensorError

from gnunet.config import Config
from gnunet.distributed import fsdp
from gnunet.distributed.launch import SIZE_VARIABLES, is_distributed_launch
from gnunet.errors import ConfigError, GnunetError

Result = TypeVar("Result")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class _StderrHandler(logging.StreamHandler):
    """Writes to what sys.stderr is at the time: a live view of progress replaces it, to print above its bar."""

    stream = property(lambda self: sys.stderr, lambda self, stream: None)  # type: ignore[assignment]


def keep_freed_memory() -> None:
    """On a CPU, make glibc keep memory that is freed.

    Otherwise it may return activations to the system in every step, and map them again page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or torch.accelerator.is_available():
        return
    # Older glibc accepts at most 32 MiB; and once one threshold is set, it no longer raises the other by itself.
    if mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25):
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def make_accelerator(config: Config) -> Accelerator:
    """The Accelerator of a run; sets torch's deterministic mode as train.deterministic says."""
    train = config.train
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(train.deterministic)
    torch.backends.cudnn.benchmark = not train.deterministic
    fsdp.check_options(config)
    accelerator = open_accelerator(
        train.mixed_precision,
        log_with=train.trackers or None,
        project_config=ProjectConfiguration(project_dir=config.run_dir, logging_dir=config.run_dir),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=train.timeout)),
        ],
    )
    if missing := sorted(set(train.trackers) - {str(tracker) for tracker in accelerator.log_with}):
        raise ConfigError(f"train.trackers: {', '.join(missing)} is not installed; pip install it, or omit it")
    return accelerator


def open_accelerator(mixed_precision: str, *, cpu: bool = False, **options: Any) -> Accelerator:
    """An Accelerator on a GPU, or on the CPU if there is none or `cpu` is true.

    Raises:
        ConfigError: a precision or an option that Accelerate rejects, an unsupported kind of launch, or one of several
            processes that Accelerate takes for a single one, as MPI's on GPUs.
    """
    # Without cpu=True, launched CPU processes would not join each other.
    cpu = cpu or not torch.accelerator.is_available()
    if cpu and mixed_precision == "fp16":
        raise ConfigError("train.mixed_precision: given fp16 on a CPU; valid: no, bf16")
    if any(str_to_bool(os.environ.get(f"ACCELERATE_USE_{name}", "false")) for name in ("DEEPSPEED", "MEGATRON_LM")):
        raise ConfigError(
            "accelerate launch: DeepSpeed and Megatron-LM are not supported; valid: one process, DDP or FSDP2 "
            "(configs/accelerate/fsdp2.yaml; zero2.yaml shards the same state as ZeRO-2)"
        )
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision, **options)
    except ValueError as error:
        raise ConfigError(f"train.mixed_precision, train.trackers: rejected by Accelerate: {error}") from None
    name = next((name for name in SIZE_VARIABLES if name in os.environ), None)
    if name is not None and os.environ[name] != str(accelerator.num_processes):
        raise ConfigError(
            f"launched as one of {os.environ[name]} processes ({name}) that have not joined each other; valid: "
            f"accelerate launch or torchrun, which set LOCAL_RANK, or for a process by itself no {name}"
        )
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(message)s", handlers=[_StderrHandler()])
    logging.getLogger("gnunet").setLevel(level)
    return accelerator


@contextmanager
def fresh_accelerate_state() -> Iterator[None]:
    """Start without Accelerate's process-wide state, and restore it at the end; for use as a decorator.

    The state includes the precision and the device. Without this, one process could not train and sample with several
    of them. In a launch do nothing: there the state also describes the process group, which the ranks have in common.
    """
    if is_distributed_launch():
        yield
        return
    states = [each._shared_state for each in (PartialState, AcceleratorState, GradientState)]
    earlier = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, values in zip(states, earlier, strict=True):
            state.clear()
            state.update(values)


def run_on_all_ranks(accelerator: Accelerator, function: Callable[[], Result]) -> list[Result]:
    """Call `function` on every rank; returns each rank's result, in the order of ranks, on every rank.

    Raises:
        GnunetError, OSError: on every rank, its own error or that of the first rank that failed; a SafetensorError as
            OSError. A DivergenceError cannot be sent.
    """
    result = own_error = None
    try:
        result = function()
    except SafetensorError as error:  # cannot be pickled, and is how the library reports errors of the system
        own_error = OSError(errno.EIO, str(error))
    except (GnunetError, OSError) as error:
        own_error = error
    gathered = gather_object([(result, own_error)])
    for _, error in gathered:
        if error is not None:
            raise own_error or error  # its own has a traceback
    return [result for result, _ in gathered]


def run_on_main_rank(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Call `function` on the main rank, while the others wait; its result or its error is every rank's."""
    return run_on_all_ranks(accelerator, lambda: function() if accelerator.is_main_process else None)[0]


def close(accelerator: Accelerator) -> None:
    """End trackers and the process group, once only the accelerator refers to a network that it has prepared.

    If DDP held the last reference to the process group, it would wait for the group's threads while holding the GIL,
    which they may need to end (seen in torch 2.13, in about one of ten runs).
    """
    accelerator.free_memory()
    accelerator.end_training()
