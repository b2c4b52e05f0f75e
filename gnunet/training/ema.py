"""Exponential moving average of the weights, in images seen."""

import copy
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gnunet.config import TrainConfig
from gnunet.distributed.fsdp import to_local
from gnunet.norms import running_buffers

Model = TypeVar("Model", bound=nn.Module)


def power_exponent(std: float) -> float:
    """Exponent gamma of the power-function EMA whose relative width is `std`, at most 0.28 (Karras et al., 2024, EDM2).

    The profile t^gamma on [0, 1] has the variance (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), which is solved for gamma.
    """
    target = std**-2
    return float(np.roots([1.0, 7.0, 16.0 - target, 12.0 - target]).real.max())


def ema_decay(train: TrainConfig, images: int) -> float:
    """The EMA's decay in the step that ends at `images` images seen."""
    if train.ema_kind == "power":
        return max(1.0 - train.batch_size / images, 0.0) ** (power_exponent(train.ema_std) + 1.0)
    half_life = float(train.ema_half_life)
    if train.ema_rampup is not None:
        half_life = min(half_life, images * train.ema_rampup)
    return 0.5 ** (train.batch_size / half_life)


class EMA:
    """The EMA of a model's parameters and running statistics in fp32, as a second model in eval mode.

    Args:
        model: the model to average; its counters are copied.
        shard: shards a model across ranks, in place; called with the copy, then with `model`.
        running_statistics: average running statistics too. False leaves them unchanged, to be re-estimated.
    """

    def __init__(
        self, model: Model, *, shard: Callable[[Model], None] | None = None, running_statistics: bool = True
    ) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        if shard is not None:
            shard(self.model)
            shard(model)
        excluded = [] if running_statistics else running_buffers(self.model)
        pairs = [*zip(self.model.parameters(), model.parameters(), strict=True)]
        pairs += zip(self.model.buffers(), model.buffers(), strict=True)
        pairs = [pair for pair in pairs if all(pair[0] is not buffer for buffer in excluded)]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, weight: float | Tensor, where: Tensor | None = None) -> None:
        """ema = (1 - weight) * ema + weight * model, where weight is 1 - decay.

        where: bool (), on the device, as the weight then is, float32 (); if false, only the sign of a negative zero may
        change.
        """
        ema, model = zip(*((to_local(ours), to_local(theirs)) for ours, theirs in self._averaged), strict=True)
        torch._foreach_lerp_(ema, model, weight if where is None else [weight * where] * len(ema))
        for ours, theirs in self._copied:
            ours.copy_(theirs if where is None else torch.where(where, theirs, ours))
