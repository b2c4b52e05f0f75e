"""Switchable normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .running_stats import RunningStatsNorm, standardize


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
