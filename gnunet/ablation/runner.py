"""Runs the trials of a plan that have no record: in parallel, or one after another on all processes of a launch.

In parallel each has a process of its own, with separate memory and output, which ends with the runner.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch

from gnunet.ablation.classifier import run_classifier, seconds_per_image
from gnunet.ablation.measure import step_cost
from gnunet.ablation.plan import Trial
from gnunet.ablation.progress import Display
from gnunet.ablation.records import record_path
from gnunet.ablation.trial import run_trial
from gnunet.distributed.accelerator import make_accelerator
from gnunet.distributed.signals import SIGNALS, StopSignal
from gnunet.environment import num_cpus
from gnunet.errors import GnunetError, run_cli
from gnunet.training.session import build_session

POLL = 0.5  # seconds between updates of the display
RunOutcome = tuple[list[str], int | None]
"""What a round of trials ended with: a line for each that ended in an error (a divergence is a result, not a failure),
and the signal that stopped it."""


def pending_trials(trials: Iterable[Trial], folder: Path) -> list[Trial]:
    """The trials without a record, each name once, by seed: every variant in every setting before the next seed."""
    unique = list({trial.name: trial for trial in trials if not record_path(folder, trial.name).exists()}.values())
    seeds = list(dict.fromkeys(trial.seed for trial in unique))
    return sorted(unique, key=lambda trial: seeds.index(trial.seed))


def slots(jobs: int | None) -> list[str | None]:
    """The GPU that each of `jobs` trials at a time sees, or None for each on a machine without GPUs.

    None is a job for each GPU, or for each core. More jobs than GPUs share them.
    """
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpus = names or [str(number) for number in range(torch.cuda.device_count())]
    if jobs is None:
        jobs = len(gpus) or (1 if torch.accelerator.is_available() else num_cpus())
    return [gpus[slot % len(gpus)] if gpus else None for slot in range(jobs)]


def fork_server() -> ForkServerContext:
    """Start the server that trials are forked from, which has imported torch and gnunet, so that they start at once."""
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


def run_parallel(
    context: ForkServerContext, trials: Sequence[Trial], folder: Path, slots: Sequence[str | None], display: Display
) -> RunOutcome:
    """Run each trial in a separate process, one at a time on each slot, until they have records.

    After SIGINT or SIGTERM the running ones write checkpoints and end.
    """
    waiting, free, failures, stopping = list(trials), list(slots), [], False
    running: dict[ForkServerProcess, tuple[Trial, str | None, float]] = {}
    try:
        with StopSignal() as stop, display:
            while running or (waiting and stop.signum is None):
                if stop.signum is not None and not stopping:
                    display.message("stopping: the running trials write their checkpoints")
                    for process in running:
                        process.terminate()
                    stopping = True
                while waiting and free and not stopping:
                    trial, gpu, start = waiting.pop(0), free.pop(0), time.monotonic()
                    display.started(trial)
                    # Not a daemon: a trial may start loader processes.
                    process = context.Process(target=_work, args=(trial, folder, gpu), name=trial.name, daemon=False)
                    process.start()
                    running[process] = trial, gpu, start
                ended = wait([process.sentinel for process in running], timeout=POLL)
                for process in [process for process in running if process.sentinel in ended]:
                    process.join()
                    trial, gpu, start = running.pop(process)
                    free.append(gpu)
                    if record_path(folder, trial.name).exists():
                        display.ended(trial, time.monotonic() - start)
                    elif not stopping:
                        log = trial.run_dir(folder) / "log.txt"
                        failures.append(f"failed: {trial.title}: {_reason(process.exitcode, log)} ({log})")
                        display.message(failures[-1])
                display.show([trial for trial, _, _ in running.values()])
    finally:
        for process in running:  # after an error of the runner
            process.kill()
    return failures, stop.signum


def _reason(status: int, log: Path) -> str:
    """Why a process ended without a record: a signal, or the last line that it printed."""
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        return f"ended by {signal.Signals(number).name}"
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), f"ended with status {status}")


def _work(trial: Trial, folder: Path, gpu: str | None) -> None:
    _init_worker(trial.run_dir(folder), gpu)
    sys.exit(run_cli(lambda: _run(trial, folder)))


def _run(trial: Trial, folder: Path) -> int:
    return (run_classifier if trial.task == "classification" else run_trial)(trial, folder)


def probe(context: ForkServerContext, trial: Trial, folder: Path, gpu: str | None) -> tuple[float, float] | None:
    """Seconds to start a trial and time a few steps, and those per image of training; None where that fails, as the
    trial then will."""
    start = time.monotonic()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_probe, args=(trial, folder, gpu, theirs), daemon=False)
    process.start()
    theirs.close()
    try:
        rate = ours.recv()
        return time.monotonic() - start, rate
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def _probe(trial: Trial, folder: Path, gpu: str | None, connection: Connection) -> None:
    _init_worker(trial.run_dir(folder), gpu)
    config = trial.config.model_copy(update={"run_dir": str(trial.run_dir(folder))})
    if trial.task == "classification":
        connection.send(seconds_per_image(config))
    else:
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


def run_in_process(trials: Sequence[Trial], folder: Path, display: Display) -> RunOutcome:
    """Run trials one after another in this process; all processes of a launch call it together.

    A GnunetError is a failure of the trial. Other exceptions propagate, since they may be of one rank alone, for which
    the others would wait.
    """
    failures: list[str] = []
    for trial in trials:
        display.started(trial)
        start = time.monotonic()
        try:
            if status := _run(trial, folder):
                return failures, status - 128
        except GnunetError as error:
            failures.append(f"failed: {trial.title}: {str(error).splitlines()[0]}")
            display.message(failures[-1])
        else:
            display.ended(trial, time.monotonic() - start)
    return failures, None
