"""The parts of the check, and how each is run within its time."""

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

from common.peers import PEERS

FULL_SECONDS = 590
MARK = "GNUNET_GPU_CHECK"
"""An environment variable of every process that a part starts; its value is the process of the check."""
SECONDS_TO_END = 10
"""Between SIGINT, upon which a program can still write its results, and SIGKILL; taken from the part's time."""
MARGIN = 30
"""By how much a benchmark's own time limit is shorter than its part's."""


@dataclass(frozen=True)
class Part:
    """Programs that run one after the other.

    Attributes:
        seconds: the time reserved for it out of FULL_SECONDS. It may take longer if earlier parts were faster.
        commands: arguments of Python. `{limit}` stands for the seconds left, less MARGIN.
        records: names of the benchmark records that it writes.
    """

    name: str
    seconds: float
    commands: list[list[str]]
    records: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


# Several processes compile at a time, so each does so by itself. The compiler's worker processes would also keep pytest
# from exiting (torch 2.11).
ONE_COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


def parts(folder: Path, *, small: bool = False, fake: bool = False, compiling: bool = False) -> list[Part]:
    """All parts, in the order in which they run.

    Args:
        folder: where results are written.
        small: run a few tests and cases of each part.
        fake: the device computes nothing.
        compiling: run everything once, so that it is compiled, and time nothing.
    """
    out = ["--out", str(folder)]
    short = ["--rounds", "2", "--block", "1"]
    rounds = short if compiling else ["--rounds", "10"]
    timing = ["--check_only"] if compiling else ["--seconds_per_case", "1", "--time_limit", "{limit}"]
    operator = ["scripts/benchmarks/benchmark_op.py", *out, *timing]
    first = ["--check_first", str(min(8, os.cpu_count() or 1)), "--peers", *(p for p in PEERS if p != "compile")]
    training = ["scripts/benchmarks/benchmark_training.py", *out]
    both = ["--sides", "gnunet", "diffusers"]
    operator_tests = ["-m", "gpu and not slow", "tests/ops/kernels"]
    trainer_tests = ["-m", "gpu", "tests/training/test_on_gpu.py"]
    if small:
        some = "cuda_graphs or inductor or tiling or opcheck or (alone_as_in_a_batch and shape1-)"
        return [
            _tests("tests", 120, folder, 1, fake, [*operator_tests, "-k", some]),
            _tests("trainer", 80, folder, 1, fake, [*trainer_tests, "-k", "fsdp or cuda_graphs"]),
            Part("operator", 200, [[*operator, *first, "--shapes", "ddpm_cifar10/512@4"]], ("operator",), ONE_COMPILER),
            Part("training", 150, [[*training, "--cases", "small", *short, *both]], ("training",)),
        ]
    overhead = ["--cases", "small", "--sides", "gnunet", "--record", "overhead"]
    against = ["--cases", "cifar10", "--precision", "bf16", "--batch_sizes", "8", "128"]
    found = [
        _tests("tests", 90, folder, 12, fake, operator_tests),
        _tests("trainer", 75, folder, 4, fake, trainer_tests),
        Part("operator", 150, [[*operator, *first]], ("operator",), ONE_COMPILER),
        Part("training", 80, [[*training, *rounds, *against, *both]], ("training",)),
        Part("overhead", 60, [[*training, *rounds, *overhead]], ("overhead",)),
    ]
    # torch.compile takes 10 s a case: the cases for which there is time.
    compiled = [*operator, "--peers", "compile", "--record", "operator-compiled"]
    return found if compiling else [*found, Part("compiled", 100, [compiled], ("operator-compiled",))]


def _tests(name: str, seconds: float, folder: Path, workers: int, fake: bool, arguments: list[str]) -> Part:
    command = ["-m", "pytest", "-q", "--durations=3", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "gpu_check.progress", "--progress", str(folder / f"{name}.jsonl")]
    command += ["-p", "gpu_check.no_numbers"] if fake else []
    return Part(
        name, seconds, [[*command, "-n", str(min(workers, os.cpu_count() or 1)), *arguments]], (), ONE_COMPILER
    )  # fmt: skip


def limits(parts: list[Part], left: Callable[[], float]) -> Iterator[tuple[Part, float]]:
    """Yield each part with its time limit: the time remaining, minus the shares reserved for later parts."""
    share = left() / sum(part.seconds for part in parts)
    for number, part in enumerate(parts):
        yield part, left() - share * sum(later.seconds for later in parts[number + 1 :])


def run(part: Part, limit: float, environment: Mapping[str, str], say: Callable[[str], None]) -> str:
    """Run a part's programs and end every process that they have started.

    Args:
        limit: seconds, for all of them.
        environment: theirs.
        say: called with each line of their output.

    Returns:
        "ended", "exit status N" or "stopped after N s".
    """
    end = time.monotonic() + limit
    environment = {**environment, **part.environment, MARK: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    statuses: list[int] = []
    for command in part.commands:
        left = end - time.monotonic()
        if left <= 0:
            return f"stopped after {limit:.0f} s"
        arguments = [argument.replace("{limit}", str(max(1, round(left - MARGIN)))) for argument in command]
        grace = min(SECONDS_TO_END, left / 4)
        reader = None
        try:
            process = subprocess.Popen(
                [sys.executable, *arguments], env=environment, start_new_session=True, text=True, errors="replace",
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            reader = threading.Thread(target=_say_lines, args=(process, say), daemon=True)
            reader.start()
            statuses.append(process.wait(left - grace))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            return f"stopped after {limit:.0f} s"
        finally:  # an interrupt may come at any of these lines
            end_processes()
            if reader is not None and reader.is_alive():
                reader.join(SECONDS_TO_END)
    return next((f"exit status {status}" for status in statuses if status), "ended")


def _say_lines(process: subprocess.Popen, say: Callable[[str], None]) -> None:
    for line in process.stdout or ():
        say(line.rstrip("\n"))


def end_processes() -> None:
    """Kill every process that a part has started, including those that lead a session of their own."""
    for _ in range(5):  # a process may be forked while they are listed
        if not (found := [process for process in psutil.process_iter() if _is_of_a_part(process)]):
            return
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=5)  # until the memory that they have on the device is free


def _is_of_a_part(process: psutil.Process) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get(MARK) == str(os.getpid())
    except psutil.Error:
        return False
