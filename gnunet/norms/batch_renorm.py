"""Batch renormalization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .batch import BatchNorm
from .layer import append_dims
from .moments import standardized
from .options import Option, is_number
from .running import in_checkpoint_recompute


class BatchRenorm(BatchNorm):
    """BatchNorm whose output in training is corrected towards what evaluation computes: x_hat * r + d.

    r = sigma_batch / sigma in [1 / r_max, r_max] and d = (mean_batch - mean) / sigma in [-d_max, d_max], of the
    running statistics before this batch, are constants to the gradient. r_max = 1 and d_max = 0 is BatchNorm;
    without bounds training and evaluation compute the same. The bounds grow from there, in proportion, over
    the first `renorm_warmup` batches. Ioffe, Batch Renormalization (arXiv:1702.03275), which reaches 3 and 5;
    the defaults are Wu and He's (arXiv:1803.08494) for small batches.

    Raises:
        RuntimeError: torch.utils.checkpoint runs it again in backward, when its running statistics are others.
    """

    repeatable = False
    options: ClassVar[Mapping[str, Option]] = {
        **BatchNorm.options,
        "r_max": Option(
            1.5,
            lambda value: is_number(value) and value >= 1,
            "a number of at least 1",
            "Bound of the correction of the scale; 1 is none.",
        ),
        "d_max": Option(
            0.5,
            lambda value: is_number(value) and value >= 0,
            "a number of at least 0",
            "Bound of the correction of the mean, in running standard deviations.",
        ),
        "renorm_warmup": Option(
            0,
            lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
            "a whole number of batches",
            "Batches over which the bounds grow from those of batch normalization.",
            int,
        ),
    }

    def __init__(
        self, num_channels: int, *, r_max: float, d_max: float, renorm_warmup: int = 0, **settings: Any
    ) -> None:
        super().__init__(num_channels, **settings)
        self.r_max, self.d_max, self.renorm_warmup = r_max, d_max, renorm_warmup

    def normalize(self, u: Tensor) -> Tensor:
        if not self.training or self.estimate is not None:
            return super().normalize(u)
        if in_checkpoint_recompute():
            raise RuntimeError("batch_renorm cannot be used with gradient checkpointing: its statistics have moved on")
        batch = self.batches(self.samples(u))
        mean, variance = self.running(u)
        correct = _correction_operator if torch.compiler.is_compiling() else _correction
        r, d = correct(
            batch.mean.detach(), batch.variance.detach(), mean, variance, self.num_batches_tracked,
            self.eps, self.r_max, self.d_max, self.renorm_warmup,
        )  # fmt: skip
        self.track(batch)
        return standardized(u, batch.mean, batch.variance, self.eps) * append_dims(r, u) + append_dims(d, u)


def _correction(
    batch_mean: Tensor,
    batch_variance: Tensor,
    mean: Tensor,
    variance: Tensor,
    num_batches: Tensor,
    eps: float,
    r_max: float,
    d_max: float,
    warmup: int,
) -> tuple[Tensor, Tensor]:
    """r and d, as mean."""
    batches = num_batches.max().to(mean.dtype)
    progress = (batches / warmup).clamp(max=1) if warmup else torch.ones_like(batches)
    r_bound, d_bound = 1 + progress * (r_max - 1), progress * d_max
    sigma = (variance + eps).sqrt()
    r = ((batch_variance + eps).sqrt() / sigma).clamp(1 / r_bound, r_bound)
    d = ((batch_mean - mean) / sigma).clamp(-d_bound, d_bound)
    return r, d


# Left to itself, the compiler computes r and d again in backward, from running statistics that have been updated
# since (torch 2.13), and gradients are wrong. It keeps what an operator unknown to it has given.
_correction_operator = torch.library.custom_op("gnunet::batch_renorm_correction", _correction, mutates_args=())


@_correction_operator.register_fake
def _correction_fake(batch_mean: Tensor, batch_variance: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)
