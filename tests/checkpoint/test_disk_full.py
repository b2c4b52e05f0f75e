"""A run whose disk fills up: its message, the checkpoints left, and that it resumes once there is room."""

import ctypes
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from gnunet.checkpoint.checkpoint import list_checkpoints, verify_checkpoint
from gnunet.config import Config
from gnunet.errors import run_cli
from gnunet.training import fit

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
"""From <sched.h>: separate mounts, and separate users and groups."""


def train_in_a_small_folder(config: Config, kib: int, folder: Path) -> int:
    """Train in folder/run, a separate file system, and once more in another process after it has grown.

    `left` and `ended` are copies of it after each, `first.out` and `second.out` their output. Returns the first's
    exit status, or 77 if mounting is not permitted.
    """
    (folder / "run").mkdir()
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
        return 77
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder / "run")]
    if subprocess.run(mount).returncode != 0:
        return 77
    status = train_in_a_process(config, folder / "first.out")
    shutil.copytree(folder / "run", folder / "left")
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder / "run")], check=True)
    assert train_in_a_process(config, folder / "second.out") == 0, (folder / "second.out").read_text()
    shutil.copytree(folder / "run", folder / "ended")
    return status


def train_in_a_process(config: Config, output: Path) -> int:
    """The exit status of `gnunet train` in a forked process that prints into a file."""
    if (child := os.fork()) == 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(file, sys.stdout.fileno())
        os.dup2(file, sys.stderr.fileno())
        status = 1
        try:
            status = run_cli(lambda: fit(config) and None)
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("every", "rooms"), [("8", (0.5, 3.5)), ("0", (24, 32))], ids=["checkpoints", "others"])
def test_full_disk_loses_no_checkpoint(tiny, start_ranks, tmp_path, every, rooms):
    """Full while writing the first or a later checkpoint or, before there are any, a log or a grid."""
    more = ["--train.log_every=8", "--train.sample_every=8", f"--train.checkpoint_every={every}"]
    more += ["--train.keep_checkpoints=9", "--train.total_images=40", "--sampling.num_inference_steps=1"]
    fit(tiny("whole", *more))
    checkpoint = sum(path.stat().st_size for path in (tmp_path / "whole/checkpoints/000000040").iterdir()) / 1024
    for room in rooms:
        (small := tmp_path / f"small-{room}").mkdir()
        kib = int(room * (checkpoint if every == "8" else 1))
        process = start_ranks(1, partial(train_in_a_small_folder, tiny(f"{small.name}/run", *more), kib, small))
        (status,) = process.ended()
        if status == 77:
            pytest.skip("a small file system cannot be mounted here")
        assert status == 2, process.said
        said = (small / "first.out").read_text()
        assert "Traceback" not in said and "cannot be written" in said and "No space left" in said, said
        for path in list_checkpoints(small / "left/checkpoints"):
            verify_checkpoint(path)
        for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
            ended, whole = (folder / "checkpoints/000000040" / name for folder in (small / "ended", tmp_path / "whole"))
            assert ended.read_bytes() == whole.read_bytes()
        assert (small / "ended/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
