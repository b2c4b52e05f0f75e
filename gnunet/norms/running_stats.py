"""Statistics that a layer gathers in training and uses in evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from typing_extensions import Doc

from .layer import Eps, NormAct, append_dims, spatial_dims

Momentum = Annotated[float, Gt(0), Le(1), Doc("Weight of the newest batch in the running statistics.")]


class ChannelStats(NamedTuple):
    """Mean and variance of each channel over all positions, of S sets of samples."""

    mean: Tensor  # (S, C)
    variance: Tensor  # (S, C), biased
    elements: Tensor  # (S, 1): the number of elements in a channel, samples times positions

    def merge(self, size: int) -> ChannelStats:
        """Of the unions of `size` consecutive sets; the last union may have fewer."""
        size = min(size, len(self.mean))
        remainder = len(self.mean) % size
        if remainder:
            head = ChannelStats(*(t[:-remainder] for t in self)).merge(size)
            tail = ChannelStats(*(t[-remainder:] for t in self)).merge(remainder)
            return ChannelStats(*map(torch.cat, zip(head, tail, strict=True)))
        mean, variance, elements = (t.unflatten(0, (-1, size)) for t in self)
        total = elements.sum(1)
        weight = elements / total.unsqueeze(1)
        union = (weight * mean).sum(1)
        second_moment = variance + (mean - union.unsqueeze(1)).square()
        return ChannelStats(union, (weight * second_moment).sum(1), total)


def standardize(u: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """(u - mean) / sqrt(variance + eps); u: (N, C, *spatial), mean and variance: (N or 1, C or 1)."""
    return (u - append_dims(mean, u)) * append_dims(torch.rsqrt(variance + eps), u)


class RunningStatsNorm(NormAct):
    """Base of layers that normalize by their batch in training and by running statistics in evaluation.

    Buffers `running_mean`, `running_var` (unbiased) and `num_batches_tracked` are those of nn.BatchNorm2d, and so is
    the update, running = (1 - momentum) * running + momentum * batch. Two kinds of batches are left out: those with
    non-finite statistics, and those that torch.utils.checkpoint recomputes in the backward pass.

    The EMA of a model should average the buffers as it does the weights, or re-estimate them with `update_bn_stats`.
    """

    batch_dependent = True
    has_state = True
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        eps: Eps = 1e-5,
        momentum: Momentum = 0.1,
        activation: str | None = "silu",
    ) -> None:
        super().__init__(num_channels, activation=activation)
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        # While set, it takes the statistics of batches, and the buffers do not change.
        self.population_stats: PopulationStats | None = None

    def sample_stats(self, u: Tensor) -> ChannelStats:
        """Of each sample of u, (N, C, *spatial)."""
        variance, mean = torch.var_mean(u, spatial_dims(u), correction=0)
        return ChannelStats(mean, variance, mean.new_full((len(u), 1), u.shape[2:].numel()))

    def running_stats(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The running mean and variance in the dtype of u, (1, C)."""
        return self.running_mean.to(u.dtype).unsqueeze(0), self.running_var.to(u.dtype).unsqueeze(0)

    @torch.no_grad()
    def update_running_stats(self, batches: ChannelStats) -> None:
        """Add the statistics of S normalization batches to the buffers or the population statistics."""
        if in_checkpoint_recompute():
            return
        finite = (batches.mean.isfinite() & batches.variance.isfinite()).all(1, keepdim=True)
        counted = finite.to(batches.mean.dtype)  # (S, 1)
        if self.population_stats is not None:
            self.population_stats.update(batches, counted)
            return
        count = counted.sum()
        unbiased = batches.variance * (batches.elements / (batches.elements - 1).clamp_min(1))
        for buffer, values in ((self.running_mean, batches.mean), (self.running_var, unbiased)):
            average = (counted * values.nan_to_num()).sum(0) / count.clamp_min(1)
            buffer.add_(torch.where(count > 0, average - buffer, 0.0) * self.momentum)
        self.num_batches_tracked += count > 0


class PopulationStats:
    """The mean of the batches' means, and the mean of their variances plus the variance of their means.

    mean: (C,), a template for shape, dtype and device.
    """

    def __init__(self, mean: Tensor) -> None:
        self.count = mean.new_zeros(())
        self.mean, self.variance = torch.zeros_like(mean), torch.zeros_like(mean)

    def update(self, batches: ChannelStats, counted: Tensor) -> None:
        """Add S batches; counted: (S, 1), 1 for a batch that counts, else 0."""
        for i in range(len(batches.mean)):
            mean, variance = batches.mean[i].nan_to_num(), batches.variance[i].nan_to_num()
            self.count += counted[i, 0]
            weight = counted[i, 0] / self.count.clamp_min(1)
            delta = mean - self.mean
            self.mean += weight * delta
            self.variance += weight * (variance - self.variance + (1 - weight) * delta.square())


def running_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers of a model's layers that change in the forward pass in training."""
    layers = [layer for layer in model.modules() if isinstance(layer, RunningStatsNorm)]
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]


def in_checkpoint_recompute() -> bool:
    """Whether torch.utils.checkpoint is recomputing a forward pass."""
    # That happens in a backward pass, in which autograd has a current task.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.no_grad()
def update_bn_stats(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> int:
    """Replace the running statistics of a model's layers by those of its current weights on the given batches.

    In training, running statistics lag behind the weights, and those of EMA weights are of another model. Here they
    become population statistics: the mean of the batches' means, and the mean of their variances plus the variance of
    their means (Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv:2105.07576; fvcore's update_bn_stats).
    num_batches_tracked is kept, and so are the statistics of a layer for which all batches are non-finite.

    Args:
        model: in any mode, which is restored. Layers with running statistics normalize by the batch meanwhile, as in
            training; all others, such as dropout, are in evaluation mode.
        batches: the positional arguments of one call of the model each, with the batch size and the mix of noise
            levels of training; with sync_batch, the same number on every process.

    Returns:
        The number of batches. 0, without reading `batches`, if no layer has running statistics.

    Raises:
        ValueError: no batches. The statistics are unchanged after this and any other error.
    """
    layers = [module for module in model.modules() if isinstance(module, RunningStatsNorm)]
    if not layers:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    count = 0
    try:
        for layer in layers:
            layer.train()
            mean = layer.running_mean
            layer.population_stats = PopulationStats(mean.to(torch.promote_types(mean.dtype, torch.float32)))
        for batch in batches:
            model(*batch)
            count += 1
        if count == 0:
            raise ValueError("update_bn_stats got no batches")
        for layer in layers:
            stats = layer.population_stats
            assert stats is not None
            for buffer, value in ((layer.running_mean, stats.mean), (layer.running_var, stats.variance)):
                buffer.copy_(torch.where(stats.count > 0, value, buffer.to(value.dtype)))
    finally:
        for layer in layers:
            layer.population_stats = None
        for module, training in modes:
            module.training = training
    return count
