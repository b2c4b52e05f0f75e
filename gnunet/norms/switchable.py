"""Switchable normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .moments import standardized
from .running import RunningStatsNorm


class SwitchableNorm(RunningStatsNorm):
    """(u - mean) / sqrt(var + eps) with learned mixtures of instance, layer and batch statistics.

    The weights of the three, in this order, are softmax(mean_logits) for the means and
    softmax(variance_logits) for the variances, at first even. Luo et al., Differentiable Learning-to-Normalize
    via Switchable Normalization (arXiv:1806.10779); variances are biased, as in the paper.
    """

    def __init__(self, num_channels: int, **settings: Any) -> None:
        super().__init__(num_channels, **settings)
        self.mean_logits = nn.Parameter(torch.zeros(3))
        self.variance_logits = nn.Parameter(torch.zeros(3))

    def normalize(self, u: Tensor) -> Tensor:
        instance = self.samples(u)
        layer_mean = instance.mean.mean(1, keepdim=True)
        layer_variance = (instance.variance + (instance.mean - layer_mean).square()).mean(1, keepdim=True)
        if self.training:
            batch = instance.joined(len(u))
            self.track(batch)
            batch_mean, batch_variance = batch.mean, batch.variance
        else:
            batch_mean, batch_variance = self.running(u)
        mean = _mixed(self.mean_logits, instance.mean, layer_mean, batch_mean)
        variance = _mixed(self.variance_logits, instance.variance, layer_variance, batch_variance)
        return standardized(u, mean, variance, self.eps)


def _mixed(logits: Tensor, *statistics: Tensor) -> Tensor:
    """The softmax of logits times the statistics, each (N or 1, C or 1)."""
    weights = torch.softmax(logits.to(statistics[0].dtype), 0)
    first, second, third = (weight * value for weight, value in zip(weights, statistics, strict=True))
    return first + second + third
