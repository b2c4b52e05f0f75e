"""Evaluation in training: metrics of the EMA weights' samples, which checkpoint is the best, grids of samples."""

import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gnunet.checkpoint.checkpoint import TrainState, checkpoint_name
from gnunet.checkpoint.trained_model import TrainedModel
from gnunet.config import EvaluateConfig
from gnunet.data.cache import cache_folder
from gnunet.diffusion import make_grid
from gnunet.distributed.signals import StopSignal
from gnunet.evaluation import FeatureMetric, Scorer, check_reference, get_metrics, load_extractors
from gnunet.evaluation.batching import batches_by_rank, single_threaded
from gnunet.evaluation.extractors import EXTRACTORS
from gnunet.evaluation.features import Images
from gnunet.files import atomic_write
from gnunet.processes import Processes
from gnunet.training.progress import Display
from gnunet.training.session import Session


def chosen_metrics(evaluate: EvaluateConfig) -> list[FeatureMetric]:
    """The metrics that a configuration names."""
    return get_metrics(list(dict.fromkeys(evaluate.metrics)), [*EXTRACTORS, *evaluate.extractors])


def check_extractors(evaluate: EvaluateConfig) -> None:
    """Load what evaluations will need and let go of it again, so that what is missing is found before training.

    Raises:
        ConfigError: a package or a file is missing, with what to install or put where.
    """
    if evaluate.every is not None:
        load_extractors(chosen_metrics(evaluate), sources=evaluate.extractors, weights=evaluate.weights)


def sample_fn(model: TrainedModel, accelerator: Accelerator, check: Callable[[], None] = lambda: None) -> Images:
    """The images of a model as something to measure: image i is sample.py's. `check`: see `TrainedModel.sample`.

    On a CPU in one thread, since the bits depend on the number of threads, and that on the launch.
    """

    def images(indices: range) -> Any:
        with single_threaded():
            return model.sample(indices, accelerator, check=check)

    return images


def sampling_metadata(model: TrainedModel) -> dict[str, Any]:
    """What decides the samples of a model besides its weights and their number, as records name it."""
    sampling = model.sampling
    return {
        "sampler": model.process.resolve_sampler(sampling.sampler, sampling.num_inference_steps),
        "steps": sampling.num_inference_steps,
        "guidance": sampling.guidance_scale,
        "batch_size": sampling.batch_size,
        "seed": model.seed,
    }


def evaluate(session: Session, images_seen: int, *, stop: StopSignal, display: Display) -> dict[str, Any]:
    """Measure the averaged weights' samples against the training images, all processes together.

    Each process samples whole batches in turn; after each round of batches the processes exchange features.
    Extractors are loaded for the time of an evaluation only: the memory that training has is what it would have
    without.

    Returns:
        The line of metrics.jsonl, the same on every process but for what different devices may compute.

    Raises:
        DataError: fewer training images than the metrics need.
        StopRequested: a stop was asked for meanwhile.
    """
    config, accelerator = session.config, session.accelerator
    settings, model, rows = config.evaluate, session.ema_model, session.train_set.rows
    processes = Processes.of(accelerator)

    def progress_of(what: str, total: int) -> Callable[[int], None]:
        def progress(done: int) -> None:
            stop.check(accelerator)
            display.progress(what, done, total)

        return progress

    metrics = chosen_metrics(settings)
    extractors = load_extractors(
        metrics, sources=settings.extractors, weights=settings.weights, device=accelerator.device
    )
    scorer = Scorer(
        metrics, extractors, session.train_set.table, rows, cache_folder(config.data.cache_dir), processes=processes,
        progress=progress_of("evaluating: training images", len(rows)),
    )  # fmt: skip
    values = scorer.score(
        sample_fn(model, accelerator, partial(stop.check, accelerator)), settings.num_images,
        chunk=model.sampling.batch_size, processes=processes,
        progress=progress_of("evaluating: samples", settings.num_images),
    )  # fmt: skip
    about = {
        "num_images": settings.num_images,
        **sampling_metadata(model),
        "reference": session.train_set.table.fingerprint[:16],
        "reference_images": len(rows),
    }
    return {"images": images_seen, **values, **{f"evaluation_{name}": value for name, value in about.items()}}


def check_enough_images(session: Session) -> None:
    """Refuse, by a DataError, fewer training images than the metrics need, before training."""
    if session.config.evaluate.every is not None:
        check_reference(chosen_metrics(session.config.evaluate), len(session.train_set.rows))


def format_scores(values: dict[str, Any], metrics: list[str]) -> dict[str, str]:
    """The metrics of a line as a person reads them."""
    shown = {}
    for name in metrics:
        error = values.get(f"{name}_standard_error")
        shown[name] = f"{values[name]:.5g}" + ("" if error is None else f" (standard error {error:.2g})")
    return {**shown, "n": str(values["evaluation_num_images"])}


def update_best(state: TrainState, evaluate: EvaluateConfig, values: dict[str, Any]) -> bool:
    """Note in `state` a value of evaluate.monitor that is better than all before; says whether there was one.

    The main process decides, since processes on different devices may differ in the last digits.
    """
    name = evaluate.monitor
    if name is None or name not in values:
        return False
    higher = any(metric.higher_is_better for metric in chosen_metrics(evaluate) if metric.name == name)
    value, before = values[name], state.best.get("value")
    better = math.isfinite(value) and (before is None or (value > before if higher else value < before))
    better, value = broadcast_object_list([better, value])
    if better:
        state.best = {"images": state.images, "metric": name, "value": value}
    return better


def sample_grid(session: Session, check: Callable[[], None]) -> np.ndarray:
    """Images 0 .. sampling.num_images - 1 of the averaged weights, uint8 (N, H, W, C), on every process.

    The processes sample whole batches in turn. `check`: see `TrainedModel.sample`.
    """
    model, accelerator = session.ema_model, session.accelerator
    settings, rank, world = model.sampling, accelerator.process_index, accelerator.num_processes
    images = np.empty((settings.num_images, model.resolution, model.resolution, model.channels), dtype=np.uint8)
    for batches in batches_by_rank(len(images), settings.batch_size, world):
        mine = batches[rank] if rank < len(batches) else range(1)
        padded = torch.zeros(settings.batch_size, *images.shape[1:], dtype=torch.uint8, device=accelerator.device)
        padded[: len(mine)] = torch.from_numpy(model.sample(mine, accelerator, check=check))
        gathered = accelerator.gather(padded).view(world, *padded.shape).cpu().numpy()
        for batch, part in zip(batches, gathered, strict=False):
            images[batch] = part[: len(batch)]
    return images


def save_grid(folder: Path, images: np.ndarray, images_seen: int) -> Path:
    """Write images as the one PNG of what a run has sampled at so many images seen."""
    path = folder / f"{checkpoint_name(images_seen)}.png"
    png = io.BytesIO()
    make_grid(images).save(png, format="PNG")
    atomic_write(path, png.getvalue())
    return path
