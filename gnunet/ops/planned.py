"""An operator by kernels: what is allocated and launched is planned once for all arguments of one signature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import NormArgs

FORWARD_TENSORS = ("x", "weight", "bias", "add", "scale", "shift", "y")
"""What the kernels of forward are given, in this order, before a plan's own buffers."""
BACKWARD_TENSORS = (
    "x", "weight", "bias", "add", "scale", "shift", "dy", "stats", "dx", "dweight", "dbias", "dadd", "dscale", "dshift",
)  # fmt: skip
"""The same of backward."""
Execute = Callable[[tuple[Tensor | None, ...]], None]
"""Launches a plan's kernels on these tensors."""


class Plan(NamedTuple):
    launches: list[Any]
    buffers: dict[str, int]
    """The sizes, in fp32, of what is allocated beside y and the gradients; forward has "stats" alone."""


class Planner(NamedTuple):
    """A kind of kernels."""

    plan_forward: Callable[[NormArgs], Plan]
    plan_backward: Callable[[NormArgs, Sequence[bool]], Plan]
    """Of the gradients that are needed."""
    executable: Callable[[Sequence[Any], tuple[str, ...], int | None], Execute]
    """From a plan's launches, the names of their tensors and the number of the device to what launches them."""


@dataclass(frozen=True)
class Shape:
    """What of a tensor its tiling depends on. channels_last: in memory (N, S, C), else (N, C, S), of S positions.

    The batch size is not part of it, so that a sample is reduced in the same order, with bit-identical results, in any
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
    """An `autograd.Operator` for arguments of one signature: all that follows from it is decided once."""

    def __init__(self, args: NormArgs, planner: Planner) -> None:
        self.planner = planner
        self.copies = any(a is not b for a, b in zip(dense(args).tensors, args.tensors, strict=True))
        self.plans: dict[tuple[bool, ...], tuple[list[Tensor | None], Execute]] = {}

    def forward(self, args: NormArgs) -> tuple[Tensor, Tensor]:
        inner = dense(args) if self.copies else args
        plan = self.plans.get(()) or self._prepare((), inner, self.planner.plan_forward(inner), FORWARD_TENSORS)
        y, stats = run_forward(inner, *plan)
        return (as_laid_out(y, torch.empty_like(args.x)) if self.copies else y), stats

    def backward(self, dy: Tensor, stats: Tensor, args: NormArgs, needs: Sequence[bool]) -> list[Tensor]:
        inner = dense(args) if self.copies else args
        key = tuple(needs)
        plan = self.plans.get(key)
        plan = plan or self._prepare(key, inner, self.planner.plan_backward(inner, needs), BACKWARD_TENSORS)
        grads = run_backward(as_laid_out(dy, inner.x), stats, inner, needs, *plan)
        if self.copies and needs[0]:
            grads[0] = as_laid_out(grads[0], torch.empty_like(args.x))
        return grads

    def _prepare(
        self, key: tuple[bool, ...], inner: NormArgs, plan: Plan, names: tuple[str, ...]
    ) -> tuple[list[Tensor | None], Execute]:
        execute = self.planner.executable(plan.launches, (*names, *plan.buffers), inner.x.device.index)
        return self.plans.setdefault(key, (_buffers(inner.x, plan.buffers.values()), execute))


def run_forward(args: NormArgs, buffers: Sequence[Tensor | None], execute: Execute) -> tuple[Tensor, Tensor]:
    """y and the statistics, by a plan made for these arguments, with buffers like its `_buffers`."""
    x, _, weight, bias, _, add, scale, shift, _, _ = args
    y, stats = torch.empty_like(x), torch.empty_like(buffers[0])  # type: ignore[arg-type]
    execute((x, weight, bias, add, scale, shift, y, stats))
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
    x, _, weight, bias, _, add, scale, shift, _, _ = args
    # Of what `dense` returns these are laid out as the kernels write them.
    grads = [
        torch.empty_like(t) if need else None  # type: ignore[arg-type]
        for t, need in zip((x, weight, bias, add, scale, shift), needs, strict=True)
    ]
    workspace = [None if t is None else torch.empty_like(t) for t in buffers]
    execute((x, weight, bias, add, scale, shift, dy, stats, *grads, *workspace))
    return [grad for grad in grads if grad is not None]


def _buffers(x: Tensor, sizes: Iterable[int]) -> list[Tensor | None]:
    """For each size a tensor to call torch.empty_like with, quicker than with a size, which takes no memory itself."""
    return [x.new_empty((), dtype=torch.float32).expand(size) if size else None for size in sizes]


def is_channels_last(x: Tensor) -> bool:
    """Whether x is dense with channels last; what is dense in neither way is copied to be contiguous."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def dense(args: NormArgs) -> NormArgs:
    """The arguments as kernels take them: x dense, the channels of the others side by side.

    Rows of tables need not be: scale and shift are often the halves of one projection.
    """
    x, *others = args.tensors
    x = x if x.is_contiguous() or is_channels_last(x) else x.contiguous()
    weight, bias, add, scale, shift = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in others)
    return args._replace(x=x, weight=weight, bias=bias, add=add, scale=scale, shift=shift)


def as_laid_out(t: Tensor, like: Tensor) -> Tensor:
    """A tensor with the strides of another of its shape; itself if it has them."""
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)
