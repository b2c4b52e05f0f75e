"""Running statistics estimated anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .running import Estimate, RunningStatsNorm


@torch.no_grad()
def update_bn_stats(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> int:
    """Replace the running statistics of a model's layers by those of its present weights on given batches.

    In training they lag behind the weights, and in a weight average they are another model's. These are
    population moments: the mean of the batches' means, and the batches' mean variance plus the variance of
    their means (Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv:2105.07576). A noise level that none of
    the batches has keeps its statistics, and num_batches_tracked stays.

    Args:
        model: in any mode, which comes back. Layers that keep statistics normalize by the batch meanwhile, as in
            training; all others, such as dropout, are in evaluation mode.
        batches: the positional arguments of one call of the model each, of the size and the mix of noise levels
            that it trains on. Where sync_batch runs on several processes, all of them must call this, with as
            many batches.

    Returns:
        The number of batches. 0 without a call of the model, or a look at `batches`, where no layer has statistics.

    Raises:
        ValueError: no batches. After this and after any error of the model, the statistics are the old ones.
    """
    layers = [module for module in model.modules() if isinstance(module, RunningStatsNorm)]
    if not layers:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    number = 0
    try:
        for layer in layers:
            layer.train()
            sets = layer.running_mean.view(-1, layer.num_channels)
            layer.estimate = Estimate(sets.to(torch.promote_types(sets.dtype, torch.float32)))
        for batch in batches:
            model(*batch)
            number += 1
        if number == 0:
            raise ValueError("update_bn_stats got no batches")
        for layer in layers:
            assert layer.estimate is not None
            for buffer, value in (
                (layer.running_mean, layer.estimate.mean),
                (layer.running_var, layer.estimate.variance),
            ):
                sets = buffer.view(-1, layer.num_channels)
                sets.copy_(torch.where(layer.estimate.number > 0, value, sets.to(value.dtype)))
    finally:
        for layer in layers:
            layer.estimate = None
        for module, training in modes:
            module.training = training
    return number
