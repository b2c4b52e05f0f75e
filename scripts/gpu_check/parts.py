"""The parts of the check, and how each gets its time and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = "GNUNET_GPU_CHECK"
"""A variable that every process of a part has in its environment: the check's process."""
SECONDS_TO_END = 10
"""Between the signal that asks a part to end and the one that ends it, out of its time."""
STOPPED = -1000
"""Stands for the exit status of a program that was ended."""
MARGIN = 15
"""Seconds of a benchmark's own limit below its part's."""
TESTS = ["-m", "pytest", "-p", "gpu_check.progress", "-p", "no:cacheprovider", "-q", "--durations=3", "--tb=short"]


@dataclass(frozen=True)
class Part:
    """Programs that run one after the other.

    Attributes:
        seconds: what it is sure to get of FULL_SECONDS, or in proportion; more, where those before it need less.
        commands: arguments of Python; `{limit}` in them becomes the seconds that are left to the part, less a margin.
    """

    name: str
    seconds: float
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)


FULL_SECONDS = 590


def parts(folder: Path, *, small: bool, fake: bool, compiling: bool) -> list[Part]:
    """All of them, in their order.

    Args:
        folder: where records go.
        small: a few tests and cases of each.
        fake: the device computes nothing.
        compiling: only to have everything compiled: nothing is timed.
    """
    cores = os.cpu_count() or 1
    no_numbers = ["-p", "gpu_check.no_numbers"] if fake else []

    def tests(name: str, workers: int, *arguments: str) -> list[str]:
        progress = ["--progress", str(folder / f"{name}.jsonl"), "-n", "1" if small else str(min(workers, cores))]
        return [*TESTS, *no_numbers, *progress, *arguments]

    some = ["-k", "cuda_graphs or inductor or plan or opcheck or (alone_as_in_a_batch and shape1-)"] if small else []
    few = ["-k", "fsdp"] if small else []
    operator = ["scripts/benchmark_op.py", "--out", str(folder), "--check_first", str(min(8, cores))]
    operator += ["--shapes", "ddpm_cifar10/512@4"] if small else []
    operator += ["--check_only"] if compiling else ["--seconds_per_case", "1", "--time_limit", "{limit}"]
    training = ["scripts/benchmark_training.py", "--out", str(folder)]
    training += ["--rounds", "2", "--block", "1"] if small or compiling else ["--rounds", "16"]
    own = [*training, "--cases", "small", "--sides", "gnunet", "--record", "overhead"]
    against = [*training, "--cases", "cifar10", "--precision", "bf16", "--batch_sizes", "8", "128"]
    if small:
        own, against = [], [*training, "--cases", "small", "--precision", "bf16", "--sides", "gnunet", "diffusers"]
    # Beside several workers the compiler's own processes are too many; and they may keep pytest from ending.
    one = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return [
        Part("tests", 120, [tests("tests", 8, "-m", "gpu and not slow", *some, "tests/ops/gpu")], one),
        Part("trainer", 80, [tests("trainer", 4, "-m", "gpu", *few, "tests/training/test_on_gpu.py")], one),
        Part("operator", 200, [operator]),
        Part("training", 150, [command for command in (own, against) if command]),
    ]


def limits(parts: list[Part], left: Callable[[], float]) -> Iterator[tuple[Part, float]]:
    """Each part with its time: all that `left` says is left, less what those after it are sure to get, their shares."""
    share = left() / sum(part.seconds for part in parts)
    for number, part in enumerate(parts):
        yield part, left() - share * sum(later.seconds for later in parts[number + 1 :])


def run(part: Part, limit: float, environment: Mapping[str, str], say: Callable[[str], None]) -> str:
    """Run a part's programs, `say` their lines, and end every process of theirs; returns what came of it."""
    end = time.monotonic() + limit
    environment = {**environment, **part.environment, MARK: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    statuses: list[int] = []
    for command in part.commands:
        left = end - time.monotonic()
        if left <= 0:
            break
        arguments = [argument.format(limit=max(1, round(left - MARGIN))) for argument in command]
        process = subprocess.Popen(
            [sys.executable, *arguments], env=environment, start_new_session=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        reader = threading.Thread(target=say_lines, args=(process, say), daemon=True)
        reader.start()
        try:
            statuses.append(process.wait(left - (grace := min(SECONDS_TO_END, left / 4))))
        except subprocess.TimeoutExpired:  # asked to end, it can write what it has
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            statuses.append(STOPPED)
        end_processes()
        reader.join(SECONDS_TO_END)
        if statuses[-1] == STOPPED:
            break
    if len(statuses) < len(part.commands) or STOPPED in statuses:
        return f"stopped after {limit:.0f} s"
    return "ended" if not any(statuses) else f"exit status {next(filter(None, statuses))}"


def say_lines(process: subprocess.Popen, say: Callable[[str], None]) -> None:
    for line in process.stdout or ():
        say(line.rstrip("\n"))


def end_processes() -> None:
    """End every process that a part has started, also one that leads a session of its own."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == str(os.getpid()):
                process.kill()
