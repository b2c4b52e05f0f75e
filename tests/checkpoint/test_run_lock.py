"""Two trainers on one folder, and a lock that dies with its owner."""

import contextlib
import os
import signal
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from gnunet.checkpoint.run_lock import RunLock
from gnunet.errors import CheckpointError, ConfigError
from gnunet.training import fit


def hold(folder: Path, child: str) -> int:
    """Have the lock of a folder for ever, with a child that outlives this process or alone."""
    RunLock(folder).acquire()
    if child == "alone" or os.fork() != 0:
        print("locked", flush=True)
    while True:
        signal.pause()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.fixture
def owner(start_ranks):
    """Start a process that has the lock of a folder."""
    started = []

    def start(folder: Path, child: str = "alone") -> BaseProcess:
        ranks = start_ranks(1, partial(hold, folder, child))
        started.extend(ranks)
        while "locked" not in ranks.said[0]:
            assert ranks[0].is_alive(), ranks.said
            time.sleep(0.02)
        return ranks[0]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_the_second_is_refused_and_told_who_is_the_first(owner, folder):
    process = owner(folder)
    with pytest.raises(ConfigError) as caught:
        RunLock(folder).acquire()
    assert str(folder) in str(caught.value) and f"process {process.pid} on " in str(caught.value)


@pytest.mark.parametrize("child", ["alone", "with a child"])
def test_the_lock_dies_with_its_owner(owner, folder, child):
    process = owner(folder, child)
    process.kill()
    process.join()
    lock = RunLock(folder)
    lock.acquire()
    lock.release()
    assert list(folder.iterdir()) == []


def test_a_lock_whose_file_was_removed_in_between_is_taken_on_the_new_file(owner, folder, monkeypatch):
    """Between our opening the file and locking it, its owner ended and another one came."""
    real, calls = os.open, []

    def slow_open(*arguments, **options):
        file = real(*arguments, **options)
        if not calls:
            calls.append((folder / ".lock").unlink())
            owner(folder)
        return file

    monkeypatch.setattr(os, "open", slow_open)
    with pytest.raises(ConfigError):
        RunLock(folder).acquire()


def test_a_trainer_is_refused_before_anything_changes(tiny, run, owner):
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    process = owner(run)
    with pytest.raises(ConfigError, match="is in use by process"):
        fit(tiny("run"))
    process.kill()
    process.join()
    (run / ".lock").unlink()
    assert {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()} == before
    fit(tiny("run"))


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
    fit(tiny("link", "--train.total_images", "8"))


@pytest.mark.parametrize("line", ["[]", "{}", "not json", '{"images": "many"}', "[" * 100_000])
def test_a_damaged_log_is_named(tiny, run, line):
    log = run / "metrics.jsonl"
    log.write_text(line + "\n" + log.read_text())
    with pytest.raises(CheckpointError, match="metrics.jsonl, line 1: is no line of a log"):
        fit(tiny("run"))
