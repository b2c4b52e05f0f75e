"""What a training step costs: what it keeps for backward, and the share of its time that goes into norm layers."""

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

REPEATS = 5
"""Timings, of which the median is taken, after one that is thrown away; of steps also those before a CUDA graph."""
GPU_CALLS = 10
"""Calls of a norm layer in a timing on a GPU, which works on one while the next is sent to it."""


def saved_mib(session: Session) -> float:
    """What a forward pass of one micro-batch keeps for backward, in MiB, weights left out."""
    return activation_bytes(lambda: _losses(session), session.unet.parameters()) / 2**20


def _losses(session: Session) -> Tensor:
    """The losses of the run's first micro-batch, in training mode."""
    indices = list(range(session.micro_batch_size))
    images, noise, level, labels = session.to_device(session.train_set.__getitems__(indices))
    return session.process.loss(session.unet, images, noise, level, labels)


@dataclass(frozen=True)
class StepCost:
    """What a step of training costs on this device."""

    seconds: float
    norm_seconds: float | None
    """Of which in norm layers; None where torch.compile has mixed them with other layers."""
    peak_memory_mib: float | None
    """Of a GPU, weights, average and optimizer included; None on a CPU."""

    @property
    def norm_share(self) -> float | None:
        return None if self.norm_seconds is None else self.norm_seconds / self.seconds


def step_cost(session: Session) -> StepCost:
    """Time whole steps, and the norm layers' forward and backward passes alone on inputs of the same shapes.

    The norm layers do the activation and the conditioning too. What a norm does to convolutions (weight_norm,
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
    seen: list[tuple[nn.Module, list[_Like], dict[str, _Like]]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], tables: dict[str, Tensor | None]) -> None:
        given = {name: _Like.of(table) for name, table in tables.items() if table is not None}
        seen.append((module, [_Like.of(x) for x in args], given))

    norms = session.unet.norm_layers().values()
    hooks = [norm.register_forward_pre_hook(note, with_kwargs=True) for norm in norms]
    with torch.no_grad():
        _losses(session)
    for hook in hooks:
        hook.remove()
    device, total = session.accelerator.device, 0.0
    calls = 1 if device.type == "cpu" else GPU_CALLS
    for module, args, tables in seen:
        inputs, conditions = [like.make() for like in args], {name: like.make() for name, like in tables.items()}
        with session.accelerator.autocast():
            grad = torch.randn_like(module(*inputs, **conditions))

        def run(module=module, inputs=inputs, conditions=conditions, grad=grad) -> None:
            with session.accelerator.autocast():
                y = module(*inputs, **conditions)
            y.backward(grad)

        run = run if session.graphs is None else session.graphs.captured(run)
        total += statistics.median([_seconds(run, device, calls) for _ in range(1 + REPEATS)][1:]) / calls
    session.strategy.optimizer.zero_grad()
    return total


@dataclass(frozen=True)
class _Like:
    """What there is to know of a tensor to make another that takes as long to compute with."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "_Like":
        channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        return cls(tensor.shape, tensor.dtype, tensor.device, channels_last)

    def make(self) -> Tensor:
        tensor = torch.randn(self.shape, dtype=self.dtype, device=self.device)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return tensor.contiguous(memory_format=layout).requires_grad_()


def _seconds(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """How long so many calls take."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Until the device has done all that it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
