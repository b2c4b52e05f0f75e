"""Several processes on CPUs, by `accelerate launch --cpu --num_processes N` or without a launcher.

Accelerate leaves several CPU processes to MPI and, where none is used, silently starts one (seen in 1.15). A
program that calls `spread_over_cpus` first becomes the N processes it was asked to be, through torchrun.
"""

import logging
import os
import sys

import psutil
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

JOINED = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables of a process that torchrun or MPI started."""


def spread_over_cpus() -> None:
    """Start again as several processes where `accelerate launch --cpu` asked for them; else do nothing."""
    lone = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    if not lone or any(name in os.environ for name in JOINED):
        return
    processes = asked_for(psutil.Process().parent())
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        os.execv(sys.executable, [*torchrun, *sys.argv])


def run_as_processes(count: int) -> int | None:
    """Run this program as `count` processes of one thread each, unless a launcher has decided how many there are.

    Returns:
        The exit status; None where this process is to do the work itself.
    """
    if count == 1 or any(name in JOINED or name.startswith("ACCELERATE_") for name in os.environ):
        return None
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for part in ("agent.server.api", "multiprocessing.api"):  # they warn of signals, which are no news
        logging.getLogger(f"torch.distributed.elastic.{part}").setLevel(logging.ERROR)
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id="gnunet", max_restarts=0,
    )  # fmt: skip
    try:
        elastic_launch(launch, sys.executable)(*sys.argv)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


def asked_for(launcher: psutil.Process | None) -> int:
    """The number of processes on the command line of `accelerate launch`, or in the config file it names."""
    words = launcher.cmdline() if launcher is not None else []
    for number, word in enumerate(words):
        if word == "launch" or word.endswith(("accelerate-launch", "accelerate.commands.launch", "launch.py")):
            options, _ = launch_command_parser().parse_known_args(words[number + 1 :])
            if options.num_processes is None and options.config_file is not None:
                return load_config_from_file(options.config_file).num_processes
            return options.num_processes or 1
    return 1
