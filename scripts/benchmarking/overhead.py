"""How much of a step gnunet's own code takes, and how fast its loader is."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gnunet.config import Config
from gnunet.data import training_loader
from gnunet.training.session import Session, build, make_accelerator

from .loops import gnunet_loop
from .record import rounded

LOADER_SECONDS = 3.0
"""How long the loader is watched."""


def own_work(config: Config, folder: Path, steps: int) -> dict[str, Any]:
    """What a step of training takes beside the forward pass and loss, the backward pass and the optimizer.

    That is draws, loader, transfers, average, logging. The device is waited for at each border, so that on a GPU
    none of it hides behind the device's work, as it does in training.

    Returns:
        `step_seconds` and `overhead_share`, the medians over the steps, and `loader_examples_per_second`.
    """
    session = build(config, make_accelerator(config))
    clock = _Clock(session.accelerator.device)
    for owner, name in (
        (session.process, "loss"),
        (session.accelerator, "backward"),
        (session.accelerator, "clip_grad_norm_"),
        (session.optimizer, "step"),
        (session.optimizer, "zero_grad"),
    ):
        object.__setattr__(owner, name, clock.timed(getattr(owner, name)))
    loop = gnunet_loop(config, folder, session)
    loop.seconds(2)
    whole, shares = [], []
    for _ in range(steps):
        clock.seconds = 0.0
        whole.append(loop.seconds(1))
        shares.append(1 - clock.seconds / whole[-1])
    return {
        "step_seconds": rounded(statistics.median(whole)),
        "overhead_share": rounded(statistics.median(shares)),
        "loader_examples_per_second": loader_speed(session),
    }


def loader_speed(session: Session) -> float:
    """Examples a second of the training loader with two processes, draws included, when nothing else is to be done."""
    train = session.config.train
    batches = iter(
        training_loader(
            session.examples, first=0, last=10**9, batch_size=train.batch_size,
            micro_batch_size=session.micro_batch_size, num_workers=2,
        )
    )  # fmt: skip
    for _ in range(20):  # until both processes have started
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < LOADER_SECONDS:
        count += len(next(batches)["index"])
    return rounded(count / (time.perf_counter() - start))


class _Clock:
    """Adds up the time that functions take."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            start = self._now()
            result = function(*arguments, **options)
            self.seconds += self._now() - start
            return result

        return run

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
