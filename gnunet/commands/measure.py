"""Run an evaluation and return its record, the content of metrics.json or validation_loss.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from gnunet.checkpoint.trained_model import WEIGHTS, find_checkpoint, load_trained_model
from gnunet.commands.evaluate_inputs import EvaluationInputs
from gnunet.data.cache import cache_folder
from gnunet.distributed.accelerator import open_accelerator
from gnunet.errors import CheckpointError, DataError
from gnunet.evaluation import (
    draw_neighbours,
    load_extractors,
    make_scorer,
    nearest_images,
    report,
    sample_size_warnings,
    validation_loss,
)
from gnunet.evaluation.batching import single_threaded
from gnunet.evaluation.features import Images
from gnunet.processes import Processes
from gnunet.training.data import load_run_data

MAX_NEAREST = 1024
"""Images for which the nearest training images are found."""
MAX_NEAREST_DRAWN = 32

Stage = Callable[[str, int], Callable[[int], None]]
"""Given a description and a total, returns a callback for the number of items done."""


def measure(
    inputs: EvaluationInputs, accelerator: Accelerator, stage: Stage = lambda description, total: lambda done: None
) -> tuple[dict[str, Any], Image.Image | None]:
    """Compute the metrics, on all ranks together.

    Returns:
        The record, and a picture of the nearest reference images if they were requested.
    """
    subject, reference, repeat = inputs.subject, inputs.reference, inputs.repeat
    processes, num_images, num_reference = Processes.of(accelerator), subject.num_images, len(reference.rows)
    extractors = load_extractors(
        inputs.metrics, sources=inputs.extractor_sources, weights=inputs.extractor_weights, device=accelerator.device
    )
    scorer = make_scorer(
        inputs.metrics, extractors, reference.table, reference.rows, cache_folder(reference.cache_dir),
        processes=processes, progress=stage("reference", num_reference),
    )  # fmt: skip
    scores, first = [], FirstImages(min(num_images, MAX_NEAREST))
    for number in range(repeat):
        images = subject.images(number, accelerator)
        if inputs.nearest and number == 0:
            images = first.record(images)
        description = "images" if repeat == 1 else f"images, {number + 1} of {repeat}"
        progress = stage(description, num_images)
        scores.append(scorer.score(images, num_images, chunk=subject.chunk, processes=processes, progress=progress))
    record = {
        "name": subject.name,
        "source": str(inputs.source),
        "num_images": num_images,
        "repeats": repeat,
        "images": {"resolution": subject.resolution, "channels": subject.channels, **subject.metadata},
        "reference": reference.metadata,
        "extractors": {name: extractor.identity for name, extractor in extractors.items()},
        "metrics": report.summarize(inputs.metrics, scores),
        "notes": sample_size_warnings(inputs.metrics, num_images, num_reference, scorer.num_features),
        "versions": report.versions(accelerator.device),
    }
    if not inputs.nearest:
        return record, None
    name, extractor = next(iter(extractors.items()))
    samples = first.gather(processes, accelerator.device)
    found = nearest_images(
        samples, reference.table.images, reference.rows, extractor, k=inputs.nearest, processes=processes,
        progress=stage("nearest", num_reference),
    )  # fmt: skip
    record["nearest"] = report.neighbours_record(found, name)
    nearest = reference.table.images[reference.rows[found.rows[:MAX_NEAREST]]]
    return record, draw_neighbours(samples, nearest, found, limit=MAX_NEAREST_DRAWN)


class FirstImages:
    """Keeps the first `count` of the images that are sampled, on whichever rank that happens."""

    def __init__(self, count: int):
        self.count = count
        self.images: np.ndarray | None = None

    def record(self, source: Images) -> Images:
        """The same source, whose images are kept."""

        def images(indices: range) -> np.ndarray:
            found = source(indices)
            if self.images is None:
                self.images = np.zeros((self.count, *found.shape[1:]), np.uint8)
            first = found[: max(self.count - indices.start, 0)]
            self.images[indices.start : indices.start + len(first)] = first
            return found

        return images

    def gather(self, processes: Processes, device: torch.device) -> np.ndarray:
        """The kept images of all ranks, uint8 (count, H, W, C), on every rank."""
        mine = torch.from_numpy(self.images).to(device)
        # What a rank has not sampled is zero there.
        return processes.gather(mine).view(processes.world_size, *mine.shape).amax(dim=0).cpu().numpy()


def measure_validation(source: Path, *, cpu: bool) -> dict[str, Any]:
    """The validation loss by noise level of a run's EMA and raw weights, on the run's own validation set.

    Raises:
        CheckpointError: `source` is not a run or a checkpoint.
        DataError: its images have changed.
    """
    if find_checkpoint(source) is None:
        raise CheckpointError(f"{source}: --validation_loss needs a run or a checkpoint, which know their data")
    models = {weights: load_trained_model(source, weights) for weights in WEIGHTS}
    model = models["ema"]
    data = load_run_data(model.config)
    if data.table.fingerprint != model.fingerprint:
        raise DataError(f"{model.config.data.source}: not the images that {model.name} was trained on")
    settings = model.config.validation
    val_set = data.val_set(settings)
    accelerator = open_accelerator(model.mixed_precision, cpu=cpu)
    results = {}
    for name, each in models.items():
        with single_threaded():  # results depend on the number of threads, and that on the launch
            result = validation_loss(
                each.network.to(accelerator.device), each.process, val_set, device=accelerator.device,
                batch_size=settings.batch_size, autocast=accelerator.autocast, processes=Processes.of(accelerator),
            )  # fmt: skip
        results[name] = report.validation_record(result)
    edges = np.linspace(settings.log_snr_min, settings.log_snr_max, settings.num_bins + 1).tolist()
    held_out = len(data.validation_rows)
    return {
        "name": model.name,
        "source": str(source),
        "bank": {
            "fingerprint": val_set.fingerprint,
            "num_examples": len(val_set),
            "source": f"{held_out} held-out images" if held_out else "training images",
            "bins": list(zip(edges, edges[1:], strict=False)),
        },
        "weights": results,
        "versions": report.versions(accelerator.device),
    }
