"""Operators made of kernels: allocations and launches are planned once for all arguments of one signature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import TENSORS, NormArgs
from .layout import dense, is_channels_last, with_strides_of

FORWARD_TENSORS = (*TENSORS, "y")
"""What the forward kernels are given, in this order, before a plan's own buffers."""
BACKWARD_TENSORS = (*TENSORS, "dy", "stats", *(f"d{name}" for name in TENSORS))
"""The same of the backward kernels."""
Execute = Callable[[tuple[Tensor | None, ...]], None]
"""Launches the kernels of a plan on these tensors."""


class Plan(NamedTuple):
    launches: list[Any]
    buffers: dict[str, int]
    """Name and number of fp32 elements of each tensor to allocate in addition to y and the gradients; forward has one,
    "stats"."""


class Planner(NamedTuple):
    """How a backend plans and launches its kernels."""

    plan_forward: Callable[[NormArgs], Plan]
    plan_backward: Callable[[NormArgs, Sequence[bool]], Plan]
    """For the gradients that are needed."""
    executable: Callable[[Sequence[Any], tuple[str, ...], int | None], Execute]
    """From the launches of a plan, the names of its tensors and the index of the device."""


@dataclass(frozen=True)
class Shape:
    """The properties of x that its tiling depends on. channels_last: in memory (N, S, C), else (N, C, S); S positions.

    The batch size is not one of them, so that a sample is reduced in the same order, with bit-identical results, in any
    batch.
    """

    positions: int
    channels: int
    num_groups: int
    itemsize: int
    channels_last: bool

    @classmethod
    def of(cls, args: NormArgs) -> Shape:
        x = args.x
        positions, channels = int(x.shape[2:].numel()), int(x.shape[1])
        return cls(positions, channels, args.num_groups, x.element_size(), positions == 1 or is_channels_last(x))

    @property
    def group_channels(self) -> int:
        return self.channels // self.num_groups


class PlannedOperator:
    """An `autograd.Operator` for arguments of one signature."""

    def __init__(self, args: NormArgs, planner: Planner) -> None:
        self.planner = planner
        self.copies = any(a is not b for a, b in zip(dense(args).tensors, args.tensors, strict=True))
        self.plans: dict[tuple[bool, ...], tuple[list[Tensor | None], Execute]] = {}

    def forward(self, args: NormArgs) -> tuple[Tensor, Tensor]:
        inner = dense(args) if self.copies else args
        plan = self.plans.get(()) or self._prepare((), inner, self.planner.plan_forward(inner), FORWARD_TENSORS)
        y, stats = run_forward(inner, *plan)
        return (with_strides_of(y, torch.empty_like(args.x)) if self.copies else y), stats

    def backward(self, dy: Tensor, stats: Tensor, args: NormArgs, needs: Sequence[bool]) -> list[Tensor]:
        inner = dense(args) if self.copies else args
        key = tuple(needs)
        plan = self.plans.get(key)
        plan = plan or self._prepare(key, inner, self.planner.plan_backward(inner, needs), BACKWARD_TENSORS)
        grads = run_backward(with_strides_of(dy, inner.x), stats, inner, needs, *plan)
        if self.copies and needs[0]:
            grads[0] = with_strides_of(grads[0], torch.empty_like(args.x))
        return grads

    def _prepare(
        self, key: tuple[bool, ...], inner: NormArgs, plan: Plan, names: tuple[str, ...]
    ) -> tuple[list[Tensor | None], Execute]:
        execute = self.planner.executable(plan.launches, (*names, *plan.buffers), inner.x.device.index)
        return self.plans.setdefault(key, (_buffers(inner.x, plan.buffers.values()), execute))


def run_forward(args: NormArgs, buffers: Sequence[Tensor | None], execute: Execute) -> tuple[Tensor, Tensor]:
    """y and the statistics, by a plan made for these arguments, with buffers like its `_buffers`."""
    y, stats = torch.empty_like(args.x), torch.empty_like(buffers[0])  # type: ignore[arg-type]
    execute((*args.tensors, y, stats))
    return y, stats


def run_backward(
    dy: Tensor,
    stats: Tensor,
    args: NormArgs,
    needs: Sequence[bool],
    buffers: Sequence[Tensor | None],
    execute: Execute,
) -> list[Tensor]:
    """The gradients that are needed, by a plan made for these arguments."""
    tensors = args.tensors
    # The arguments are `dense`, so that empty_like has the strides with which the kernels write.
    grads = [torch.empty_like(t) if need else None for t, need in zip(tensors, needs, strict=True)]
    workspace = [None if t is None else torch.empty_like(t) for t in buffers]
    execute((*tensors, dy, stats, *grads, *workspace))
    return [grad for grad in grads if grad is not None]


def _buffers(x: Tensor, sizes: Iterable[int]) -> list[Tensor | None]:
    """For each size an expanded tensor for torch.empty_like, which is faster than torch.empty with a size."""
    return [x.new_empty((), dtype=torch.float32).expand(size) if size else None for size in sizes]
