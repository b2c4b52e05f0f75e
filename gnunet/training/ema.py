"""Exponential moving average of the weights, in images seen."""

import copy
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gnunet.checkpoint.sharded_tensors import POWER_EMAS
from gnunet.config import TrainConfig
from gnunet.distributed.fsdp import to_local
from gnunet.norms import running_buffers

Model = TypeVar("Model", bound=nn.Module)


@cache
def power_exponent(std: float) -> float:
    """Exponent gamma of the power-function EMA whose relative width is `std`, at most 0.28 (Karras et al., 2024, EDM2).

    The profile t^gamma on [0, 1] has the variance (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), which is solved for gamma.
    """
    target = std**-2
    return float(np.roots([1.0, 7.0, 16.0 - target, 12.0 - target]).real.max())


def ema_decays(train: TrainConfig, images: int) -> list[float]:
    """The decays in the step that ends at `images` images seen: of the EMA, and of POWER_EMAS if the run has them."""
    stds = [] if train.ema_snapshot_every is None else [*POWER_EMAS.values()]
    if train.ema_kind == "power":
        stds.insert(0, train.ema_std)
    decays = [max(1.0 - train.batch_size / images, 0.0) ** (power_exponent(std) + 1.0) for std in stds]
    if train.ema_kind == "half_life":
        half_life = float(train.ema_half_life)
        if train.ema_rampup is not None:
            half_life = min(half_life, images * train.ema_rampup)
        decays.insert(0, 0.5 ** (train.batch_size / half_life))
    return decays


class EMA:
    """EMAs of a model's parameters and running statistics in fp32, each as another model in eval mode.

    Args:
        model: the model to average; its counters are copied.
        num: how many EMAs; `model` is the first.
        shard: shards a model across ranks, in place; called with the copies, then with `model`.
        running_statistics: average running statistics too. False leaves those of the first EMA unchanged, to be
            re-estimated.
    """

    def __init__(
        self, model: Model, *, num: int = 1, shard: Callable[[Model], None] | None = None,
        running_statistics: bool = True,
    ) -> None:  # fmt: skip
        self.models = [copy.deepcopy(model).eval().requires_grad_(False) for _ in range(num)]
        self.model = self.models[0]
        for each in (*self.models, model) if shard is not None else ():
            shard(each)
        excluded = [] if running_statistics else running_buffers(self.model)
        self._averaged, self._copied = [], []
        for ema in self.models:
            pairs = [*zip(ema.parameters(), model.parameters(), strict=True)]
            pairs += zip(ema.buffers(), model.buffers(), strict=True)
            pairs = [pair for pair in pairs if all(pair[0] is not buffer for buffer in excluded)]
            self._averaged.append([pair for pair in pairs if pair[0].is_floating_point()])
            self._copied += [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, *weights: float | Tensor, where: Tensor | None = None) -> None:
        """ema = (1 - weight) * ema + weight * model, where weight is 1 - decay, for each EMA.

        where: bool (), on the device, as the weights then are, float32 (); if false, only the sign of a negative zero
        may change.
        """
        for weight, pairs in zip(weights, self._averaged, strict=True):
            ema, model = zip(*((to_local(ours), to_local(theirs)) for ours, theirs in pairs), strict=True)
            torch._foreach_lerp_(ema, model, weight if where is None else [weight * where] * len(ema))
        for ours, theirs in self._copied:
            ours.copy_(theirs if where is None else torch.where(where, theirs, ours))
