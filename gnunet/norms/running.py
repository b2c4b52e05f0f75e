"""Statistics that a layer gathers in training and uses in evaluation, as one set or one for each noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .layer import NormAct
from .moments import Moments
from .options import EPS, MOMENTUM, NOISE_EDGES, Option


class RunningStatsNorm(NormAct):
    """A base of layers that normalize by their batch in training and by running statistics in evaluation.

    Buffers `running_mean`, `running_var` (unbiased) and `num_batches_tracked` are those of nn.BatchNorm2d, and
    so is the update, running = (1 - momentum) * running + momentum * batch, but for two things: a batch whose
    statistics are not finite is left out, and so is a second run by torch.utils.checkpoint in backward.

    Noise levels: with K - 1 `noise_edges`, in the network's timesteps, there are K sets of running statistics,
    (K, C), and a sample takes its noise level's. Training does not change: batches mix levels as ever. A set
    averages the statistics of the batches that had a sample of its levels, hence what such samples were
    normalized by. The levels come from `set_noise_level`, which a network calls first in its forward pass.

    Weight averages (EMA) should average the buffers as they do the weights, or better have them estimated
    anew: see `gnunet.norms.update_bn_stats`.
    """

    batch_dependent = True
    has_state = True
    options: ClassVar[Mapping[str, Option]] = {"eps": EPS, "momentum": MOMENTUM, "noise_edges": NOISE_EDGES}
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float,
        momentum: float,
        noise_edges: Sequence[float] = (),
        activation: str | None = "silu",
    ) -> None:
        super().__init__(num_channels, activation=activation)
        self.eps, self.momentum, self.noise_edges = eps, momentum, tuple(noise_edges)
        sets = (len(noise_edges) + 1,) if noise_edges else ()
        self.register_buffer("running_mean", torch.zeros(*sets, num_channels))
        self.register_buffer("running_var", torch.ones(*sets, num_channels))
        self.register_buffer("num_batches_tracked", torch.zeros(sets, dtype=torch.long))
        self.noise_bin: Tensor | None = None
        """(N,), the bin of each sample of the coming batch."""
        self.estimate: Estimate | None = None
        """Where given, batches go there and leave the buffers as they are."""

    def samples(self, u: Tensor) -> Moments:
        """The moments of each sample of u, (N, C, *spatial)."""
        if not self.noise_edges:
            return Moments.of_samples(u, u.new_ones(len(u), 1))
        bins = torch.arange(len(self.noise_edges) + 1, device=u.device)
        return Moments.of_samples(u, (self._bins(len(u)).unsqueeze(1) == bins).to(u.dtype))

    def running(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The running mean and variance for u, (1 or N, C)."""
        mean, variance = self.running_mean.to(u.dtype), self.running_var.to(u.dtype)
        if not self.noise_edges:
            return mean.unsqueeze(0), variance.unsqueeze(0)
        bins = self._bins(len(u))
        return mean[bins], variance[bins]

    @torch.no_grad()
    def track(self, batches: Moments) -> None:
        """Take the statistics of normalization batches, S of them, into the buffers or the estimate."""
        if in_checkpoint_recompute():
            return
        finite = (batches.mean.isfinite() & batches.variance.isfinite()).all(1, keepdim=True)
        present = ((batches.noise > 0) & finite).to(batches.mean.dtype).T.unsqueeze(2)  # (K, S, 1)
        if self.estimate is not None:
            self.estimate.add(batches, present)
            return
        number = present.sum(1)
        unbiased = batches.variance * (batches.elements / (batches.elements - 1).clamp_min(1))
        for buffer, values in ((self.running_mean, batches.mean), (self.running_var, unbiased)):
            sets = buffer.view(-1, self.num_channels)
            average = (present * values.nan_to_num()).sum(1) / number.clamp_min(1)
            sets.add_(torch.where(number > 0, average - sets, 0.0) * self.momentum)
        self.num_batches_tracked += (number > 0).view_as(self.num_batches_tracked)

    def _bins(self, batch_size: int) -> Tensor:
        if self.noise_bin is None or len(self.noise_bin) != batch_size:
            given = "no noise level" if self.noise_bin is None else f"{len(self.noise_bin)} noise levels"
            raise RuntimeError(
                f"a norm with noise_edges got {given} for a batch of {batch_size}; "
                "call gnunet.norms.set_noise_level(model, timestep) before its forward pass"
            )
        return self.noise_bin


def running_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers in which the layers of a model gather statistics in training."""
    return [
        buffer for layer in model.modules() if isinstance(layer, RunningStatsNorm) for buffer in layer.buffers(False)
    ]


class Estimate:
    """Population moments of a layer's inputs, for each noise level, from the moments of batches.

    The mean is the batches' mean mean; the variance is their mean variance plus the variance of their means.
    """

    def __init__(self, mean: Tensor) -> None:
        """mean: (K, C), of the shape, dtype and device wanted."""
        self.number = mean.new_zeros(len(mean), 1)
        self.mean, self.variance = torch.zeros_like(mean), torch.zeros_like(mean)

    def add(self, batches: Moments, present: Tensor) -> None:
        """Batches, S of them; present: (K, S, 1), 1 where a batch counts for a noise level, else 0."""
        for i in range(len(batches.mean)):
            mean, variance = batches.mean[i].nan_to_num(), batches.variance[i].nan_to_num()
            self.number += present[:, i]
            share = present[:, i] / self.number.clamp_min(1)
            step = mean - self.mean
            self.mean += share * step
            self.variance += share * (variance - self.variance + (1 - share) * step.square())


def in_checkpoint_recompute() -> bool:
    """Whether this is torch.utils.checkpoint's second run of a forward pass."""
    # It happens within a backward pass, which is where autograd has a task at work.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def set_noise_level(model: nn.Module, timestep: Tensor) -> None:
    """Tell the layers of a model that have noise_edges the noise level of the coming batch.

    Args:
        model: the layer, or any module that has such layers.
        timestep: (N,), as the network takes it. A sample's bin is the number of edges that are at most its
            timestep.
    """
    bins: dict[tuple[float, ...], Tensor] = {}
    for layer in model.modules():
        if isinstance(layer, RunningStatsNorm) and layer.noise_edges:
            if layer.noise_edges not in bins:
                # By comparisons with plain numbers: edges in a buffer would be rounded with a model in half precision.
                reached = [(timestep >= edge).long() for edge in layer.noise_edges]
                bins[layer.noise_edges] = torch.stack(reached).sum(0)
            layer.noise_bin = bins[layer.noise_edges]
