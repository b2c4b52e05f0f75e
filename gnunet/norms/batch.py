"""Normalization over a batch, parts of it, or the batches of all processes."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor
from typing_extensions import Doc

from .running_stats import ChannelStats, RunningStatsNorm, standardize


class BatchNorm(RunningStatsNorm):
    """(u - mean) / sqrt(var + eps) of each channel over all samples and positions of the batch.

    Ioffe and Szegedy, Batch Normalization (arXiv:1502.03167); in evaluation by running statistics.
    """

    def merge_samples(self, samples: ChannelStats) -> ChannelStats:
        """From each sample's statistics to those of each normalization batch."""
        return samples.merge(len(samples.mean))

    def normalize(self, u: Tensor) -> Tensor:
        if not self.training:
            return standardize(u, *self.running_stats(u), self.eps)
        batches = self.merge_samples(self.sample_stats(u))
        self.update_running_stats(batches)
        return standardize(u, batches.mean, batches.variance, self.eps)


class SyncBatchNorm(BatchNorm):
    """BatchNorm over the union of the batches of all processes, whatever their sizes, with torch.distributed."""

    def merge_samples(self, samples: ChannelStats) -> ChannelStats:
        local = super().merge_samples(samples)
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return local
        row = torch.cat(local, dim=1)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        table = AllReduceSum.apply(F.pad(row, (0, 0, rank, world_size - 1 - rank)))
        return ChannelStats(*table.split([t.shape[1] for t in local], dim=1)).merge(world_size)


class GhostBatchNorm(BatchNorm):
    """BatchNorm over `ghost_size` consecutive samples at a time; the last ghost batch may have fewer.

    The mean over the ghost batches counts as one batch in the running statistics. Hoffer et al., Train Longer,
    Generalize Better (arXiv:1705.08741).
    """

    def __init__(
        self,
        num_channels: int,
        *,
        ghost_size: Annotated[int, Gt(0), Doc("Samples that are normalized together.")] = 8,
        **options: Any,
    ) -> None:
        super().__init__(num_channels, **options)
        self.ghost_size = ghost_size

    def merge_samples(self, samples: ChannelStats) -> ChannelStats:
        return samples.merge(self.ghost_size)

    def normalize(self, u: Tensor) -> Tensor:
        if not self.training:
            return super().normalize(u)
        ghosts = self.merge_samples(self.sample_stats(u))
        self.update_running_stats(ghosts)
        mean, variance = (t.repeat_interleave(self.ghost_size, 0)[: len(u)] for t in (ghosts.mean, ghosts.variance))
        return standardize(u, mean, variance, self.eps)


class AllReduceSum(torch.autograd.Function):
    """torch.distributed.nn.functional.all_reduce, which torch.compile does not support (torch 2.13)."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        total = t.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = AllReduceSum.apply(grad)
        return total
