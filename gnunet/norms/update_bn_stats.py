"""Re-estimation of running statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .running_stats import PopulationStats, RunningStatsNorm


@torch.no_grad()
def update_bn_stats(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> int:
    """Replace the running statistics of a model's layers by those of its current weights on the given batches.

    In training, running statistics lag behind the weights, and those of EMA weights are of another model. Here they
    become population statistics: the mean of the batches' means, and the mean of their variances plus the variance of
    their means (Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv:2105.07576; fvcore's update_bn_stats). The
    statistics of a noise bin that no batch has are kept, and so is num_batches_tracked.

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
            sets = layer.running_mean.view(-1, layer.num_channels)
            layer.population_stats = PopulationStats(sets.to(torch.promote_types(sets.dtype, torch.float32)))
        for batch in batches:
            model(*batch)
            count += 1
        if count == 0:
            raise ValueError("update_bn_stats got no batches")
        for layer in layers:
            stats = layer.population_stats
            assert stats is not None
            for buffer, value in ((layer.running_mean, stats.mean), (layer.running_var, stats.variance)):
                sets = buffer.view(-1, layer.num_channels)
                sets.copy_(torch.where(stats.count > 0, value, sets.to(value.dtype)))
    finally:
        for layer in layers:
            layer.population_stats = None
        for module, training in modes:
            module.training = training
    return count
