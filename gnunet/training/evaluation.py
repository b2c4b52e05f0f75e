"""Evaluation during training: validation loss, metrics and grids of samples, and which checkpoint is the best."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor

from gnunet.checkpoint.checkpoint import TrainState, checkpoint_name
from gnunet.checkpoint.trained_model import TrainedModel
from gnunet.config import EvaluateConfig
from gnunet.data.cache import cache_folder
from gnunet.diffusion import encode_png, make_grid
from gnunet.distributed.signals import StopSignal
from gnunet.evaluation import FeatureMetric, Scorer, check_reference, get_metrics, load_extractors, validation_loss
from gnunet.evaluation.extractors import EXTRACTORS
from gnunet.evaluation.features import Images
from gnunet.files import atomic_write
from gnunet.processes import Processes, single_threaded
from gnunet.training.progress import Display
from gnunet.training.session import Session

IMAGE_TRACKERS = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}
"""Trackers of Accelerate that take images, each with options for an array (N, H, W, C)."""


def chosen_metrics(evaluate: EvaluateConfig) -> list[FeatureMetric]:
    """The metrics that a configuration names."""
    return get_metrics(list(dict.fromkeys(evaluate.metrics)), [*EXTRACTORS, *evaluate.extractors])


def check_extractors(evaluate: EvaluateConfig) -> None:
    """Load and free what evaluations will need: a missing package or file raises ConfigError before training."""
    if evaluate.every is not None:
        load_extractors(chosen_metrics(evaluate), sources=evaluate.extractors, weights=evaluate.weights)


def check_enough_images(session: Session) -> None:
    """Raise DataError if the metrics need more training images than there are."""
    if session.config.evaluate.every is not None:
        check_reference(chosen_metrics(session.config.evaluate), len(session.train_set.rows))


def sample_fn(model: TrainedModel, accelerator: Accelerator, check: Callable[[], None] = lambda: None) -> Images:
    """A function from indices to a model's images, as pictures: image i is the one that `gnunet sample` writes.

    On a CPU it samples in one thread, since an image's bits depend on the number of threads, which launches change.
    `check` is called before each run of the network; what it raises ends the sampling.
    """

    def images(indices: range) -> Any:
        with single_threaded():
            return model.scaling.to_pictures(model.sample(indices, accelerator, check))

    return images


def validate(session: Session, images_seen: int, *, stop: StopSignal, display: Display) -> dict[str, Any]:
    """The validation loss of the EMA weights, as a record of metrics.jsonl. Raises StopRequested after a signal."""
    accelerator = session.accelerator
    display.set_status("validating")

    def progress(done: int) -> None:
        stop.check(accelerator)
        display.progress("validating", done, session.config.validation.num_examples)

    result = validation_loss(
        session.ema_network, session.process, session.val_set, device=accelerator.device,
        batch_size=session.config.validation.batch_size, autocast=accelerator.autocast,
        processes=Processes.of(accelerator), progress=progress,
    )  # fmt: skip
    return {
        "images": images_seen,
        "validation_loss": result.validation_loss,
        "validation_loss_standard_error": result.standard_error,
        "validation_loss_by_log_snr": result.by_log_snr,
        "validation_bank": session.val_set.fingerprint[:16],
    }


def evaluate(session: Session, images_seen: int, *, stop: StopSignal, display: Display) -> dict[str, Any]:
    """Metrics of the EMA weights' samples against the training images, as a record of metrics.jsonl.

    Ranks sample whole batches round-robin, and exchange features after each round. The record is the same on every
    rank, but for rounding on different devices. Raises StopRequested after a signal.
    """
    config, accelerator = session.config, session.accelerator
    settings, model, train_set = config.evaluate, session.ema_model, session.train_set
    processes = Processes.of(accelerator)

    def progress(what: str, total: int, done: int) -> None:
        stop.check(accelerator)
        display.progress(f"evaluating: {what}", done, total)

    metrics = chosen_metrics(settings)
    extractors = load_extractors(
        metrics, sources=settings.extractors, weights=settings.weights, device=accelerator.device
    )
    scorer = Scorer(
        metrics, extractors, train_set.table, train_set.rows, cache_folder(config.data.cache_dir), processes=processes,
        progress=partial(progress, "training images", len(train_set.rows)),
    )  # fmt: skip
    scores = scorer.score(
        sample_fn(model, accelerator, partial(stop.check, accelerator)), settings.num_images,
        chunk=model.sampling.batch_size, progress=partial(progress, "samples", settings.num_images),
    )  # fmt: skip
    metadata = {
        "num_images": settings.num_images,
        **model.sampling_metadata(),
        "reference": train_set.table.fingerprint[:16],
        "reference_images": len(train_set.rows),
    }
    return {"images": images_seen, **scores, **{f"evaluation_{name}": value for name, value in metadata.items()}}


def format_scores(record: dict[str, Any], metrics: list[str]) -> dict[str, str]:
    """The validation loss or the metrics of a record, with standard errors, as text."""
    line = {}
    for name in ("validation_loss", *metrics):
        if name in record:
            error = record.get(f"{name}_standard_error")
            line[name] = f"{record[name]:.5g}" + ("" if error is None else f" (standard error {error:.2g})")
    if "evaluation_num_images" in record:
        line["n"] = str(record["evaluation_num_images"])
    return line


def update_best(state: TrainState, evaluate: EvaluateConfig, record: dict[str, Any]) -> bool:
    """Update `state.best` if a record has a better value of evaluate.monitor than all before under the same settings;
    returns whether it has.

    The main rank decides, since values may differ between devices by rounding.
    """
    name = evaluate.monitor
    if name is None or name not in record:
        return False
    higher = any(metric.higher_is_better for metric in chosen_metrics(evaluate) if metric.name == name)
    # A batch size changes a metric by rounding alone.
    settings = {key: record[key] for key in record if key.startswith("evaluation_") and not key.endswith("batch_size")}
    is_comparable = state.best.get("metric") == name and state.best.get("settings", settings) == settings
    value, best = record[name], state.best.get("value") if is_comparable else None
    better = math.isfinite(value) and (best is None or (value > best if higher else value < best))
    better, value = broadcast_object_list([better, value])
    if better:
        state.best = {"images": state.images, "metric": name, "value": value, "settings": settings}
    return better


def sample_grid(session: Session, *, stop: StopSignal, display: Display) -> np.ndarray:
    """Images 0 to sampling.num_images - 1 of the EMA weights, as pictures (N, H, W, 1 or 3), on every rank.

    Ranks sample whole batches round-robin. Raises StopRequested after a signal.
    """
    model, accelerator = session.ema_model, session.accelerator
    display.set_status("sampling")
    count = model.sampling.num_images

    def sample(indices: range) -> list[Tensor]:
        made = model.sample(indices, accelerator, partial(stop.check, accelerator))
        return [torch.from_numpy(model.scaling.to_pictures(made)).to(accelerator.device)]

    def progress(done: int) -> None:
        display.progress("sampling", done, count)

    batches = Processes.of(accelerator).map_batches(sample, count, model.sampling.batch_size, progress)
    return torch.cat([images for _, (images,) in batches]).cpu().numpy()


def draw_grid(images: np.ndarray, model: TrainedModel, start: int = 0) -> Image.Image:
    """`model.grid_tiles` of the images from `start` on, uint8 (N, H, W, C), small ones enlarged and with the names of
    their classes, or their labels that are numbers, if any."""
    labels, names = model.labels(range(start, start + len(images))), None
    if labels is not None:
        to_names = model.float_labels.names if model.float_labels else lambda each: [model.class_names[i] for i in each]
        names = to_names(labels)
    tiles, before = model.grid_tiles(images, start)
    columns = math.ceil(math.sqrt(len(images) / 3)) if before else None
    return make_grid(tiles, columns, scale=None, names=names, before=before)


def save_grid(session: Session, folder: Path, images: np.ndarray, images_seen: int) -> Path:
    """Write `draw_grid` of the images sampled at `images_seen` images, logged to trackers that take images, too."""
    path, model = folder / f"{checkpoint_name(images_seen)}.png", session.ema_model
    grid = draw_grid(images, model)
    atomic_write(path, encode_png(grid))
    for tracker in session.accelerator.trackers:
        if tracker.name in IMAGE_TRACKERS:
            pictures = {"samples": np.asarray(grid.convert("RGB"))[None]}
            tracker.log_images(pictures, step=images_seen, **IMAGE_TRACKERS[tracker.name])
    return path
