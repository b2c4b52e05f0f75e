"""For tests that train: what a run has written, faults in the middle of a step, launches."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gnunet.config import Config
from gnunet.training import fit
from gnunet.training.session import Session

ROOT = Path(__file__).parents[1]
FINAL = "checkpoints/000000064"
"""The last checkpoint of a tiny run."""
LITTLE = ["--sampling.num_inference_steps", "1", "--sampling.num_images", "1", "--validation.num_examples", "4"]
"""For runs whose grids and validation losses no test looks at."""
SHORT = [*LITTLE, "--train.total_images", "16"]
"""For runs that are only to have a checkpoint."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
            "--rdzv_endpoint", "localhost:0"]  # fmt: skip
"""Two processes; the endpoint lets the system choose a port."""
SHARDED = {
    "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    "zero2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"},
}
"""What `accelerate launch` sets in its processes' environment by configs/accelerate/fsdp2.yaml and zero2.yaml."""


def read_log(run: Path, key: str = "images") -> list[dict]:
    """The records of metrics.jsonl that have a key, which all have by default."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if key in record]


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def assert_same_run(run: Path, expected: Path) -> None:
    """Every file of two runs has the same bytes, but for the times and what names the run's folder and options."""
    ours, theirs = contents(run), contents(expected)
    differ = {Path(name) for name in ours.keys() | theirs if ours.get(name) != theirs.get(name)}
    assert not [path for path in differ if path.name not in ("timing.jsonl", "config.yaml", "manifest.json")]


def fit_until(images_seen: int, config: Config) -> None:
    """Train; SIGTERM after `images_seen` images ends the run in the step that follows."""
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        fit(config, lambda step: signal.raise_signal(signal.SIGTERM) if step.images == images_seen else None)


def to_device_with(act: Callable[[Session, dict[str, Tensor], Tensor], None]) -> Callable:
    """Session.to_device that has `act` see each micro-batch and its images on the device, which it may change."""
    to_device = Session.to_device

    def to_device_and_act(self, batch):
        images, *others = to_device(self, batch)
        act(self, batch, images)
        return images, *others

    return to_device_and_act


def poisoned(examples: set[int], value: float = math.nan) -> Callable:
    """Session.to_device with a pixel of these examples set to `value`."""

    def poison(session, batch, images):
        chosen = [index in examples for index in batch["index"].tolist()]
        images[torch.tensor(chosen, device=images.device), 0, 0, 0] = value

    return to_device_with(poison)


def signal_in_step(rank: int, target: int, images_seen: int, number: int) -> None:
    """Have the process of rank `target` send itself a signal in the middle of the step after `images_seen` images."""

    def act(session, batch, images):
        first = images_seen <= int(batch["index"][0]) < images_seen + session.config.train.batch_size
        if rank == target and first:
            os.kill(os.getpid(), number)

    Session.to_device = to_device_with(act)


def wait_until(reached: Callable[[], object], is_alive: Callable[[], bool] = lambda: True) -> None:
    """Wait for something that a process does; it may take long on a busy machine."""
    end = time.monotonic() + 600
    while not reached():
        assert is_alive() and time.monotonic() < end
        time.sleep(0.05)


def program_environment() -> dict[str, str]:
    """The environment of a program that a test starts."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
