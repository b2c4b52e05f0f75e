"""The cost of a training step: activation memory, time, and the share of time in norm layers."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnunet.environment import activation_bytes
from gnunet.training.cuda_graph import WARM_UP_STEPS
from gnunet.training.session import Session
from gnunet.training.trainer import train_step

REPEATS = 5  # timings whose median is taken, after a warm-up
GPU_CALLS = 10  # calls of a norm layer in a timing on a GPU, which runs one while the next is queued


def activation_memory_mib(session: Session) -> float:
    """Memory that the forward pass of one micro-batch keeps for the backward pass, without weights, in MiB."""
    return activation_bytes(lambda: _losses(session), session.unet.parameters()) / 2**20


def _losses(session: Session) -> Tensor:
    """The losses of the first micro-batch of the run, in training mode."""
    indices = list(range(session.micro_batch_size))
    images, noise, level, labels, condition = session.to_device(session.train_set.__getitems__(indices))
    return session.process.loss(session.unet, images, noise, level, labels, condition)


@dataclass(frozen=True)
class StepCost:
    """The cost of an optimizer step on this device."""

    seconds: float
    norm_seconds: float | None  # seconds in norm layers; None where torch.compile fuses them with other layers
    peak_memory_mib: float | None  # on a GPU, including weights, EMA weights and optimizer; None on a CPU

    @property
    def norm_share(self) -> float | None:
        return None if self.norm_seconds is None else self.norm_seconds / self.seconds


def step_cost(session: Session) -> StepCost:
    """Time whole steps, and the norm layers' forward and backward passes alone on inputs of the same shapes.

    The norm layers include activation and conditioning. The work of a norm on convolutions (weight_norm,
    standardization) is not in its share. Changes the weights.
    """
    device = session.accelerator.device
    norms = None if session.config.train.compile else _norm_seconds(session) * session.accumulation
    total, size = session.total_images, session.config.train.batch_size
    batches = session.batches(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = 1 + (0 if session.graphs is None else WARM_UP_STEPS)
    starts = range(0, total, size)[: first + REPEATS]
    seconds = [_seconds(lambda start=start: train_step(session, batches, start), device) for start in starts]
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return StepCost(statistics.median(seconds[first:] or seconds), norms, peak)


def _norm_seconds(session: Session) -> float:
    """Seconds that the norm layers take in one micro-batch."""
    calls_seen: list[tuple[nn.Module, Tensor, dict[str, Tensor]]] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], tables: dict[str, Tensor | None]) -> None:
        shapes = {name: table.to("meta") for name, table in tables.items() if table is not None}
        calls_seen.append((module, args[0].to("meta"), shapes))

    def like(shape: Tensor) -> Tensor:
        return torch.randn_like(shape, device=device).requires_grad_()

    norms = session.unet.norm_layers().values()
    hooks = [norm.register_forward_pre_hook(record, with_kwargs=True) for norm in norms]
    with torch.no_grad():
        _losses(session)
    for hook in hooks:
        hook.remove()
    device, total = session.accelerator.device, 0.0
    calls = 1 if device.type == "cpu" else GPU_CALLS
    for module, shape, shapes in calls_seen:
        x, tables = like(shape), {name: like(table) for name, table in shapes.items()}
        with session.accelerator.autocast():
            grad = torch.randn_like(module(x, **tables))

        def run(module=module, x=x, tables=tables, grad=grad) -> None:
            with session.accelerator.autocast():
                y = module(x, **tables)
            y.backward(grad)

        run = run if session.graphs is None else session.graphs.captured(run)
        total += statistics.median([_seconds(run, device, calls) for _ in range(1 + REPEATS)][1:]) / calls
    session.strategy.optimizer.zero_grad()
    return total


def _seconds(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """The seconds that `calls` calls take."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
