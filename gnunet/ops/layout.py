"""Memory layouts: what kernels require of their tensors, and a feature map of any rank as a 3-D tensor."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from .arguments import NormArgs

_CPU_CHUNK = 2**20  # elements: what the passes over a chunk read and write stays in the caches
_ROW = 1024  # elements: a row long enough for a kernel's inner loop
SAMPLING_STRIDE = 31  # positions; their mean is off by sqrt(31) standard deviations at most


def is_channels_last(x: Tensor) -> bool:
    """Whether x is dense with channels last, and not contiguous as well."""
    if x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.movedim(1, -1).is_contiguous()


def dense(args: NormArgs) -> NormArgs:
    """The arguments with x contiguous or channels_last, and the channels of the others adjacent in memory; rows of
    tables need not be, because scale and shift are often the halves of one projection."""
    x, *others = args.tensors
    x = x if x.is_contiguous() or is_channels_last(x) else x.contiguous()
    weight, bias, add, scale, shift = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in others)
    return args._replace(x=x, weight=weight, bias=bias, add=add, scale=scale, shift=shift)


def with_strides_of(t: Tensor, like: Tensor) -> Tensor:
    """A tensor with the strides of another of its shape; t itself if it has them."""
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)


class Layout:
    """A dense x as rows (N, S / k, k * C) where it is channels_last, else as columns (N, C, S); S positions.

    k positions are folded into a row, because broadcasting a table over short rows is slow. A table is (N, G, C / G):
    a number for each channel; (N, G, 1) has one for each group, (1, G, C / G) has the same for all samples.
    """

    def __init__(self, x: Tensor, num_groups: int) -> None:
        self.x, self.channels, self.num_groups = x, x.shape[1], num_groups
        self.group_channels = self.channels // num_groups
        self.positions = x.shape[2:].numel()
        self.is_rows = is_channels_last(x)
        # The largest power of two that divides S and keeps the row within bounds.
        self.positions_per_row = gcd(self.positions, 1 << (max(1, _ROW // self.channels).bit_length() - 1))

    def view(self, t: Tensor) -> Tensor:
        """A tensor with x's shape and strides as a contiguous 3-D tensor."""
        if not self.is_rows:
            return t.view(t.shape[0], self.channels, self.positions)
        row = self.positions_per_row * self.channels
        return t.as_strided((t.shape[0], self.positions // self.positions_per_row, row), (t.stride(0), row, 1))

    def channels_last_4d(self, rows: Tensor) -> Tensor:
        """Rows as (N, C, S, 1) with channels last."""
        step = self.positions * self.channels
        strides = (step, 1, self.channels, self.channels)
        return rows.as_strided((rows.shape[0], self.channels, self.positions, 1), strides)

    def batch_chunks(self) -> Iterator[slice]:
        """Ranges of samples to be processed one after the other."""
        batch = len(self.x)
        step = max(1, _CPU_CHUNK // (self.channels * self.positions)) if self.x.device.type == "cpu" else batch
        return (slice(start, min(batch, start + step)) for start in range(0, batch, step))

    def write(self, result: Tensor, chunk: slice, part: Tensor) -> Tensor:
        """`result`, like x, with a chunk of its samples from a 3-D tensor; that itself where it is all of it."""
        if part.shape[0] == self.x.shape[0] and part.dtype == self.x.dtype:
            # Detached, because autograd does not let a view that was made without gradients be changed in place.
            return part.as_strided(result.shape, result.stride()).detach()
        target = self.view(result)[chunk]
        if part.data_ptr() != target.data_ptr():  # if not written in place
            target.copy_(part)
        return result

    def per_channel(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(C,) or (N, C) -> a table."""
        return t.to(dtype).reshape(-1, self.num_groups, self.group_channels)

    def broadcast(self, table: Tensor) -> Tensor:
        """A table in the shape that broadcasts over a 3-D tensor."""
        if not self.is_rows:
            return table.expand(-1, self.num_groups, self.group_channels).reshape(-1, self.channels, 1)
        folded = table.unsqueeze(1).expand(-1, self.positions_per_row, self.num_groups, self.group_channels)
        return folded.reshape(-1, 1, self.positions_per_row * self.channels)

    def sums(self, t: Tensor) -> Tensor:
        """Sums of a 3-D tensor over the positions, as a table of channels."""
        sums = t.view(-1, self.positions, self.channels).sum(1) if self.is_rows else t.sum(2)
        return sums.view(-1, self.num_groups, self.group_channels)

    def group_means(self, sums: Tensor) -> Tensor:
        """Sums over the positions -> a table of the groups' means."""
        return sums.sum(2, keepdim=True).div_(self.group_channels * self.positions)

    def estimate_group_means(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """A table of the groups' means over some of the positions of a 3-D tensor."""
        if self.is_rows:
            means = t.view(-1, self.positions, self.channels)[:, ::SAMPLING_STRIDE].mean(1, dtype=dtype)
        else:
            means = t[:, :, ::SAMPLING_STRIDE].mean(2, dtype=dtype)
        return means.view(-1, self.num_groups, self.group_channels).mean(2, keepdim=True)
