"""Operators made of kernels: allocations and launches are planned once for all arguments of one signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import eager
from .arguments import TENSORS, NormArgs
from .layout import dense, is_channels_last, with_strides_of

FORWARD_TENSORS = (*TENSORS, "y")
BACKWARD_TENSORS = (*TENSORS, "dy", "stats", *(f"d{name}" for name in TENSORS))
"""The tensors that an Execute takes, in this order, followed by the plan's buffers."""
Execute = Callable[[tuple[Tensor | None, ...]], None]  # launches the kernels of a plan on these tensors


class Plan(NamedTuple):
    launches: list[Any]
    buffers: dict[str, int]
    """Name and number of fp32 elements of each tensor to allocate in addition to y and the gradients; forward has one,
    "stats"."""


class Planner(NamedTuple):
    """How a backend plans and launches its kernels."""

    plan_forward: Callable[[NormArgs], Plan]
    plan_backward: Callable[[NormArgs, Sequence[bool]], Plan]  # for the gradients that are needed
    executable: Callable[[Sequence[Any], tuple[str, ...], int | None], Execute]
    """From the launches of a plan, the names of its tensors and the index of the device."""


@dataclass(frozen=True)
class Shape:
    """The properties of x that its tiling depends on. x is (N, S, C) in memory where channels_last, else (N, C, S).

    The batch size is not one of them, so that a sample's results are bit-identical in any batch.
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
        """Prepared plans: that of forward by the key (), those of backward by the gradients that are needed."""

    def forward(self, args: NormArgs) -> tuple[Tensor, Tensor]:
        inner = dense(args) if self.copies else args
        buffers, execute = self.plans.get(()) or self._prepare(
            (), inner, self.planner.plan_forward(inner), FORWARD_TENSORS
        )
        y, stats = torch.empty_like(inner.x), torch.empty_like(buffers[0])  # type: ignore[arg-type]
        execute((*inner.tensors, y, stats))
        return (with_strides_of(y, torch.empty_like(args.x)) if self.copies else y), stats

    def backward(self, dy: Tensor, stats: Tensor, args: NormArgs, needs: Sequence[bool]) -> list[Tensor]:
        inner = dense(args) if self.copies else args
        key = tuple(needs)
        buffers, execute = self.plans.get(key) or self._prepare(
            key, inner, self.planner.plan_backward(inner, needs), BACKWARD_TENSORS
        )
        tensors = inner.tensors
        # The arguments are dense, so that empty_like has the strides with which the kernels write.
        grads = [torch.empty_like(t) if need else None for t, need in zip(tensors, needs, strict=True)]
        workspace = [None if t is None else torch.empty_like(t) for t in buffers]
        execute((*tensors, with_strides_of(dy, inner.x), stats, *grads, *workspace))
        found = [grad for grad in grads if grad is not None]
        if self.copies and needs[0]:
            found[0] = with_strides_of(found[0], torch.empty_like(args.x))
        return found

    def _prepare(
        self, key: tuple[bool, ...], inner: NormArgs, plan: Plan, names: tuple[str, ...]
    ) -> tuple[list[Tensor | None], Execute]:
        execute = self.planner.executable(plan.launches, (*names, *plan.buffers), inner.x.device.index)
        empty = inner.x.new_empty((), dtype=torch.float32)
        # torch.empty_like of an expanded tensor is faster than torch.empty with a size.
        buffers = [empty.expand(size) if size else None for size in plan.buffers.values()]
        return self.plans.setdefault(key, (buffers, execute))


@dataclass(frozen=True)
class OperatorOfAnySignature:
    """An `autograd.Operator` for torch.library, which gives it arguments of any signature."""

    plan: Callable[[NormArgs], PlannedOperator]

    def forward(self, args: NormArgs) -> tuple[Tensor, Tensor]:
        if args.x.numel() == 0:
            return eager.forward(args)
        y, stats = self.plan(args).forward(args)
        shape = (1 + args.center, args.x.shape[0], args.num_groups)
        return y, stats[: prod(shape)].view(shape)

    def backward(self, dy: Tensor, stats: Tensor, args: NormArgs, needs: Sequence[bool]) -> list[Tensor]:
        if args.x.numel() == 0:
            return eager.backward(dy, stats, args, needs)
        return self.plan(args).backward(dy, stats.contiguous(), args, needs)
