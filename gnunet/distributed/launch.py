"""Several processes on CPUs, by `accelerate launch --cpu --num_processes N` or without a launcher.

Accelerate leaves several CPU processes to MPI and, where none is used, silently starts one (seen in 1.15). A
program that calls `spawn_cpu_processes` first becomes the N processes it was asked to be.
"""

import ctypes
import logging
import os
import signal
import sys

import psutil
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gnunet.errors import ConfigError

JOINED = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables of a process that torchrun or MPI started."""
REFUSAL = (
    "accelerate launch: DeepSpeed and Megatron-LM are not supported; valid: one process, DDP or FSDP2 "
    "(configs/accelerate/fsdp2.yaml; zero2.yaml splits what ZeRO-2 does)"
)
PR_SET_PDEATHSIG = 1
"""From <sys/prctl.h>: the signal that a process gets when its parent dies."""
SECONDS_TO_STOP = 300
"""How long processes that were signalled have to write their checkpoint before they are killed."""


def spawn_cpu_processes() -> None:
    """Start this program as several processes where `accelerate launch --cpu` asked for them; else do nothing.

    The process that has started them ends by SystemExit. Whatever the launch, see `die_with_parent`.
    """
    launcher = psutil.Process().parent()
    die_with_parent(launcher)
    lone = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    if not lone or any(name in os.environ for name in JOINED):
        return
    processes, environment = asked_for(launcher)
    if processes > 1:
        os.environ.update(environment)
        raise SystemExit(start_processes(processes))


def run_as_processes(count: int) -> int | None:
    """Run this program as `count` processes of one thread each, unless a launcher has decided how many there are.

    Returns:
        The exit status; None where this process is to do the work itself.
    """
    if count == 1 or any(name in JOINED or name.startswith("ACCELERATE_") for name in os.environ):
        return None
    return start_processes(count)


def start_processes(count: int) -> int:
    """Run this program as `count` processes, of one thread each unless OMP_NUM_THREADS says otherwise.

    SIGINT and SIGTERM are passed on to them.

    Returns:
        128 + signal number after a signal, else the status of the first process that failed, or 0.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_STOP))  # torch 2.13's name for it
    for part in ("agent.server.api", "multiprocessing.api"):  # they warn of signals, which are no news
        logging.getLogger(f"torch.distributed.elastic.{part}").setLevel(logging.ERROR)
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id="gnunet", max_restarts=0,
    )  # fmt: skip
    spec = sys.modules["__main__"].__spec__
    program = ["-m", "gnunet"] if spec is not None and spec.name == "gnunet.__main__" else sys.argv[:1]
    try:
        elastic_launch(launch, sys.executable)(*program, *sys.argv[1:])
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


def die_with_parent(launcher: psutil.Process | None) -> None:
    """Get SIGTERM when the launcher that started this process dies (Linux); under anything else do nothing.

    `accelerate launch` passes no signal on to the one process that it starts, which would train on without it.
    """
    if sys.platform != "linux" or launcher is None or not is_launcher(launcher):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher.pid:  # it died before the kernel knew
        signal.raise_signal(signal.SIGTERM)


def is_launcher(parent: psutil.Process) -> bool:
    """Whether a parent process is `accelerate launch`, torchrun, or a program that became several processes."""
    return "TORCHELASTIC_RUN_ID" in os.environ or launch_options(parent) is not None


def launch_options(process: psutil.Process | None) -> list[str] | None:
    """What follows `accelerate launch` on a process's command line; None where it is something else."""
    try:
        words = process.cmdline() if process is not None else []
    except psutil.Error:  # it is gone, or somebody else's
        words = []
    for number, word in enumerate(words):
        subcommand = word == "launch" and "accelerate" in words[number - 1]
        if subcommand or word.endswith(("accelerate-launch", "accelerate.commands.launch", "commands/launch.py")):
            return words[number + 1 :]
    return None


def asked_for(launcher: psutil.Process | None) -> tuple[int, dict[str, str]]:
    """What the command line of `accelerate launch`, or the config file it names, asks for.

    Returns:
        The number of processes, and the environment in which it tells processes on GPUs of FSDP.

    Raises:
        ConfigError: a kind of launch that gnunet lacks.
    """
    if (words := launch_options(launcher)) is None:
        return 1, {}
    options, _ = launch_command_parser().parse_known_args(words)
    processes, told = options.num_processes, dict(vars(options))
    fsdp, deepspeed, megatron = options.use_fsdp, options.use_deepspeed, options.use_megatron_lm
    if options.config_file is not None:
        config = load_config_from_file(options.config_file)
        processes = processes or config.num_processes
        if not (fsdp or deepspeed or megatron):
            fsdp = config.distributed_type == DistributedType.FSDP
            deepspeed = config.distributed_type == DistributedType.DEEPSPEED
            megatron = config.distributed_type == DistributedType.MEGATRON_LM
        of_file = {f"fsdp_{key.removeprefix('fsdp_')}": value for key, value in config.fsdp_config.items()}
        told |= {key: value for key, value in of_file.items() if key not in getattr(options, "nondefault", ())}
    if deepspeed or megatron:
        raise ConfigError(REFUSAL)
    told = {key: str(value) for key, value in told.items() if value is not None}
    if fsdp:
        of_fsdp = {key.upper(): value for key, value in told.items() if key.startswith("fsdp_")}
        return processes or 1, {"ACCELERATE_USE_FSDP": "true", **of_fsdp}
    return processes or 1, {}
