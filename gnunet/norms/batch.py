"""Normalization over a batch, parts of it, or the batches of all processes; corrected by, or mixed with, others."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn
from typing_extensions import Doc

from .layer import append_dims
from .running_stats import ChannelStats, RunningStatsNorm, in_checkpoint_recompute, standardize


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


class BatchRenorm(BatchNorm):
    """BatchNorm whose output in training is corrected towards that of evaluation: x_hat * r + d.

    r = sigma_batch / sigma in [1 / r_max, r_max] and d = (mean_batch - mean) / sigma in [-d_max, d_max], by the
    running statistics before this batch, are constants to the gradient. r_max = 1 and d_max = 0 is BatchNorm;
    without bounds, training and evaluation compute the same. The bounds grow from there linearly over the first
    `renorm_warmup` batches. Ioffe, Batch Renormalization (arXiv:1702.03275), with bounds of 3 and 5; the defaults
    are those of Wu and He (arXiv:1803.08494) for small batches.
    """

    supports_checkpointing = False

    def __init__(
        self,
        num_channels: int,
        *,
        r_max: Annotated[float, Ge(1), Doc("Bound of the correction of the scale; 1 is none.")] = 1.5,
        d_max: Annotated[
            float, Ge(0), Doc("Bound of the correction of the mean, in running standard deviations.")
        ] = 0.5,
        renorm_warmup: Annotated[
            int, Ge(0), Doc("Batches over which the bounds grow from those of batch normalization.")
        ] = 0,
        **options: Any,
    ) -> None:
        super().__init__(num_channels, **options)
        self.r_max, self.d_max, self.renorm_warmup = r_max, d_max, renorm_warmup

    def normalize(self, u: Tensor) -> Tensor:
        if not self.training or self.population_stats is not None:
            return super().normalize(u)
        if in_checkpoint_recompute():
            raise RuntimeError("batch_renorm cannot be used with gradient checkpointing: its statistics have changed")
        batch = self.merge_samples(self.sample_stats(u))
        mean, variance = self.running_stats(u)
        correct = _correction_operator if torch.compiler.is_compiling() else _correction
        r, d = correct(
            batch.mean.detach(), batch.variance.detach(), mean, variance, self.num_batches_tracked,
            self.eps, self.r_max, self.d_max, self.renorm_warmup,
        )  # fmt: skip
        self.update_running_stats(batch)
        return standardize(u, batch.mean, batch.variance, self.eps) * append_dims(r, u) + append_dims(d, u)


def _correction(
    batch_mean: Tensor,
    batch_variance: Tensor,
    mean: Tensor,
    variance: Tensor,
    num_batches: Tensor,
    eps: float,
    r_max: float,
    d_max: float,
    warmup: int,
) -> tuple[Tensor, Tensor]:
    """r and d, with the shape of mean."""
    batches = num_batches.to(mean.dtype)
    progress = (batches / warmup).clamp(max=1) if warmup else torch.ones_like(batches)
    r_bound, d_bound = 1 + progress * (r_max - 1), progress * d_max
    sigma = (variance + eps).sqrt()
    r = ((batch_variance + eps).sqrt() / sigma).clamp(1 / r_bound, r_bound)
    d = ((batch_mean - mean) / sigma).clamp(-d_bound, d_bound)
    return r, d


# torch.compile would recompute r and d in the backward pass, from running statistics that have been updated since
# (torch 2.13), which gives wrong gradients. It saves the results of a custom operator.
_correction_operator = torch.library.custom_op("gnunet::batch_renorm_correction", _correction, mutates_args=())


@_correction_operator.register_fake
def _correction_fake(batch_mean: Tensor, batch_variance: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


class SwitchableNorm(RunningStatsNorm):
    """(u - mean) / sqrt(var + eps) with learned mixtures of instance, layer and batch statistics.

    The weights of the three, in this order, are softmax(mean_logits) for the means and softmax(variance_logits) for
    the variances, and equal at first. Luo et al., Differentiable Learning-to-Normalize via Switchable Normalization
    (arXiv:1806.10779); variances are biased, as in the paper.
    """

    def __init__(self, num_channels: int, **options: Any) -> None:
        super().__init__(num_channels, **options)
        self.mean_logits = nn.Parameter(torch.zeros(3))
        self.variance_logits = nn.Parameter(torch.zeros(3))

    def normalize(self, u: Tensor) -> Tensor:
        instance = self.sample_stats(u)
        layer_mean = instance.mean.mean(1, keepdim=True)
        layer_variance = (instance.variance + (instance.mean - layer_mean).square()).mean(1, keepdim=True)
        if self.training:
            batch = instance.merge(len(u))
            self.update_running_stats(batch)
            batch_mean, batch_variance = batch.mean, batch.variance
        else:
            batch_mean, batch_variance = self.running_stats(u)
        mean = _mixture(self.mean_logits, instance.mean, layer_mean, batch_mean)
        variance = _mixture(self.variance_logits, instance.variance, layer_variance, batch_variance)
        return standardize(u, mean, variance, self.eps)


def _mixture(logits: Tensor, instance: Tensor, layer: Tensor, batch: Tensor) -> Tensor:
    """The softmax of the logits times the three statistics, (N or 1, C or 1)."""
    weights = torch.softmax(logits.to(instance.dtype), 0)
    return weights[0] * instance + weights[1] * layer + weights[2] * batch
