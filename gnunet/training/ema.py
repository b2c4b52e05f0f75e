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
    """Exponent gamma of the power-function average whose relative width is `std` (at most 0.28).

    Karras et al. (2024), EDM2: the profile t^gamma on [0, 1] has the variance
    (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); this solves it for gamma.
    """
    target = std**-2
    return float(np.roots([1.0, 7.0, 16.0 - target, 12.0 - target]).real.max())


def ema_decay(train: TrainConfig, images: int) -> float:
    """Share of the old average that survives the step which ends at `images` images seen."""
    if train.ema_kind == "power":
        return max(1.0 - train.batch_size / images, 0.0) ** (power_exponent(train.ema_std) + 1.0)
    half_life = float(train.ema_half_life)
    if train.ema_rampup is not None:
        half_life = min(half_life, images * train.ema_rampup)
    return 0.5 ** (train.batch_size / half_life)


class EMA:
    """A second copy of a model that follows the first: parameters and buffers averaged in fp32, counts copied.

    The copy is a whole model in eval mode, so that validation and sampling use it as it is and nothing is
    ever swapped into a model that trains, is compiled or is wrapped for DDP.

    Running statistics are averaged as the weights are: those of the newest weights alone would belong to another
    model than the average. Where `running_statistics` is False they are left alone, for someone to estimate them.

    Args:
        model: the one to follow.
        shard: splits a model over processes, in place: the copy, and then `model` itself (see Sharding.shard).
        running_statistics: average them.
    """

    def __init__(
        self, model: Model, *, shard: Callable[[Model], None] | None = None, running_statistics: bool = True
    ) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        if shard is not None:
            shard(self.model)
            shard(model)
        left_alone = [] if running_statistics else running_buffers(self.model)
        pairs = [*zip(self.model.parameters(), model.parameters(), strict=True)]
        pairs += zip(self.model.buffers(), model.buffers(), strict=True)
        pairs = [pair for pair in pairs if all(pair[0] is not buffer for buffer in left_alone)]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average towards the followed model: average = decay * average + (1 - decay) * weights."""
        averaged, followed = zip(*((to_local(mine), to_local(theirs)) for mine, theirs in self._averaged), strict=True)
        torch._foreach_lerp_(averaged, followed, 1.0 - decay)
        for mine, theirs in self._copied:
            mine.copy_(theirs)

    @torch.no_grad()
    def update_where(self, condition: Tensor, share: Tensor) -> None:
        """`update` by tensors on the device; if the condition is false, the average stays as it is, but for the sign of
        a negative zero.

        Args:
            condition: bool ().
            share: 1 - decay, float32 ().
        """
        averaged, followed = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averaged, followed, [share * condition] * len(averaged))
        for mine, theirs in self._copied:
            mine.copy_(torch.where(condition, theirs, mine))
