"""Normalization over a batch, parts of it, or the batches of all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .moments import Moments, standardized
from .options import Option, is_count
from .running import RunningStatsNorm


class BatchNorm(RunningStatsNorm):
    """(u - mean) / sqrt(var + eps) of each channel over all samples and positions of the batch.

    Ioffe and Szegedy, Batch Normalization (arXiv:1502.03167); see RunningStatsNorm for evaluation.
    """

    def batches(self, samples: Moments) -> Moments:
        """From each sample's moments to those of each normalization batch: here one, the whole."""
        return samples.joined(len(samples.mean))

    def normalize(self, u: Tensor) -> Tensor:
        if not self.training:
            return standardized(u, *self.running(u), self.eps)
        batches = self.batches(self.samples(u))
        self.track(batches)
        return standardized(u, batches.mean, batches.variance, self.eps)


class SyncBatchNorm(BatchNorm):
    """BatchNorm over the union of all processes' batches, of any sizes, where torch.distributed is initialized."""

    def batches(self, samples: Moments) -> Moments:
        own = super().batches(samples)
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return own
        row = torch.cat(own, dim=1)
        rank, processes = dist.get_rank(), dist.get_world_size()
        table = AllReduceSum.apply(F.pad(row, (0, 0, rank, processes - 1 - rank)))
        return Moments(*table.split([t.shape[1] for t in own], dim=1)).joined(processes)


class GhostBatchNorm(BatchNorm):
    """BatchNorm over `ghost_size` samples in a row at a time, and over the rest that remains.

    It parts the size of the normalization batch from that of the batch. Parameters are shared; the ghost
    batches' average counts as one batch in the running statistics. Hoffer et al., Train Longer, Generalize
    Better (arXiv:1705.08741).
    """

    options: ClassVar[Mapping[str, Option]] = {
        **BatchNorm.options,
        "ghost_size": Option(8, is_count, "a whole number above 0", "Samples normalized together.", int),
    }

    def __init__(self, num_channels: int, *, ghost_size: int, **settings: Any) -> None:
        super().__init__(num_channels, **settings)
        self.ghost_size = ghost_size

    def batches(self, samples: Moments) -> Moments:
        return samples.joined(self.ghost_size)

    def normalize(self, u: Tensor) -> Tensor:
        if not self.training:
            return super().normalize(u)
        ghosts = self.batches(self.samples(u))
        self.track(ghosts)
        mean, variance = (t.repeat_interleave(self.ghost_size, 0)[: len(u)] for t in (ghosts.mean, ghosts.variance))
        return standardized(u, mean, variance, self.eps)


class AllReduceSum(torch.autograd.Function):
    """The sum of a tensor over all processes. The gradient is that of the sum of all their losses."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        total = t.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = AllReduceSum.apply(grad)
        return total
