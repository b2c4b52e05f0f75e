"""Batch renormalization."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor
from typing_extensions import Doc

from .batch import BatchNorm
from .layer import append_dims
from .running_stats import in_checkpoint_recompute, standardize


class BatchRenorm(BatchNorm):
    """BatchNorm whose output in training is corrected towards that of evaluation: x_hat * r + d.

    r = sigma_batch / sigma in [1 / r_max, r_max] and d = (mean_batch - mean) / sigma in [-d_max, d_max], by the
    running statistics before this batch, are constants to the gradient. r_max = 1 and d_max = 0 is BatchNorm;
    without bounds, training and evaluation compute the same. The bounds grow from there linearly over the first
    `renorm_warmup` batches. Ioffe, Batch Renormalization (arXiv:1702.03275), with bounds of 3 and 5; the defaults
    are those of Wu and He (arXiv:1803.08494) for small batches.
    """

    supports_checkpointing = False

    def __init__(
        self,
        num_channels: int,
        *,
        r_max: Annotated[float, Ge(1), Doc("Bound of the correction of the scale; 1 is none.")] = 1.5,
        d_max: Annotated[
            float, Ge(0), Doc("Bound of the correction of the mean, in running standard deviations.")
        ] = 0.5,
        renorm_warmup: Annotated[
            int, Ge(0), Doc("Batches over which the bounds grow from those of batch normalization.")
        ] = 0,
        **options: Any,
    ) -> None:
        super().__init__(num_channels, **options)
        self.r_max, self.d_max, self.renorm_warmup = r_max, d_max, renorm_warmup

    def normalize(self, u: Tensor) -> Tensor:
        if not self.training or self.population_stats is not None:
            return super().normalize(u)
        if in_checkpoint_recompute():
            raise RuntimeError("batch_renorm cannot be used with gradient checkpointing: its statistics have changed")
        batch = self.merge_samples(self.sample_stats(u))
        mean, variance = self.running_stats(u)
        correct = _correction_operator if torch.compiler.is_compiling() else _correction
        r, d = correct(
            batch.mean.detach(), batch.variance.detach(), mean, variance, self.num_batches_tracked,
            self.eps, self.r_max, self.d_max, self.renorm_warmup,
        )  # fmt: skip
        self.update_running_stats(batch)
        return standardize(u, batch.mean, batch.variance, self.eps) * append_dims(r, u) + append_dims(d, u)


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
    """r and d, with the shape of mean."""
    batches = num_batches.max().to(mean.dtype)
    progress = (batches / warmup).clamp(max=1) if warmup else torch.ones_like(batches)
    r_bound, d_bound = 1 + progress * (r_max - 1), progress * d_max
    sigma = (variance + eps).sqrt()
    r = ((batch_variance + eps).sqrt() / sigma).clamp(1 / r_bound, r_bound)
    d = ((batch_mean - mean) / sigma).clamp(-d_bound, d_bound)
    return r, d


# torch.compile would recompute r and d in the backward pass, from running statistics that have been updated since
# (torch 2.13), which gives wrong gradients. It saves the results of a custom operator.
_correction_operator = torch.library.custom_op("gnunet::batch_renorm_correction", _correction, mutates_args=())


@_correction_operator.register_fake
def _correction_fake(batch_mean: Tensor, batch_variance: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)
