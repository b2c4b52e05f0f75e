"""The process of a trial: separate memory and output; it ends with its runner.

Processes are forked from a server that has imported torch and gnunet, and so start at once.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch

from gnunet.ablation.cost import step_cost
from gnunet.ablation.plan import Trial
from gnunet.ablation.trial import run_trial
from gnunet.distributed.accelerator import make_accelerator
from gnunet.distributed.signals import SIGNALS
from gnunet.errors import GnunetError, print_error
from gnunet.training.session import build_session


def context() -> ForkServerContext:
    """Start the fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # The default check for GPUs initializes CUDA, which cannot be initialized again in a forked process.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    # A signal to the process group must not end the server, which reports the exit status of its processes.
    resource_tracker.ensure_running()  # first, since it unblocks signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


def start(context: ForkServerContext, trial: Trial, folder: Path, gpu: str | None) -> ForkServerProcess:
    """Run a trial in a new process; its exit status is that of `run_trial`, or 1 after an error.

    `gpu` is the one that it sees, as CUDA_VISIBLE_DEVICES names it; None on a machine without GPUs.
    """
    # Not a daemon: a trial may start loader processes.
    process = context.Process(target=_work, args=(trial, folder, gpu), name=trial.name, daemon=False)
    process.start()
    return process


def _work(trial: Trial, folder: Path, gpu: str | None) -> None:
    _init_worker(trial.run_dir(folder), gpu)
    try:
        status = run_trial(trial, folder)
    except GnunetError as error:
        print_error(error)
        status = 1
    sys.exit(status)


def probe(context: ForkServerContext, trial: Trial, folder: Path, gpu: str | None) -> float | None:
    """Seconds per image of training, from a few steps; None where they fail, as the trial then will."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_probe, args=(trial, folder, gpu, theirs), daemon=False)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def _probe(trial: Trial, folder: Path, gpu: str | None, connection: Connection) -> None:
    _init_worker(trial.run_dir(folder), gpu)
    config = trial.config.model_copy(update={"run_dir": str(trial.run_dir(folder))})
    cost = step_cost(build_session(config, make_accelerator(config)))
    connection.send(cost.seconds / config.train.batch_size)


def _init_worker(run_dir: Path, gpu: str | None) -> None:
    """Set up this process for a trial: session, signals, output, device."""
    gc.freeze()  # what the server has imported stays, and a search for garbage through it takes a quarter of a second
    os.setsid()  # Ctrl-C goes to the runner, which passes it on
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    run_dir.mkdir(parents=True, exist_ok=True)
    log = os.open(run_dir / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.close(log)
    if gpu is None:
        torch.set_num_threads(1)  # results depend on the number of threads
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def _die_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, signal.SIGKILL)  # with its loader processes
