"""Runs the cells of a plan that have no record yet: side by side, or one after another on all processes of a launch."""

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
from gnunet.ablation.plan import Cell
from gnunet.ablation.progress import Display
from gnunet.ablation.records import record_path
from gnunet.ablation.trial import run_cell, run_folder
from gnunet.distributed.signals import StopSignal
from gnunet.environment import num_cpus
from gnunet.errors import GnunetError

POLL = 0.5
"""Seconds between looks at what cells have done."""


@dataclass(frozen=True)
class Failure:
    """A cell that ended in an error, which no divergence is."""

    cell: Cell
    reason: str
    log: Path | None
    """What it printed; None where that went to the runner's own output."""


@dataclass(frozen=True)
class Outcome:
    """How a round of cells ended."""

    failures: list[Failure]
    signum: int | None = None
    """The signal that stopped it."""


def missing(cells: Iterable[Cell], folder: Path) -> list[Cell]:
    """The cells without a record, each name once, so ordered that all arms and points have a seed before any has the
    next one."""
    unique = list({cell.name: cell for cell in cells if not record_path(folder, cell.name).exists()}.values())
    seeds = list(dict.fromkeys(cell.seed for cell in unique))
    return sorted(unique, key=lambda cell: seeds.index(cell.seed))


def slots(jobs: int | None) -> list[str | None]:
    """What cells run on side by side: for each the GPU that it sees, or None on a machine without.

    Args:
        jobs: how many; None is one for each GPU, or for each core. More than there are GPUs share them.
    """
    gpus = _visible_gpus()
    if jobs is None:
        jobs = len(gpus) or (1 if torch.accelerator.is_available() else num_cpus())
    return [gpus[slot % len(gpus)] if gpus else None for slot in range(jobs)]


def _visible_gpus() -> list[str]:
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names or [str(number) for number in range(torch.cuda.device_count())]


class ParallelRunner:
    """Runs each cell in a process of its own, as many at a time as there are slots."""

    def __init__(self, context: ForkServerContext, folder: Path, slots: Sequence[str | None], display: Display):
        self.context, self.folder, self.display = context, folder, display
        self.free = list(slots)
        self.running: dict[ForkServerProcess, tuple[Cell, str | None, float]] = {}

    def run(self, cells: Sequence[Cell]) -> Outcome:
        """Run cells to their records. On SIGINT or SIGTERM they write checkpoints and end."""
        waiting, failures, told = list(cells), [], False
        try:
            with StopSignal() as stop, self.display:
                while self.running or (waiting and stop.signum is None):
                    if stop.signum is not None and not told:
                        self.display.message("stopping: the cells at work write their checkpoints")
                        for process in self.running:
                            process.terminate()
                        told = True
                    while waiting and self.free and not told:
                        self._start(waiting.pop(0))
                    ended = wait([process.sentinel for process in self.running], timeout=POLL)
                    for process in [process for process in self.running if process.sentinel in ended]:
                        failure = self._end(process, stopping=told)
                        failures += [] if failure is None else [failure]
                    self.display.update([cell for cell, _, _ in self.running.values()])
        finally:
            for process in self.running:  # an error of the runner's own
                process.kill()
        return Outcome(failures, stop.signum)

    def _start(self, cell: Cell) -> None:
        gpu = self.free.pop(0)
        self.display.started(cell)
        process = worker.start(self.context, worker.Task.of(cell, self.folder, gpu))
        self.running[process] = cell, gpu, time.monotonic()

    def _end(self, process: ForkServerProcess, *, stopping: bool) -> Failure | None:
        """Clear up after a process; returns what went wrong, if something did."""
        process.join()
        cell, gpu, start = self.running.pop(process)
        self.free.append(gpu)
        if record_path(self.folder, cell.name).exists():
            self.display.finished(cell, time.monotonic() - start)
            return None
        if stopping:
            return None
        log = run_folder(self.folder, cell.name) / "log.txt"
        reason = _reason(process.exitcode, log)
        self.display.message(f"failed: {cell.title}: {reason}")
        return Failure(cell, reason, log)


def _reason(status: int, log: Path) -> str:
    """Why a process ended without a record: a signal, or the last line that it printed."""
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        return f"ended by {signal.Signals(number).name}"
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), f"ended with status {status}")


def run_together(cells: Sequence[Cell], folder: Path, display: Display) -> Outcome:
    """Run cells one after another in this process, all the processes of a launch together.

    Raises:
        Exception: what is no GnunetError may have struck one process alone, for which the others would wait.
    """
    failures = []
    for cell in cells:
        display.started(cell)
        start = time.monotonic()
        config = cell.config.model_copy(update={"run_dir": str(run_folder(folder, cell.name))})
        try:
            if status := run_cell(cell.name, config, folder):
                return Outcome(failures, status - 128)
        except GnunetError as error:
            reason = str(error).splitlines()[0]
            display.message(f"failed: {cell.title}: {reason}")
            failures.append(Failure(cell, reason, None))
        else:
            display.finished(cell, time.monotonic() - start)
    return Outcome(failures)
