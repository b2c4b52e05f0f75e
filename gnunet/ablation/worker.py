"""The process of a trial: separate memory and output; it ends with its runner.

Processes are forked from a server that has imported torch and gnunet, and so start at once.
"""

import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch

from gnunet.ablation.cost import step_cost
from gnunet.ablation.plan import Trial
from gnunet.ablation.trial import reset_process_state, run_folder, run_trial
from gnunet.config import Config, from_yaml, to_yaml
from gnunet.distributed.accelerator import make_accelerator
from gnunet.errors import GnunetError, print_error
from gnunet.training.session import build_session


@dataclass(frozen=True)
class Task:
    """The argument of a worker process."""

    name: str
    folder: Path
    config_text: str
    gpu: str | None
    """The GPU that it sees, as CUDA_VISIBLE_DEVICES names it; None on a machine without GPUs."""

    @classmethod
    def of(cls, trial: Trial, folder: Path, gpu: str | None) -> "Task":
        """The task of a trial; `folder` is the study's."""
        config = trial.config.model_copy(update={"run_dir": str(run_folder(folder, trial.name))})
        return cls(trial.name, folder, to_yaml(config), gpu)

    @property
    def config(self) -> Config:
        return from_yaml(self.config_text, self.name)

    @property
    def log(self) -> Path:
        """File of the process's output."""
        return run_folder(self.folder, self.name) / "log.txt"


def context() -> ForkServerContext:
    """Start the fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # The default check for GPUs initializes CUDA, which cannot be initialized again in a forked process.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    # A signal to the process group must not end the server, which reports the exit status of its processes.
    resource_tracker.ensure_running()  # first, since it unblocks the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


def start(context: ForkServerContext, task: Task) -> ForkServerProcess:
    """Run a trial in a new process; its exit status is that of `run_trial`, or 1 after an error."""
    # Not a daemon: a trial may start loader processes.
    process = context.Process(target=_work, args=(task,), name=task.name, daemon=False)
    process.start()
    return process


def _work(task: Task) -> None:
    _init_worker(task)
    try:
        status = run_trial(task.name, task.config, task.folder)
    except GnunetError as error:
        print_error(error)
        status = 1
    sys.exit(status)


def probe(context: ForkServerContext, task: Task) -> float | None:
    """Seconds per image of training, from a few steps; None where they fail, as the trial then will."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_probe, args=(task, theirs), daemon=False)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def _probe(task: Task, connection: Connection) -> None:
    _init_worker(task)
    reset_process_state()
    config = task.config
    cost = step_cost(build_session(config, make_accelerator(config)))
    connection.send(cost.seconds / config.train.batch_size)


def _init_worker(task: Task) -> None:
    """Set up this process for a task: session, signals, output, device."""
    os.setsid()  # Ctrl-C goes to the runner, which passes it on
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_die_with_parent, daemon=True).start()
    task.log.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.close(log)
    if task.gpu is None:
        torch.set_num_threads(1)  # results depend on the number of threads
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = task.gpu


def _die_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, signal.SIGKILL)  # with its loader processes
