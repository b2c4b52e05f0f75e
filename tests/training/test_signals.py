"""Signals to a launcher, to one of its processes, and a second time: a checkpoint, the right status, no harm."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gnunet.__main__ import main
from gnunet.checkpoint import checkpoint
from gnunet.checkpoint.checkpoint import list_checkpoints, newest_checkpoint
from gnunet.distributed import launch
from gnunet.distributed import signals as stopping
from gnunet.errors import ConfigError
from gnunet.training import StepInfo, fit
from tests.runs import ROOT, assert_same_run, program_environment, wait_until

PR_GET_PDEATHSIG = 2
ENDLESS = ["--train.total_images", "1000000", "--train.log_every", "8", "--train.checkpoint_every", "0",
           "--train.sample_every", "0", "--train.validate_every", "0"]  # fmt: skip


def train_and_note_status(flags: list[str]) -> None:
    """train.py in a process of a launch, which writes down how it ends: a launcher's own status does not say."""
    number = os.environ.get("RANK", "0")
    Path(f"process-{number}").write_text(str(os.getpid()))
    # Once one process has ended, torch's agent sends the others SIGTERM: none may die of it before it has written its
    # status. While it trains, gnunet's own handling is in force.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        status = main(["train", *flags])
    except SystemExit as stopped:
        status = stopped.code
    Path(f"status-{number}").write_text(str(status))
    sys.exit(status)


def launch_two(flags: list[str]) -> int:
    """What torchrun does, with processes that are forked, not started as programs."""
    config = LaunchConfig(
        1, 1, 2, run_id="none", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork"
    )
    elastic_launch(config, train_and_note_status)(flags)
    return 0


def trains(folder: Path) -> bool:
    log = folder / "run/metrics.jsonl"
    return log.exists() and log.read_text().count("\n") >= 2


@pytest.fixture
def launched(tiny_flags, start_ranks, tmp_path):
    """Launch an endless tiny run as two processes, and give their launcher once they train."""
    ranks = start_ranks(1, partial(launch_two, tiny_flags("run", *ENDLESS)))
    wait_until(lambda: trains(tmp_path), ranks[0].is_alive)
    yield ranks
    kill_all_in(tmp_path)


def kill_all_in(folder: Path) -> None:
    for process in psutil.process_iter():  # of several sessions
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder):
                process.kill()


def ended(folder: Path, names: list[str]) -> dict[str, str]:
    """The status of each process once all have ended."""
    files = {name: folder / f"status-{name}" for name in names}
    wait_until(lambda: all(file.exists() and file.read_text() for file in files.values()))
    return {name: file.read_text() for name, file in files.items()}


@pytest.mark.slow
def test_signal_to_accelerate_launch_stops_its_process(tiny_flags, tmp_path):
    """It passes none on."""
    program = tmp_path / "program.py"
    module = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {__name__} import train_and_note_status"
    program.write_text(f"{module}\ntrain_and_note_status(sys.argv[1:])\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "configs/accelerate/cpu.yaml"), str(program), *tiny_flags("run", *ENDLESS)]
    with (tmp_path / "said").open("w") as said, subprocess.Popen(
        command, cwd=tmp_path, env=program_environment(), stdin=subprocess.DEVNULL, stdout=said, stderr=said,
        start_new_session=True,
    ) as launcher:  # fmt: skip
        try:
            wait_until(lambda: trains(tmp_path), lambda: launcher.poll() is None)
            launcher.terminate()
            assert ended(tmp_path, ["0"]) == {"0": "143"}
        finally:
            kill_all_in(tmp_path)
    newest = newest_checkpoint(tmp_path / "run/checkpoints")
    assert f"stopped at {int(newest.name)} images" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_signal_to_the_launcher_stops_its_processes(launched, tmp_path, number):
    """Nobody passes on SIGKILL: the launcher's death is noticed."""
    os.kill(launched[0].pid, number)
    assert ended(tmp_path, ["0", "1"]) == {"0": "143", "1": "143"}
    newest = newest_checkpoint(tmp_path / "run/checkpoints")
    assert f"stopped at {int(newest.name)} images" in launched.said[0]


@pytest.mark.parametrize(
    ("number", "status", "output"),
    [(signal.SIGINT, "130", "stopped at"), (signal.SIGKILL, "2", "another process of this run has ended")],
    ids=str,
)
def test_signal_to_one_of_two_processes_stops_both(launched, tmp_path, number, status, output):
    os.kill(int((tmp_path / "process-1").read_text()), number)
    assert ended(tmp_path, ["0"]) == {"0": status}
    assert output in launched.said[0]
    assert launched.ended() != [0]


def parent_death_signal() -> int:
    number = ctypes.c_int(-1)
    assert ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(number)) == 0
    return number.value


def test_a_process_without_a_launcher_outlives_its_parent(monkeypatch):
    for name in launch.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    launch.die_with_parent()
    assert parent_death_signal() == 0


@pytest.mark.parametrize(
    ("parents", "process_1", "expected"),
    [
        ([1000, 1], b"/sbin/init", [signal.SIGTERM]),
        ([1, 1], b"/sbin/init", [signal.SIGTERM]),
        ([1, 1], b"/usr/bin/python3\0/usr/bin/torchrun", []),  # in a container
        ([1000, 1000], b"/sbin/init", []),
    ],
)
def test_a_launcher_that_died_before_its_process_looked_is_noticed(monkeypatch, parents, process_1, expected):
    received = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: type("Library", (), {"prctl": lambda *numbers: 0}))
    monkeypatch.setattr(os, "getppid", iter(parents).__next__)
    monkeypatch.setattr(Path, "read_bytes", lambda path: process_1)
    monkeypatch.setattr(signal, "raise_signal", received.append)
    launch.die_with_parent()
    assert received == expected


def test_a_launcher_killed_during_start_up_leaves_no_process(tiny_flags, tmp_path):
    """Its process, which still imports torch, would wait for the other or train alone."""
    flags = [str(ROOT / "train.py"), *tiny_flags("run", *ENDLESS)]
    start = f"import subprocess, sys; print(subprocess.Popen([sys.executable, *{flags}]).pid, flush=True); input()"
    environment = {**program_environment(), "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", start], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as launcher:
        process = psutil.Process(int(launcher.stdout.readline()))
        wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process.is_running)
        launcher.kill()
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    assert not (tmp_path / "run").exists()


def test_a_process_of_several_does_not_train_alone(tiny, start_ranks, monkeypatch):
    """Accelerate takes MPI's processes on GPUs for one each. The second to come is waited for, train.timeout long."""
    with monkeypatch.context() as patch:
        patch.setenv("OMPI_COMM_WORLD_SIZE", "2")
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_SIZE"):
            fit(tiny("run"))
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    ranks = start_ranks(1, tiny("run", "--train.timeout", "1"))
    assert ranks.ended() == [2]
    assert "error: another process of this run" in ranks.said[0] and "Traceback" not in ranks.said[0]


def test_several_cpu_processes_of_accelerate_launch_are_refused(monkeypatch):
    """It starts one process, whose environment names a port to meet the others at, but no rank."""
    for name in launch.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_USE_CPU": "True"}.items():
        monkeypatch.setenv(name, value)
    launch.check_launch()
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match="torchrun --nproc_per_node"):
        launch.check_launch()
    monkeypatch.setenv("LOCAL_RANK", "0")
    launch.check_launch()


def test_what_a_second_signal_does(monkeypatch):
    """Ctrl-C says what it does and what a second one does. Schedulers send several: another signal ends nothing."""
    said, killed = [], []
    monkeypatch.setattr(stopping, "REPEAT_KEY_SECONDS", 0.0)
    monkeypatch.setattr(stopping.signal, "raise_signal", killed.append)
    for name in launch.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    with stopping.StopSignal(said.append) as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop.signum == signal.SIGINT and len(said) == 1 and "Ctrl-C again" in said[0] and not killed
        os.kill(os.getpid(), signal.SIGINT)
        assert killed == [signal.SIGINT] and "without saving" in said[1]
    assert {number: signal.getsignal(number) for number in stopping.SIGNALS} == before


def test_a_run_in_a_thread_leaves_signals_alone():
    """Only the main thread can handle them."""

    def handlers() -> list:
        with stopping.StopSignal():
            return [signal.getsignal(number) for number in stopping.SIGNALS]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handlers).result() == [signal.getsignal(number) for number in stopping.SIGNALS]


def test_signals_that_a_program_or_nohup_handles_are_theirs():
    received = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    try:
        with stopping.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert not stop and received == [1]
    finally:
        for number, handler in zip((signal.SIGHUP, signal.SIGUSR1), before, strict=True):
            signal.signal(number, handler)


def signal_twice(rank: int, number: int) -> Callable[[StepInfo], None]:
    """A signal after 24 images, and another in the middle of the checkpoint that follows."""
    stopping.REPEAT_SECONDS = stopping.REPEAT_KEY_SECONDS = 0.0
    write = checkpoint.write_tensors

    def after_step(step: StepInfo) -> None:
        if step.images == 24:
            signal.raise_signal(number)

    def signalled_write(file, *arguments, **options):
        write(file, *arguments, **options)
        if "000000032" in str(file) and file.name == "ema.safetensors":
            signal.raise_signal(number)

    checkpoint.write_tensors = signalled_write
    return after_step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_without_harm(tiny, finished, start_ranks, tmp_path, number):
    ranks = start_ranks(1, tiny("run"), signal_twice, number)
    assert ranks.ended() == [-number]
    assert "Traceback" not in ranks.said[0] and "stopped at" not in ranks.said[0]
    assert "stopping after this step, saving" in ranks.said[0] and "stopping without saving" in ranks.said[0]
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["000000024"]
    fit(tiny("run"))
    assert_same_run(tmp_path / "run", finished)
