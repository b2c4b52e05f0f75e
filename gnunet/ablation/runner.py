"""Runs the trials of a plan that have no record: in parallel, or one after another on all processes of a launch."""

import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch

from gnunet.ablation import worker
from gnunet.ablation.plan import Trial
from gnunet.ablation.progress import Display
from gnunet.ablation.records import record_path
from gnunet.ablation.trial import run_trial
from gnunet.distributed.signals import StopSignal
from gnunet.environment import num_cpus
from gnunet.errors import GnunetError

POLL = 0.5
"""Seconds between updates of the display."""


@dataclass(frozen=True)
class Failure:
    """A trial that ended in an error; a divergence is a result, not a failure."""

    trial: Trial
    reason: str
    log: Path | None
    """File with its output; None where it printed to the runner's output."""


@dataclass(frozen=True)
class RunOutcome:
    """How a round of trials ended."""

    failures: list[Failure]
    signum: int | None = None
    """The signal that stopped it."""


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


class ParallelRunner:
    """Runs each trial in a separate process, one at a time on each slot."""

    def __init__(self, context: ForkServerContext, folder: Path, slots: Sequence[str | None], display: Display):
        self.context, self.folder, self.display = context, folder, display
        self.free = list(slots)
        self.running: dict[ForkServerProcess, tuple[Trial, str | None, float]] = {}

    def run(self, trials: Sequence[Trial]) -> RunOutcome:
        """Run trials until they have records. After SIGINT or SIGTERM they write checkpoints and end."""
        waiting, failures, stopping = list(trials), [], False
        try:
            with StopSignal() as stop, self.display:
                while self.running or (waiting and stop.signum is None):
                    if stop.signum is not None and not stopping:
                        self.display.message("stopping: the running trials write their checkpoints")
                        for process in self.running:
                            process.terminate()
                        stopping = True
                    while waiting and self.free and not stopping:
                        self._start(waiting.pop(0))
                    ended = wait([process.sentinel for process in self.running], timeout=POLL)
                    for process in [process for process in self.running if process.sentinel in ended]:
                        failure = self._end(process, stopping=stopping)
                        failures += [] if failure is None else [failure]
                    self.display.update([trial for trial, _, _ in self.running.values()])
        finally:
            for process in self.running:  # after an error of the runner
                process.kill()
        return RunOutcome(failures, stop.signum)

    def _start(self, trial: Trial) -> None:
        gpu = self.free.pop(0)
        self.display.started(trial)
        process = worker.start(self.context, trial, self.folder, gpu)
        self.running[process] = trial, gpu, time.monotonic()

    def _end(self, process: ForkServerProcess, *, stopping: bool) -> Failure | None:
        """Free the slot of a process that ended; returns the failure, if it was one."""
        process.join()
        trial, gpu, start = self.running.pop(process)
        self.free.append(gpu)
        if record_path(self.folder, trial.name).exists():
            self.display.finished(trial, time.monotonic() - start)
            return None
        if stopping:
            return None
        log = trial.run_dir(self.folder) / "log.txt"
        reason = _reason(process.exitcode, log)
        self.display.message(f"failed: {trial.title}: {reason}")
        return Failure(trial, reason, log)


def _reason(status: int, log: Path) -> str:
    """Why a process ended without a record: a signal, or the last line that it printed."""
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        return f"ended by {signal.Signals(number).name}"
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), f"ended with status {status}")


def run_in_process(trials: Sequence[Trial], folder: Path, display: Display) -> RunOutcome:
    """Run trials one after another in this process; all processes of a launch call it together.

    A GnunetError is a failure of the trial. Other exceptions propagate, since they may be of one rank alone, for which
    the others would wait.
    """
    failures = []
    for trial in trials:
        display.started(trial)
        start = time.monotonic()
        try:
            if status := run_trial(trial, folder):
                return RunOutcome(failures, status - 128)
        except GnunetError as error:
            reason = str(error).splitlines()[0]
            display.message(f"failed: {trial.title}: {reason}")
            failures.append(Failure(trial, reason, None))
        else:
            display.finished(trial, time.monotonic() - start)
    return RunOutcome(failures)
