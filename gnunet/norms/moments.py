"""Means and variances of sets of samples, and of their unions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layer import append_dims, spatial_dims


class Moments(NamedTuple):
    """Per channel, over all positions, of S sets of samples."""

    mean: Tensor
    """(S, C)."""
    variance: Tensor
    """(S, C), biased."""
    elements: Tensor
    """(S, 1): how many a channel has, samples times positions."""
    noise: Tensor
    """(S, K): the share of each bin of noise levels in the set."""

    @classmethod
    def of_samples(cls, u: Tensor, noise: Tensor) -> Moments:
        """Of each sample of u, (N, C, *spatial), by itself."""
        variance, mean = torch.var_mean(u, spatial_dims(u), correction=0)
        elements = mean.new_full((len(u), 1), u.shape[2:].numel())
        return cls(mean, variance, elements, noise)

    def joined(self, size: int) -> Moments:
        """Of the unions of `size` sets in a row each, fewer in the last one."""
        size = min(size, len(self.mean))
        rest = len(self.mean) % size
        if rest:
            head, tail = Moments(*(t[:-rest] for t in self)), Moments(*(t[-rest:] for t in self))
            return Moments(*map(torch.cat, zip(head.joined(size), tail.joined(rest), strict=True)))
        mean, variance, elements, noise = (t.unflatten(0, (-1, size)) for t in self)
        total = elements.sum(1)
        share = elements / total.unsqueeze(1)
        union = (share * mean).sum(1)
        spread = variance + (mean - union.unsqueeze(1)).square()
        return Moments(union, (share * spread).sum(1), total, (share * noise).sum(1))


def standardized(u: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """(u - mean) / sqrt(variance + eps); u: (N, C, *spatial), the others (N or 1, C or 1)."""
    return (u - append_dims(mean, u)) * append_dims(torch.rsqrt(variance + eps), u)
