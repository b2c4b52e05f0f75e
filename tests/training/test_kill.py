"""kill -9 at any moment: the same command resumes, and the run ends bit-identical to an undisturbed one."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from gnunet.config import Config
from gnunet.training import fit
from tests.runs import contents

IN_TIME, IN_FILES = 4, 16
"""Moments at random times after the start, and at changes of files, spread over all of them."""
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}

server = multiprocessing.get_context("forkserver")


def train(config: Config, watched: Path, kill_at: int, counted: "multiprocessing.Queue | None" = None) -> None:
    """`fit`, in a process that kills itself just before the change number `kill_at` of a file below a folder."""
    os.chdir(watched)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    changes = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal changes
        if event not in CHANGES or not str(arguments[0]).startswith(str(watched)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        changes += 1
        if changes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    fit(config)
    if counted is not None:
        counted.put(changes)
        counted.close()
        counted.join_thread()
    os._exit(0)


def run(*arguments) -> int:
    process = server.Process(target=train, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_bit_identically(tiny, tmp_path):
    """At changes of files in the cache, the log, grids, checkpoints, their rotation and the export, and at any time."""
    little = ["--sampling.num_inference_steps", "1", "--sampling.num_images", "2", "--validation.num_examples", "4"]
    config = tiny("run", "--evaluate.monitor", "validation_loss", "--train.total_images", "40", *little)
    folder = tmp_path / "run"
    counted, start = server.Queue(), time.monotonic()
    assert run(config, tmp_path, 0, counted) == 0
    seconds, changes = time.monotonic() - start, counted.get()
    whole = contents(folder)
    assert {"metrics.jsonl", "samples/000000040.png", "checkpoints/000000040/ema.safetensors"} < whole.keys()

    draw = random.Random(0)
    moments = [draw.randint(1 + changes * i // IN_FILES, changes * (i + 1) // IN_FILES) for i in range(IN_FILES)]
    for moment in [*moments, *(-draw.uniform(0, seconds) for _ in range(IN_TIME))]:
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "cache")
        process = server.Process(target=train, args=(config, tmp_path, max(moment, 0)))
        process.start()
        process.join(-moment if moment < 0 else None)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL or moment < 0
        assert run(config, tmp_path, 0) == 0, f"killed at {moment}"
        again = contents(folder)
        differ = {name for name in again.keys() | whole if again.get(name) != whole.get(name)}
        assert not differ - {"timing.jsonl"}, f"killed at {moment}"
        assert not list(folder.glob(".*")), "something half written is left"
