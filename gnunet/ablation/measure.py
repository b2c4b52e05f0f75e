"""Measurements of a complete run: of its EMA weights, on its validation set.

All processes of a launch call these functions, and get the same results.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gnunet.evaluation import load_extractors, nearest_images
from gnunet.evaluation.validation import per_example_errors, validation_errors
from gnunet.models import UNet2D
from gnunet.norms import NormLayer, kind_of
from gnunet.processes import Processes
from gnunet.training.evaluation import chosen_metrics, sample_fn
from gnunet.training.session import Session

REGIONS = {"down_blocks": "encoder", "mid_block": "middle", "up_blocks": "decoder", "conv_norm_out": "out"}
"""Names of the regions of a U-Net."""
STATISTICS_IMAGES, STATISTICS_BATCHES = 1024, 16
"""Fewest training images and batches that running statistics are re-estimated on; fewer images where the run has seen
fewer."""
MAX_NEAREST_SAMPLES = 256
"""Samples whose nearest training images are found, from the first."""
DIGITS = 7
"""Significant digits of numbers computed in float32."""


def norm_kinds(network: UNet2D) -> list[str]:
    """The kinds of the norm layers in a network, in the order in which they run."""
    layers = [layer for norm in network.norm_layers().values() for layer in norm.modules()]
    return list(dict.fromkeys(kind_of(layer) for layer in layers if isinstance(layer, NormLayer)))


def is_batch_dependent(network: UNet2D) -> bool:
    """Whether in training the output of a norm layer for a sample depends on the rest of the batch."""
    return any(layer.batch_dependent for layer in network.modules() if isinstance(layer, NormLayer))


def val_errors(session: Session) -> dict[str, list[float] | None]:
    """The squared error of v of each example of the validation set, as in the validation loss.

    Returns:
        `running`: with running statistics, as in evaluation. `batch`: with the statistics of the current batch, as in
        training. `precise`: with statistics of the EMA weights themselves, re-estimated on training images; the
        session's EMA weights keep them. The last two are None where no norm depends on the batch.
    """
    found: dict[str, list[float] | None] = {"running": _by_running(session), "precise": None, "batch": None}
    if is_batch_dependent(session.ema.model):
        found["batch"] = _by_batch(session)
        _estimate_statistics(session)
        found["precise"] = _by_running(session)
    return found


def _by_running(session: Session) -> list[float]:
    accelerator = session.accelerator
    errors = validation_errors(
        session.ema.model, session.process, session.val_set, device=accelerator.device,
        batch_size=session.config.validation.batch_size, autocast=accelerator.autocast,
        processes=Processes.of(accelerator),
    )  # fmt: skip
    return rounded(errors)


def _by_batch(session: Session) -> list[float]:
    """In batches as in training, which mix noise levels; the last is filled up with the first examples."""
    val_set, accelerator, size = session.val_set, session.accelerator, session.micro_batch_size
    network = copy.deepcopy(session.ema.model).eval()  # training changes running statistics
    for module in network.modules():
        if isinstance(module, NormLayer) and module.batch_dependent:
            module.train()
    # In the validation set's order neighbours have neighbouring noise levels.
    order = np.random.Generator(np.random.Philox(0)).permutation(len(val_set))
    global_size = size * accelerator.num_processes
    padded = np.resize(order, math.ceil(len(val_set) / global_size) * global_size)
    errors = torch.zeros(len(val_set), device=accelerator.device)
    with torch.no_grad():
        for start in range(size * accelerator.process_index, len(padded), global_size):
            indices = padded[start : start + size]
            found = per_example_errors(
                network, session.process, val_set, indices, device=accelerator.device, autocast=accelerator.autocast
            )
            new = max(min(len(val_set) - start, size), 0)
            errors[torch.from_numpy(indices[:new]).to(accelerator.device)] = found[:new]
    every = accelerator.gather(errors).view(accelerator.num_processes, len(val_set)).double().sum(dim=0)
    return rounded(every.cpu().numpy())


def _estimate_statistics(session: Session) -> None:
    """Re-estimate the running statistics of the EMA weights, as train.bn_update_batches does."""
    images = min(STATISTICS_IMAGES, session.total_images)
    session.update_ema_bn_stats(max(STATISTICS_BATCHES, math.ceil(images / session.micro_batch_size)))


def magnitudes(session: Session) -> dict[str, Any]:
    """Magnitudes of activations and gradients in each log-SNR bin of the validation set, in eval mode.

    Returns:
        `log_snr`: the centres of the bins. `activation_rms`, `activation_max`: of the inputs of the norm layers in each
        region of the network: the root mean square, averaged over layers before the root, and the largest magnitude.
        `gradient_norm`: of the gradient of the bin's mean error of v with respect to all weights. None for an empty
        bin.
    """
    val_set, network = session.val_set, copy.deepcopy(session.ema.model).eval().requires_grad_(True)
    edges = bin_edges(session)
    found: dict[str, Any] = {
        "log_snr": [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)],
        "activation_rms": {region: [] for region in REGIONS.values()},
        "activation_max": {region: [] for region in REGIONS.values()},
        "gradient_norm": [],
    }
    for b in range(val_set.num_bins):
        indices = np.flatnonzero(val_set.bins == b)
        network.zero_grad(set_to_none=True)
        with _record_inputs(network) as layers:
            _backward(session, network, indices)
        for region in REGIONS.values():
            inputs = [layer for layer in layers if layer.region == region and len(indices)]
            squares = [layer.square_sum / layer.elements for layer in inputs]
            rms = math.sqrt(sum(squares) / len(squares)) if squares else None
            found["activation_rms"][region].append(rms)
            found["activation_max"][region].append(max((layer.largest for layer in inputs), default=None))
        gradients = [p.grad.double().square().sum() for p in network.parameters() if p.grad is not None]
        found["gradient_norm"].append(float(torch.stack(gradients).sum().sqrt()) if len(indices) else None)
    for values in (found["gradient_norm"], *found["activation_rms"].values(), *found["activation_max"].values()):
        values[:] = rounded(values)
    return found


class ActivationStats:
    """Magnitudes of the inputs of one norm layer so far."""

    def __init__(self, region: str):
        self.region = region
        self.square_sum, self.largest, self.elements = 0.0, 0.0, 0

    def update(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        self.square_sum += float(x.double().square().sum())
        self.largest = max(self.largest, float(x.abs().max()))
        self.elements += x.numel()


@contextmanager
def _record_inputs(network: UNet2D) -> Iterator[list[ActivationStats]]:
    """Within the context, record the inputs of the network's norm layers."""
    layers, hooks = [], []
    for path, norm in network.norm_layers().items():
        layers.append(ActivationStats(REGIONS[path.split(".")[0]]))
        hooks.append(norm.register_forward_pre_hook(layers[-1].update))
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def _backward(session: Session, network: UNet2D, indices: np.ndarray) -> None:
    """Add the gradient of the mean error of v of some of the validation set's examples to the network's gradients."""
    accelerator, size = session.accelerator, session.config.validation.batch_size
    for start in range(0, len(indices), size):
        errors = per_example_errors(
            network, session.process, session.val_set, indices[start : start + size], device=accelerator.device,
            autocast=accelerator.autocast,
        )  # fmt: skip
        (errors.sum() / len(indices)).backward()


def nearest(session: Session) -> dict[str, Any] | None:
    """Whether samples of the EMA weights are copies of training images, by the first extractor of the evaluations.

    Returns:
        `extractor`, `num_images`, and of `gnunet.evaluation.Neighbours` `distance_ratio` and (as `near_share`)
        `near_duplicate_rate`. None where the run has no evaluations.
    """
    settings, accelerator, examples = session.config.evaluate, session.accelerator, session.train_set
    if settings.every is None:
        return None
    metrics = chosen_metrics(settings)[:1]
    extractors = load_extractors(
        metrics, sources=settings.extractors, weights=settings.weights, device=accelerator.device
    )
    [(name, extractor)] = extractors.items()
    samples = sample_fn(session.ema_model, accelerator)(range(min(settings.num_images, MAX_NEAREST_SAMPLES)))
    found = nearest_images(
        samples, examples.table.images, examples.rows, extractor, k=1, processes=Processes.of(accelerator)
    )
    return {
        "extractor": name,
        "num_images": len(samples),
        "distance_ratio": found.distance_ratio,
        "near_share": found.near_duplicate_rate,
    }


def bin_edges(session: Session) -> list[float]:
    """The ends of the validation set's bins of log-SNR, one more than there are bins."""
    settings = session.config.validation
    return np.linspace(settings.log_snr_min, settings.log_snr_max, settings.num_bins + 1).tolist()


def rounded(values: Any) -> list[Any]:
    """Numbers or None, to DIGITS significant digits."""
    return [None if value is None else float(f"{value:.{DIGITS}g}") for value in values]
