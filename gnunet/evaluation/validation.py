"""The validation loss: one number that is comparable across processes, prediction types and norms."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gnunet.data.dataset import to_network
from gnunet.data.validation import ValidationSet
from gnunet.diffusion import Process, eval_mode
from gnunet.diffusion.process import per_sample_mse
from gnunet.processes import SINGLE_PROCESS, Processes


@dataclass(frozen=True)
class ValidationResult:
    """Mean squared error of v over a validation set, by bin of log-SNR and overall."""

    validation_loss: float  # mean over the bins that have examples; NaN if an error is not finite
    standard_error: float  # standard error of it, from the variance within the bins; NaN if a bin has one example
    by_log_snr: list[float | None]  # mean of each bin, from low to high log-SNR; None if it is empty
    by_log_snr_standard_errors: list[float | None]  # of each bin's mean; None if it has fewer than two examples


def validation_loss(network: nn.Module, process: Process, val_set: ValidationSet, **settings: Any) -> ValidationResult:
    """The error of the network's denoiser over the validation set, the same for any number of ranks.

    This is the error of v = alpha * noise - sigma * x0, with the noised image rescaled to alpha^2 + sigma^2 = 1
    (Salimans & Ho, 2022), into which every network's output can be converted. Since
    v_hat - v = -(x0_hat - x0) / sigma, its square is (1 + SNR) times the squared error of x0.

    The settings are the keywords of `validation_errors`.
    """
    return summarize(validation_errors(network, process, val_set, **settings), val_set.bins, val_set.num_bins)


def validation_errors(
    network: nn.Module, process: Process, val_set: ValidationSet, *, device: torch.device | str = "cpu",
    batch_size: int = 64, autocast: Callable[[], AbstractContextManager] = nullcontext,
    processes: Processes = SINGLE_PROCESS, progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:  # fmt: skip
    """The errors that `validation_loss` averages, float64 (n,) in the set's order, on every rank.

    Args:
        network: called as network(x, timestep, class_labels=labels, return_dict=False)[0], with the set's labels if it
            has a class embedding. Runs in eval mode without gradients; its modes are restored.
        device: where the network is.
        autocast: makes the context that the network runs in.
        processes, progress: as in `Processes.map_batches`.
    """

    def errors(indices: range) -> list[Tensor]:
        return [per_example_errors(network, process, val_set, indices, device=device, autocast=autocast)]

    with eval_mode(network):
        found = [batch for _, (batch,) in processes.map_batches(errors, len(val_set), batch_size, progress)]
    return torch.cat(found).double().cpu().numpy()


def per_example_errors(
    network: nn.Module, process: Process, val_set: ValidationSet, indices: Sequence[int], *,
    device: torch.device | str, autocast: Callable[[], AbstractContextManager],
) -> Tensor:  # fmt: skip
    """The errors of one batch of the set's examples, fp32 (len(indices),), in the network's current mode."""
    batch = val_set.batch(indices)
    images, condition = to_network(val_set.table, val_set.condition, batch, device)
    level = process.from_log_snr(batch["log_snr"]).to(device)
    x = process.add_noise(images, batch["noise"].to(device), level)
    has_classes = getattr(network, "class_embedding", None) is not None
    labels = batch["labels"].to(device) if has_classes else None
    with autocast():
        estimate = process.denoise(network, x, level, labels, condition)
    return per_sample_mse(estimate, images) * (1 + level.log_snr.exp())


def summarize(errors: np.ndarray, bins: np.ndarray, num_bins: int) -> ValidationResult:
    """Means and standard errors of float64 errors (n,) whose bins are int64 (n,)."""
    groups = [errors[bins == b] for b in range(num_bins)]
    means = [group.mean().item() if len(group) else None for group in groups]
    sems = [group.std(ddof=1).item() / math.sqrt(len(group)) if len(group) > 1 else None for group in groups]
    filled = [(mean, sem) for mean, sem in zip(means, sems, strict=True) if mean is not None]
    variance = sum(math.nan if sem is None else sem**2 for _, sem in filled)
    return ValidationResult(
        validation_loss=sum(mean for mean, _ in filled) / len(filled),
        standard_error=math.sqrt(variance) / len(filled),
        by_log_snr=means,
        by_log_snr_standard_errors=sems,
    )
