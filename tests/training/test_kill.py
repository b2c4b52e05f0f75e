"""kill -9 at any moment: the same command resumes, and the run ends bit-identical to an undisturbed one."""

import gc
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from gnunet.config import Config
from gnunet.training import fit
from tests.runs import contents

MOMENTS = [
    ("os.rename cache/.images", 1),
    ("os.rename run/.data.json.tmp", 1),
    ("os.rename run/checkpoints/.000000024.tmp", 1),  # the first checkpoint is complete but for its name
    ("open run/metrics.jsonl", 2),  # it is there, and lines that follow it are written
    ("os.rename run/samples/.000000032.png.tmp", 1),
    ("open run/checkpoints/.000000032.tmp/manifest.json", 1),
    ("os.rename run/checkpoints/.best.tmp", 1),  # the best checkpoint has no pointer yet
    ("os.rename run/.model.tmp", 2),  # between the two renames that replace the exported model
    ("os.rename run/checkpoints/000000024", 1),  # one checkpoint too many
    ("os.rmdir run/checkpoints/.000000024.removed", 1),
    ("os.remove run/.lock", 1),
]
"""The change of a file just before which the run is killed, and which such change."""
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}

server = multiprocessing.get_context("forkserver")


def train(config: Config, watched: Path, moment: str = "", count: int = 1) -> None:
    """`fit`, in a process that kills itself just before a change of a file below a folder."""
    gc.freeze()
    os.chdir(watched)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if moment and f"{event} {arguments[0]}".startswith(moment.replace(" ", f" {watched}/")):
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    fit(config)
    os._exit(0)


def run(*arguments) -> int:
    process = server.Process(target=train, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_bit_identically(tiny, tmp_path):
    """At changes of the cache, the log, a grid, a checkpoint, the best one, their rotation, the export and the lock."""
    little = ["--sampling.num_inference_steps", "1", "--sampling.num_images", "2", "--validation.num_examples", "4"]
    config = tiny("run", "--evaluate.monitor", "validation_loss", "--train.total_images", "40", *little)
    folder = tmp_path / "run"
    assert run(config, tmp_path) == 0
    whole = contents(folder)
    assert {"metrics.jsonl", "samples/000000040.png", "checkpoints/000000040/ema.safetensors"} < whole.keys()
    for moment in MOMENTS:
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "cache")
        assert run(config, tmp_path, *moment) == -signal.SIGKILL, moment
        assert run(config, tmp_path) == 0, moment
        again = contents(folder)
        differ = {name for name in again.keys() | whole if again.get(name) != whole.get(name)}
        assert not differ - {"timing.jsonl"}, moment
        assert not list(folder.glob(".*")), "something half written is left"
