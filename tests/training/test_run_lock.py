"""Two trainers on one folder, and a lock that dies with its owner."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from gnunet.errors import CheckpointError, ConfigError
from gnunet.training import fit
from gnunet.training.run_lock import RunLock

OWNER = """
import sys, time, os
from pathlib import Path
from gnunet.training.run_lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
if sys.argv[2] == "with a child" and os.fork() == 0:
    time.sleep(60)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """Start a process that has the lock of tmp_path."""
    started = []

    def start(child: str = "alone") -> subprocess.Popen:
        command = [sys.executable, "-c", OWNER, str(tmp_path), child]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_second_is_refused_and_told_who_is_the_first(owner, tmp_path):
    process = owner()
    with pytest.raises(ConfigError) as caught:
        RunLock(tmp_path).acquire()
    assert str(tmp_path) in str(caught.value) and f"process {process.pid} on " in str(caught.value)


@pytest.mark.parametrize("child", ["alone", "with a child"])
def test_the_lock_dies_with_its_owner(owner, tmp_path, child):
    process = owner(child)
    process.kill()
    process.wait()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_was_removed_in_between_is_taken_on_the_new_file(owner, tmp_path, monkeypatch):
    """Between our opening the file and locking it, its owner ended and another one came."""
    real, calls = os.open, []

    def slow_open(*arguments, **options):
        file = real(*arguments, **options)
        if not calls:
            calls.append((tmp_path / ".lock").unlink())
            owner()
        return file

    monkeypatch.setattr(os, "open", slow_open)
    with pytest.raises(ConfigError):
        RunLock(tmp_path).acquire()


def test_a_trainer_is_refused_before_anything_changes(tiny, tmp_path):
    fit(tiny("run"))
    before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "run"), "alone"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(ConfigError, match="is in use by process"):
        fit(tiny("run"))
    process.kill()
    process.communicate()
    (tmp_path / "run/.lock").unlink()
    assert {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()} == before
    assert fit(tiny("run")) == 0


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples", "checkpoints", ".lock"])
def test_a_run_does_not_write_through_links(tiny, tmp_path, name):
    """A folder that somebody else prepared; a link to a whole run is the user's own."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere" / "x")
    with pytest.raises(CheckpointError, match=f"{name} is a link"):
        fit(tiny("run"))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert fit(tiny("link", "--train.images", "8")) == 0


@pytest.mark.parametrize("line", ["[]", "{}", "not json", '{"images": "many"}', "[" * 100_000])
def test_a_damaged_log_is_named(tiny, tmp_path, line):
    fit(tiny("run"))
    log = tmp_path / "run/metrics.jsonl"
    log.write_text(line + "\n" + log.read_text())
    with pytest.raises(CheckpointError, match="metrics.jsonl, line 1: is no line of a log"):
        fit(tiny("run"))
