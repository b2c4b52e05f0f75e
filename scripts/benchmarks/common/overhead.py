"""How much of a step gnunet's own code takes, and how fast its loader is."""

import io
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gnunet.config import Config, EvaluateConfig
from gnunet.data import TrainingLoader
from gnunet.training import StepInfo, fit
from gnunet.training.session import Session

from .record import rounded

LINE_EVERY = 5
"""Steps between lines of the log while steps are timed; the lines' time is shared out by the run's own log_every."""
LOADER_SECONDS = 3.0
"""How long the loader is watched."""


def framework_overhead(config: Config, folder: Path, steps: int) -> dict[str, Any]:
    """Measure what a training step spends outside forward pass and loss, backward pass and optimizer.

    That is draws, loader, transfers, average, progress and logging, in the trainer's own loop. The device is waited
    for at each border, so that on a GPU none of it hides behind the device's work, as it does in training.

    Args:
        config: what is trained; nothing is validated, sampled or saved.
        folder: where the run's folder goes.
        steps: how many are timed; LINE_EVERY at least.

    Returns:
        `step_seconds` and `overhead_share`, by medians over the steps, and `loader_examples_per_second`.
    """
    train = config.train
    never = {"validate_every": 0, "sample_every": 0, "checkpoint_every": 0}  # but at the end, which never comes
    timed = train.model_copy(update={**never, "total_images": 10**9, "log_every": LINE_EVERY * train.batch_size})
    timed = timed.model_copy(update={"cuda_graph": False})  # which has no borders between its parts
    update = {"run_dir": str(folder / "framework_overhead"), "train": timed, "evaluate": EvaluateConfig()}
    watch = _StepTimer(LINE_EVERY + max(steps, LINE_EVERY))
    with redirect_stdout(io.StringIO()), suppress(_StopTiming):
        fit(config.model_copy(update=update), watch)

    wholes, own = watch.steps(first=LINE_EVERY)
    plain = [seconds for number, seconds in enumerate(own, start=1) if number % LINE_EVERY]
    with_line = own[LINE_EVERY - 1 :: LINE_EVERY]
    line = max(median(with_line) - median(plain), 0.0)
    return {
        "step_seconds": rounded(median(wholes)),
        "overhead_share": rounded((median(plain) + line * train.batch_size / train.log_every) / median(wholes)),
        "loader_examples_per_second": loader_speed(watch.session),
    }


def loader_speed(session: Session) -> float:
    """Examples a second of the training loader with two processes, draws included, when nothing else is to be done."""
    train = session.config.train
    batches = iter(
        TrainingLoader(
            session.train_set, first=0, last=10**9, batch_size=train.batch_size,
            micro_batch_size=session.micro_batch_size, num_workers=2,
        )
    )  # fmt: skip
    for _ in range(20):  # until both processes have started
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < LOADER_SECONDS:
        count += len(next(batches)["index"])
    return rounded(count / (time.perf_counter() - start))


class _StopTiming(Exception):
    """Ends the run when enough steps are timed."""


class _StepTimer:
    """A callback of `fit` that notes when each step ends, and what was spent until then on the network.

    Args:
        count: steps after which the run is ended.
    """

    session: Session

    def __init__(self, count: int) -> None:
        self.count = count
        self._spent = 0.0
        self._ended: list[tuple[float, float]] = []  # the time, and what was spent before

    def __call__(self, step: StepInfo) -> None:
        if not self._ended:
            self.session = step.session
            self._watch_network(step.session)
        self._ended.append((self._now(), self._spent))
        if len(self._ended) > self.count:
            raise _StopTiming

    def _watch_network(self, session: Session) -> None:
        for owner, name in (
            (session.process, "loss_and_objective"),
            (session.strategy, "backward"),
            (session.strategy, "clip"),
            (session.strategy, "step"),
            (session.strategy, "skip_step"),
        ):
            object.__setattr__(owner, name, self._timed(getattr(owner, name)))

    def steps(self, first: int) -> tuple[list[float], list[float]]:
        """The seconds from the end of each step to that of the next, and what of them was spent elsewhere."""
        times = self._ended[first:]
        wholes = [after[0] - before[0] for before, after in zip(times, times[1:], strict=False)]
        spent = [after[1] - before[1] for before, after in zip(times, times[1:], strict=False)]
        return wholes, [whole - part for whole, part in zip(wholes, spent, strict=True)]

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            start = self._now()
            result = function(*arguments, **options)
            self._spent += self._now() - start
            return result

        return run

    def _now(self) -> float:
        device = self.session.accelerator.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
