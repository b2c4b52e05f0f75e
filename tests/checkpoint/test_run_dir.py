"""Two trainers in one directory, a lock that is free once its owner is killed, and directories that others prepared."""

import contextlib
import json
import os
import shutil
import signal
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from gnunet.checkpoint.checkpoint import checkpoint_name, file_sha256
from gnunet.checkpoint.run_dir import FILES, FOLDERS, RunDir, RunLock, find_autoencoder
from gnunet.config import Config, load_config
from gnunet.data.sources import open_source
from gnunet.errors import CheckpointError, ConfigError, GnunetError, TrainingError
from gnunet.models.pretrained import find_model
from gnunet.training import fit


def hold(folder: Path, fork: bool) -> int:
    """Hold the lock of a directory indefinitely; with `fork` also start a child, which outlives this process."""
    lock = RunLock(folder)  # released when it is collected
    lock.acquire()
    if not fork or os.fork() != 0:
        print("locked", flush=True)
    while True:
        signal.pause()


@pytest.fixture
def owner(start_ranks):
    """Start a process that holds the lock of a directory."""
    started = []

    def start(folder: Path, fork: bool = False) -> BaseProcess:
        ranks = start_ranks(1, partial(hold, folder, fork))
        started.extend(ranks)
        while "locked" not in ranks.said[0]:
            assert ranks[0].is_alive(), ranks.said
            time.sleep(0.02)
        return ranks[0]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("fork", [False, True])
def test_lock_names_its_owner_and_is_free_at_once_when_that_is_killed(owner, tmp_path, fork):
    (folder := tmp_path / "folder").mkdir()
    process = owner(folder, fork)
    with pytest.raises(ConfigError) as caught:
        RunLock(folder).acquire()
    assert str(folder) in str(caught.value) and f"process {process.pid} on {os.uname().nodename}" in str(caught.value)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    lock = RunLock(folder)
    lock.acquire()
    lock.release()
    assert list(folder.iterdir()) == []


def test_trainer_is_rejected_before_it_changes_a_locked_directory(tiny, run, owner):
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    process = owner(run)
    with pytest.raises(ConfigError, match=f"run_dir: .*process {process.pid} on "):
        fit(tiny("run"))
    process.kill()
    process.join()
    (run / ".lock").unlink()
    assert {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()} == before
    fit(tiny("run"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples", "checkpoints", ".lock", "autoencoder/x"])
def test_run_does_not_write_through_links(tiny, tmp_path, name):
    """Links in a directory that somebody else prepared; a link to a whole run is the user's own."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere" / "x")
    with pytest.raises(CheckpointError, match=name):
        fit(tiny("run"))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    fit(tiny("link", "--train.total_images", "8"))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, Path.touch], ids=["fifo", "directory", "file"])
def test_an_entry_of_another_kind_is_named(tiny, run, make):
    for name in (*FOLDERS, *FILES):
        if name in FILES and make == Path.touch or name in FOLDERS and make == os.mkdir:
            continue
        kept = (run / name).rename(run / "kept") if (run / name).exists() else None
        make(run / name)
        with pytest.raises(CheckpointError, match=f"{name} is (not|missing)"):
            fit(tiny("run"))
        os.rmdir(run / name) if make == os.mkdir else os.unlink(run / name)
        if kept is not None:
            kept.rename(run / name)
    fit(tiny("run"))


def test_a_file_that_cannot_be_written_is_named(tiny, run):
    shutil.rmtree(run / "checkpoints/000000064")
    (run / "samples/000000064.png").unlink()
    (run / "samples/000000064.png").mkdir()
    with pytest.raises(TrainingError, match="samples/000000064.png"):
        fit(tiny("run"))
    (run / "samples/000000064.png").rmdir()
    fit(tiny("run"))


@pytest.mark.parametrize("content", [bytes(range(128, 256)), b"\xff\xfe\n\n", b"PK\x03\x04\n"])
def test_a_log_that_is_not_text_is_named(tiny, run, content):
    (run / "metrics.jsonl").write_bytes(content)
    with pytest.raises(CheckpointError, match="metrics.jsonl, line 1"):
        fit(tiny("run"))
    assert (run / "metrics.jsonl").read_bytes() == content


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
def test_a_model_of_others_is_not_replaced(tiny, tmp_path, file):
    path = tmp_path / "run" / "model" / file
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(CheckpointError, match="model.*gnunet.json"):
        RunDir(tiny("run")).check()


def test_files_of_others_stay_beside_the_exported_model(tiny, run):
    """Also those that a crash left in the model that was being replaced."""
    (run / "model" / "README.md").write_text("mine")
    (run / "model").rename(run / ".model.removed")
    shutil.rmtree(run / "checkpoints" / sorted(os.listdir(run / "checkpoints"))[-1])
    fit(tiny("run"))
    assert (run / "model" / "README.md").read_text() == "mine"
    assert (run / "model" / "gnunet.json").is_file()


@pytest.mark.parametrize("count", [10**12, 63])
def test_a_number_of_images_that_no_run_has_is_not_believed(tiny, run, count):
    (newest := sorted((run / "checkpoints").glob("0*"))[-1]).rename(path := newest.with_name(checkpoint_name(count)))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "images": count, "reported": count}))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "state.json": file_sha256(path / "state.json")}))
    with pytest.raises(GnunetError, match=f"{count} images"):
        fit(tiny("run"))


@pytest.mark.parametrize("line", ["[]", "{}", "not json", '{"images": "many"}', "[" * 100_000])
def test_damaged_log_is_named(tiny, run, line):
    log = run / "metrics.jsonl"
    log.write_text(line + "\n" + log.read_text())
    with pytest.raises(CheckpointError, match="metrics.jsonl, line 1"):
        fit(tiny("run"))


def test_an_unknown_user_and_a_checkpoint_at_the_root(tmp_path):
    config = load_config({"data": {"autoencoder": "~nosuchuser/vae"}, "model": {"in_channels": 4}})
    with pytest.raises(GnunetError, match="~nosuchuser"):
        find_autoencoder(config, Path("/checkpoint"))
    for call in (find_model, partial(open_source, split="train"), lambda path: RunDir(Config(run_dir=path))):
        with pytest.raises(GnunetError, match="~nosuchuser"):
            call("~nosuchuser/x")
