"""Measurements of a complete run: of its EMA weights, on its validation set, and the cost of a training step.

All processes of a launch call these functions, and get the same results.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gnunet.environment import activation_bytes
from gnunet.evaluation import load_extractors, nearest_images
from gnunet.evaluation.validation import per_example_errors, validation_errors
from gnunet.models import UNet2D
from gnunet.models.norm_sites import REGIONS
from gnunet.norms import NormLayer, kind_of
from gnunet.processes import Processes
from gnunet.training.cuda_graph import WARM_UP_STEPS
from gnunet.training.evaluation import chosen_metrics, sample_fn
from gnunet.training.session import Session
from gnunet.training.trainer import train_step

STATISTICS_IMAGES, STATISTICS_BATCHES = 1024, 16
"""Fewest training images and batches that running statistics are re-estimated on; fewer images where the run has seen
fewer."""
MAX_NEAREST_SAMPLES = 256  # samples whose nearest training images are found, from the first
REPEATS = 5  # timings whose median is taken, after a warm-up
GPU_CALLS = 10  # calls of a norm layer in a timing on a GPU, which runs one while the next is queued
DIGITS = 7  # significant digits of numbers computed in float32


def norm_kinds(modules: Iterable[nn.Module]) -> list[str]:
    """The kinds of the norm layers in modules, in their order."""
    layers = [layer for module in modules for layer in module.modules()]
    return list(dict.fromkeys(kind_of(layer) for layer in layers if isinstance(layer, NormLayer)))


def batch_dependent_layers(network: nn.Module) -> list[NormLayer]:
    """The norms of a network whose output for an image depends on others."""
    return [layer for layer in network.modules() if isinstance(layer, NormLayer) and layer.batch_dependent]


def val_errors(session: Session) -> dict[str, list[float] | None]:
    """The squared error of v of each example of the validation set, as in the validation loss.

    Returns:
        `running`: with running statistics, as in evaluation. `batch`: with the statistics of a batch whose other
        examples are of training. `precise`: with statistics of the EMA weights themselves, re-estimated on training
        images; the session's EMA weights keep them. The last two are None where no norm depends on the batch.
    """
    found: dict[str, list[float] | None] = {"running": _by_running(session), "precise": None, "batch": None}
    if session.batch_norm_scope:
        found["batch"] = _by_batch(session)
        images = min(STATISTICS_IMAGES, session.total_images)
        session.update_ema_bn_stats(max(STATISTICS_BATCHES, math.ceil(images / session.micro_batch_size)))
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
    """With one example in each batch that is normalized together; the others are of training."""
    val_set, accelerator, size = session.val_set, session.accelerator, session.micro_batch_size
    network = copy.deepcopy(session.ema.model).eval()  # training changes running statistics
    layers = batch_dependent_layers(network)
    for layer in layers:
        layer.train()
    together = min(size, max(getattr(layer, "ghost_size", size) for layer in layers))
    positions = range(0, size, together)

    def of_examples(batch: range) -> list[Tensor]:
        first = batch.start // len(positions) * size
        others = session.network_inputs(session.train_set.__getitems__(range(first, first + size)))
        return [_errors(session, _AmongOthers(network, others, positions[: len(batch)]), batch)]

    with torch.no_grad():
        found = Processes.of(accelerator).map_batches(of_examples, len(val_set), len(positions))
        return rounded(torch.cat([errors for _, (errors,) in found]).tolist())


class _AmongOthers:
    """A network whose inputs take the positions of some in a batch of others."""

    def __init__(self, network: UNet2D, others: tuple[Any, ...], positions: range) -> None:
        self.network, self.others, self.positions = network, others, list(positions)
        self.class_embedding = network.class_embedding

    def __call__(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None, return_dict: bool) -> tuple[Tensor]:
        inputs = list(self.others)
        if (labels := inputs[5]) is not None:  # of augmentation, which validation images do not have
            inputs[5] = labels.clone()
            inputs[5][self.positions] = 0
        for i, ours in enumerate((x, timestep, class_labels)):
            if ours is not None:
                inputs[i] = inputs[i].clone()
                inputs[i][self.positions] = ours.to(inputs[i].dtype)
        return (self.network(*inputs)[0][self.positions],)


def magnitudes(session: Session) -> dict[str, Any]:
    """Magnitudes of activations and gradients in each log-SNR bin of the validation set, in eval mode.

    Returns:
        `log_snr`: the centres of the bins. `activation_rms`, `activation_max`: of the inputs of the norm layers in each
        region of the network: the root mean square, averaged over layers before the root, and the largest magnitude.
        `gradient_norm`: of the gradient of the bin's mean error of v with respect to all weights. None for an empty
        bin.
    """
    # A copy: its hooks and gradients end with it.
    val_set, network = session.val_set, copy.deepcopy(session.ema.model).eval().requires_grad_(True)
    layers = [(REGIONS[path.split(".")[0]], _watch_inputs(norm)) for path, norm in network.norm_layers().items()]
    edges, size = session.config.validation.bin_edges, session.config.validation.batch_size
    rms: dict[str, list[float | None]] = {region: [] for region in REGIONS.values()}
    largest: dict[str, list[float | None]] = {region: [] for region in REGIONS.values()}
    gradient_norm: list[float | None] = []
    for b in range(val_set.num_bins):
        network.zero_grad()
        for _, seen in layers:
            seen.clear()
        indices = np.flatnonzero(val_set.bins == b)
        for start in range(0, len(indices), size):
            (_errors(session, network, indices[start : start + size]).sum() / len(indices)).backward()
        for region in REGIONS.values():
            found = [tuple(zip(*seen, strict=True)) for where, seen in layers if where == region and seen]
            squares = [sum(square_sums) / sum(counts) for square_sums, _, counts in found]
            rms[region].append(math.sqrt(sum(squares) / len(squares)) if squares else None)
            largest[region].append(max((max(each) for _, each, _ in found), default=None))
        gradients = [p.grad.double().square().sum() for p in network.parameters() if p.grad is not None]
        gradient_norm.append(float(torch.stack(gradients).sum().sqrt()) if gradients else None)
    return {
        "log_snr": [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)],
        "activation_rms": {region: rounded(values) for region, values in rms.items()},
        "activation_max": {region: rounded(values) for region, values in largest.items()},
        "gradient_norm": rounded(gradient_norm),
    }


def _watch_inputs(norm: nn.Module) -> list[tuple[float, float, int]]:
    """A list that gets the sum of squares, the largest magnitude and the size of each input of a layer."""
    seen: list[tuple[float, float, int]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        seen.append((float(x.double().square().sum()), float(x.abs().max()), x.numel()))

    norm.register_forward_pre_hook(record)
    return seen


def _errors(session: Session, network: UNet2D, indices: np.ndarray) -> Tensor:
    """The error of v of some of the validation set's examples, (n,)."""
    accelerator = session.accelerator
    return per_example_errors(
        network, session.process, session.val_set, indices, device=accelerator.device, autocast=accelerator.autocast
    )


def nearest(session: Session) -> dict[str, Any] | None:
    """Whether samples of the EMA weights are copies of training images, by the first extractor of the evaluations.

    See `gnunet.evaluation.Neighbours`; None where the run has no evaluations.
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
    found = nearest_images(samples, examples.table, examples.rows, extractor, k=1, processes=Processes.of(accelerator))
    return {
        "extractor": name,
        "num_images": len(samples),
        "distance_ratio": found.distance_ratio,
        "near_share": found.near_duplicate_rate,
    }


def rounded(values: Any) -> list[Any]:
    """Numbers or None, to DIGITS significant digits."""
    return [None if value is None else float(f"{value:.{DIGITS}g}") for value in values]


def activation_memory_mib(session: Session) -> float:
    """Memory that the forward pass of one micro-batch keeps for the backward pass, without weights, in MiB."""
    return activation_bytes(lambda: _losses(session), session.unet.parameters()) / 2**20


def _losses(session: Session) -> Tensor:
    """The losses of the first micro-batch of the run, in training mode."""
    indices = list(range(session.micro_batch_size))
    images, noise, level, inputs = session.to_device(session.train_set.__getitems__(indices))
    return session.process.loss_and_objective(session.unet, images, noise, level, **inputs)[1]


@dataclass(frozen=True)
class StepCost:
    """The cost of an optimizer step on this device."""

    seconds: float
    norm_share: float | None  # that of the norm layers; None where torch.compile fuses them with other layers
    peak_memory_mib: float | None  # on a GPU, including weights, EMA weights and optimizer; None on a CPU


def step_cost(session: Session) -> StepCost:
    """Time whole steps, and the norm layers' forward and backward passes alone on inputs of the same shapes.

    The norm layers include activation and conditioning. The work of a norm on convolutions (weight_norm,
    standardization) is not in its share. Changes the weights.
    """
    device = session.accelerator.device
    norms = None if session.config.train.compile else _norm_seconds(session) * session.accumulation
    total, size = session.total_images, session.config.train.batch_size
    batches = session.batches(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = 1 + (0 if session.graphs is None else WARM_UP_STEPS)
    starts = range(0, total, size)[: first + REPEATS]
    seconds = [_seconds(lambda start=start: train_step(session, batches, start), device) for start in starts]
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    usual = statistics.median(seconds[first:] or seconds)
    return StepCost(usual, None if norms is None else norms / usual, peak)


def _norm_seconds(session: Session) -> float:
    """Seconds that the norm layers take in one micro-batch."""
    calls_seen: list[tuple[nn.Module, Tensor, dict[str, Tensor]]] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], tables: dict[str, Tensor | None]) -> None:
        shapes = {name: table.to("meta") for name, table in tables.items() if table is not None}
        calls_seen.append((module, args[0].to("meta"), shapes))

    def like(shape: Tensor) -> Tensor:
        return torch.randn_like(shape, device=device).requires_grad_()

    norms = session.unet.norm_layers().values()
    hooks = [norm.register_forward_pre_hook(record, with_kwargs=True) for norm in norms]
    with torch.no_grad():
        _losses(session)
    for hook in hooks:
        hook.remove()
    device, total = session.accelerator.device, 0.0
    calls = 1 if device.type == "cpu" else GPU_CALLS
    for module, shape, shapes in calls_seen:
        x, tables = like(shape), {name: like(table) for name, table in shapes.items()}
        with session.accelerator.autocast():
            grad = torch.randn_like(module(x, **tables))

        def run(module=module, x=x, tables=tables, grad=grad) -> None:
            with session.accelerator.autocast():
                y = module(x, **tables)
            y.backward(grad)

        run = run if session.graphs is None else session.graphs.captured(run)
        total += statistics.median([_seconds(run, device, calls) for _ in range(1 + REPEATS)][1:]) / calls
    session.strategy.optimizer.zero_grad()
    return total


def _seconds(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """The seconds that `calls` calls take."""
    wait = (lambda: None) if device.type == "cpu" else partial(torch.accelerator.synchronize, device)
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return time.perf_counter() - start
