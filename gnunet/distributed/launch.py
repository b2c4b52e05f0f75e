"""How this process was launched, as its environment says, and several processes on CPUs without a launcher.

`accelerate launch` starts the processes of several GPUs and of FSDP, torchrun those of any launch, also on CPUs:
`torchrun --nproc_per_node N train.py ...`.
"""

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

from gnunet.errors import ConfigError

SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables by which torchrun or MPI tells a process how many it has started."""
RANK_VARIABLES = ("LOCAL_RANK", *SIZE_VARIABLES)
"""Environment variables by which torchrun or MPI tells a process that it is one of several."""
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")
"""Environment variables that torchrun and `accelerate launch` set for every process that they start."""
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>: sets the signal that a process receives when its parent dies
SHUTDOWN_SECONDS = 300  # time that processes which were signalled have for their checkpoint before they are killed


def is_distributed_launch() -> bool:
    """Whether a launcher (accelerate launch, torchrun) has started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def check_launch() -> None:
    """Raise ConfigError if `accelerate launch` was to start several processes on CPUs.

    It starts only one and does not tell it so (accelerate 1.15, huggingface/accelerate#2741).
    """
    import torch

    # It sets MASTER_PORT only for several processes.
    is_one_of_several = "ACCELERATE_DYNAMO_BACKEND" in os.environ and "MASTER_PORT" in os.environ
    on_cpus = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
    if is_one_of_several and on_cpus and not any(name in os.environ for name in RANK_VARIABLES):
        raise ConfigError(
            "accelerate launch: given several processes on CPUs (MASTER_PORT is set), of which it starts only one; "
            f"valid: torchrun --nproc_per_node N {' '.join(_program())} ..., or for one process no MASTER_PORT"
        )


def die_with_parent() -> None:
    """Receive SIGTERM when the launcher that started this process dies (Linux); without a launcher do nothing.

    To be called first by a program. Otherwise ranks whose launcher was killed, and the one process of `accelerate
    launch`, which passes no signals on, would wait for the others or train on without it.
    """
    if sys.platform != "linux" or not any(name in os.environ for name in LAUNCHER_VARIABLES):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # It died before prctl: just now, or already when this process started, so that init is the parent. The launcher
    # of a container may be process 1 itself.
    if os.getppid() != launcher or (launcher == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes()):
        signal.raise_signal(signal.SIGTERM)


def run_as_processes(count: int) -> int | None:
    """Run this program as `count` processes with one thread each, unless a launcher has started it.

    Signals are passed on to them. Returns 128 + signal number after a signal, else the status of the first process that
    failed, or 0; None if this process is to do the work itself.
    """
    if count == 1 or any(name in RANK_VARIABLES or name.startswith("ACCELERATE_") for name in os.environ):
        return None
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))  # read by torch 2.13
    for module in ("agent.server.api", "multiprocessing.api"):  # which warn of every signal
        logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.ERROR)
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id="gnunet", max_restarts=0,
    )  # fmt: skip
    try:
        elastic_launch(launch, sys.executable)(*_program(), *sys.argv[1:])
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


def _program() -> list[str]:
    """This program, as Python's command line names it."""
    spec = sys.modules["__main__"].__spec__
    return ["-m", "gnunet"] if spec is not None and spec.name == "gnunet.__main__" else sys.argv[:1]
