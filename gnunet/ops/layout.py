"""A tensor of any number of dimensions as one of two 3-D layouts, and tables per channel or group."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from .batch_invariant import sum_columns, sum_rows

_CPU_PART = 2**20  # elements: what the passes over a part read and write stays in the caches
_GPU_PART = 2**30  # elements: below the 2^31 that many kernels can count
_ROW = 1024  # elements: a row long enough for a kernel's inner loop
SAMPLING_STRIDE = 31  # positions; their mean is off by sqrt(31) standard deviations at most


class Layout:
    """Rows (N, S / k, k * C), that is channels_last, or columns (N, C, S), that is contiguous; S positions.

    k positions are folded into a row, because kernels that broadcast a table over short rows are slow. What
    lies in memory in neither way is read as columns. A table, (N, G, C / G), has a number for each channel;
    (N, G, 1) has one for each group, (1, G, C / G) one for all samples.
    """

    def __init__(self, x: Tensor, num_groups: int) -> None:
        self.channels, self.num_groups = x.shape[1], num_groups
        self.group_channels = self.channels // num_groups
        self.positions = x.shape[2:].numel()
        self.shape, self.strides = x.shape, x.stride()
        is_columns = x.is_contiguous()
        self.is_rows = not is_columns and x.movedim(1, -1).is_contiguous()
        self.is_dense = is_columns or self.is_rows
        # The largest power of two that divides S and keeps the row within bounds.
        self.positions_per_row = gcd(self.positions, 1 << (max(1, _ROW // self.channels).bit_length() - 1))

    def view(self, t: Tensor) -> Tensor:
        """A tensor of x's shape as a contiguous 3-D tensor; a copy only where it does not lie as x does."""
        if not self.is_rows:
            return t.contiguous().view(t.shape[0], self.channels, self.positions)
        if t.stride() != self.strides:
            t = t.movedim(1, -1).contiguous().movedim(-1, 1)
        step, row = self.positions * self.channels, self.positions_per_row * self.channels
        return t.as_strided((t.shape[0], self.positions // self.positions_per_row, row), (step, row, 1))

    def unview(self, t: Tensor) -> Tensor:
        """A 3-D tensor, of any number of samples, by x's dimensions and the strides PyTorch expects of them, which x's
        own are not where a size is 1."""
        shape = (t.shape[0], *self.shape[1:])
        order = [1, *range(len(shape) - 1, 1, -1), 0] if self.is_rows else range(len(shape) - 1, -1, -1)
        strides, step = [0] * len(shape), 1
        for dim in order:
            strides[dim] = step
            step *= shape[dim]
        return t.as_strided(shape, strides)

    def write_back(self, result: Tensor, t: Tensor) -> None:
        """Write `result`, which was `view(t)`, to t where the view could not share its memory."""
        if not self.is_dense:
            t.copy_(result.view(t.shape))

    def batch_chunks(self, x: Tensor, multiple: int = 1) -> Iterator[slice]:
        """Ranges of samples, a multiple of some number but for the last, to be worked on one after the other.

        How the batch is divided has no effect on any number.
        """
        size = _CPU_PART if x.device.type == "cpu" else _GPU_PART
        step = max(1, size // (self.channels * self.positions * multiple)) * multiple
        return (slice(start, start + step) for start in range(0, x.shape[0], step))

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
        """A 3-D tensor's sums over the positions, as a table of channels."""
        sums = sum_rows(self._unfold(t)) if self.is_rows else sum_columns(t)
        return sums.view(-1, self.num_groups, self.group_channels)

    def _unfold(self, rows: Tensor) -> Tensor:
        return rows.view(-1, self.positions, self.channels)

    def group_means(self, sums: Tensor) -> Tensor:
        """Sums over the positions -> a table of the groups' means."""
        return sums.sum(2, keepdim=True).div_(self.group_channels * self.positions)

    def estimate_group_means(self, t: Tensor) -> Tensor:
        """A table of the groups' means over some of the positions of a 3-D tensor."""
        sample = self._unfold(t)[:, ::SAMPLING_STRIDE] if self.is_rows else t[:, :, ::SAMPLING_STRIDE]
        sample = sample if sample.dtype == torch.float64 else sample.float()
        sums = sum_rows(sample) if self.is_rows else sum_columns(sample)
        table = sums.view(-1, self.num_groups, self.group_channels)
        return table.mean(2, keepdim=True).div_(-(-self.positions // SAMPLING_STRIDE))
