"""Signals to a launcher, to one of its processes, and a second time: a checkpoint, the right status, no harm."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gnunet.checkpoint import checkpoint
from gnunet.checkpoint.checkpoint import list_checkpoints, newest_checkpoint
from gnunet.distributed import launch
from gnunet.distributed import signals as stopping
from gnunet.training import fit
from gnunet.training.session import Session

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import train
# Once one process has ended, torch's agent sends the others SIGTERM: none may die of it before it has written its
# status. While it trains, gnunet's own handling is in force.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
try:
    status = train.main(sys.argv[1:])
except SystemExit as ended:  # as the processes that started others end
    status = ended.code
Path("status-" + os.environ.get("RANK", "first")).write_text(str(status))
sys.exit(status)
"""
"""train.py that writes down how it ends, since a launcher's own status does not say."""
PR_GET_PDEATHSIG = 2
LAUNCHERS = {1: "cpu.yaml", 2: "cpu_2.yaml"}
"""For so many processes, in configs/accelerate."""
ENDLESS = ["--train.total_images", "1000000", "--train.log_every", "8", "--train.checkpoint_every", "0",
           "--train.sample_every", "0", "--train.validate_every", "0"]  # fmt: skip


@pytest.fixture
def launched(tiny_flags, tmp_path):
    """Start an endless tiny run by `accelerate launch` as so many processes; gives the launcher once it trains."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    started = []

    def start(processes: int) -> subprocess.Popen:
        config_file = ROOT / "configs/accelerate" / LAUNCHERS[processes]
        command = ["-m", "accelerate.commands.launch", "--config_file", str(config_file), str(program)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        with (tmp_path / "said").open("w") as said:
            launcher = subprocess.Popen(
                [sys.executable, *command, *tiny_flags("run", *ENDLESS)], cwd=tmp_path, env=environment,
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
        started.append(launcher)
        log = tmp_path / "run/metrics.jsonl"
        wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2, launcher, tmp_path)
        return launcher

    yield start
    for process in psutil.process_iter():  # of several sessions
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(tmp_path):
                process.kill()
    for launcher in started:
        launcher.communicate()


def wait_for(condition, launcher: subprocess.Popen | None, folder: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and (launcher is None or launcher.poll() is None), (folder / "said").read_text()
        time.sleep(0.05)


def ended(folder: Path, names: list[str]) -> dict[str, str]:
    """The status of each process once all have ended."""
    files = {name: folder / f"status-{name}" for name in names}
    wait_for(lambda: all(file.exists() and file.read_text() for file in files.values()), None, folder)
    return {name: file.read_text() for name, file in files.items()}


def assert_resumable(folder: Path) -> None:
    newest = newest_checkpoint(folder / "run/checkpoints")
    said = (folder / "said").read_text()
    assert f"stopped at {int(newest.name)} images, checkpoint written; the same command resumes the run" in said


@pytest.mark.slow
def test_sigterm_to_the_launcher_of_one_process(launched, tmp_path):
    """Accelerate does not pass it on: the trainer notices that the launcher is gone."""
    launched(1).send_signal(signal.SIGTERM)
    assert ended(tmp_path, ["first"]) == {"first": "143"}
    assert_resumable(tmp_path)


@pytest.mark.slow
def test_sigterm_to_the_launcher_of_two_processes(launched, tmp_path):
    launched(2).send_signal(signal.SIGTERM)
    assert ended(tmp_path, ["first", "0", "1"]) == {"first": "143", "0": "143", "1": "143"}
    assert_resumable(tmp_path)


@pytest.mark.slow
def test_sigint_to_one_of_two_processes(launched, tmp_path):
    launcher = launched(2)
    (agent,) = psutil.Process(launcher.pid).children()
    (one,) = (process for process in agent.children() if process.environ().get("RANK") == "1")
    one.send_signal(signal.SIGINT)
    assert ended(tmp_path, ["first", "0", "1"]) == {"first": "130", "0": "130", "1": "130"}
    assert_resumable(tmp_path)
    assert launcher.wait(600) != 0


@pytest.mark.slow
def test_kill_9_of_one_of_two_processes(launched, tmp_path):
    launcher = launched(2)
    (agent,) = psutil.Process(launcher.pid).children()
    (one,) = (process for process in agent.children() if process.environ().get("RANK") == "1")
    one.kill()
    assert ended(tmp_path, ["first", "0"]) == {"first": "137", "0": "2"}
    assert "another process of this run has ended" in (tmp_path / "said").read_text()
    assert launcher.wait(600) != 0


def test_a_process_without_a_launcher_is_left_alone():
    """A trainer that a shell started in the background outlives it."""
    launch.die_with_parent(psutil.Process().parent())
    number = ctypes.c_int(-1)
    assert ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(number)) == 0
    assert number.value == 0


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("python /venv/bin/accelerate launch --cpu train.py", ["--cpu", "train.py"]),
        ("python -m accelerate.commands.launch train.py", ["train.py"]),
        ("python -m accelerate.commands.accelerate_cli launch train.py", ["train.py"]),
        ("/venv/bin/accelerate-launch train.py", ["train.py"]),
        ("python /somewhere/accelerate/commands/launch.py train.py", ["train.py"]),
        ("python my_launch.py train.py", None),
        ("bash launch train.py", None),
        ("bash", None),
    ],
)
def test_which_parents_are_accelerates_launcher(monkeypatch, command, options):
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: command.split())
    assert launch.launch_options(psutil.Process()) == options


def test_a_launcher_that_has_died_stops_the_process_at_once(monkeypatch):
    """Between being found and being tied to."""
    received = []
    monkeypatch.setattr(launch, "is_launcher", lambda process: True)
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: type("Library", (), {"prctl": lambda *numbers: 0}))
    monkeypatch.setattr(signal, "raise_signal", received.append)
    launch.die_with_parent(psutil.Process())  # not the parent
    assert received == [signal.SIGTERM]


def signal_twice(rank: int, number: int) -> None:
    """A signal in the step after 32 images, and another in the middle of the checkpoint that follows."""
    stopping.REPEAT_SECONDS = 0.0
    step, write = Session.step, checkpoint.write_tensors

    def signalled(self, batches, images_seen, *, stop):
        if images_seen == 32:
            signal.raise_signal(number)
            stop = True
        return step(self, batches, images_seen, stop=stop)

    def signalled_write(file, *arguments, **options):
        write(file, *arguments, **options)
        if "000000040" in str(file) and file.name == "ema.safetensors":
            signal.raise_signal(number)

    Session.step, checkpoint.write_tensors = signalled, signalled_write


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_without_harm(tiny, finished, start_ranks, tmp_path, number):
    ranks = start_ranks(1, tiny("run"), signal_twice, number)
    assert ranks.ended() == [-number]
    assert "Traceback" not in ranks.said[0] and "stopped at" not in ranks.said[0]
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["000000024"]
    fit(tiny("run"))
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"):
        run, whole = (each / "checkpoints/000000064" / name for each in (tmp_path / "run", finished))
        assert run.read_bytes() == whole.read_bytes()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
