"""The Python interface next to the command line: `gnunet.sample` and `gnunet.evaluate`."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from gnunet.checkpoint.trained_model import TrainedModel
from gnunet.commands.measure import Evaluation
from gnunet.commands.options import load_model
from gnunet.distributed.accelerator import fresh_accelerate_state, open_accelerator
from gnunet.errors import ConfigError
from gnunet.evaluation.batching import indices_for_rank

logger = logging.getLogger(__name__)


@fresh_accelerate_state()
def sample(
    source: str | Path,
    num_images: int = 16,
    *,
    classes: Sequence[str] | None = None,
    cpu: bool = False,
    **settings: Any,
) -> np.ndarray:
    """Sample images 0..num_images-1 in this process.

    Args:
        source: a run, a checkpoint or a diffusers directory.
        num_images: how many.
        classes: class names or numbers, assigned to the images in turn; None draws them as often as in training.
        cpu: use the CPU even if there is a GPU.
        settings: weights ("ema" or "raw"), seed, and the keys sampler, num_inference_steps, guidance_scale and
            batch_size of the config's `sampling`; by default the run's own.

    Returns:
        uint8 (num_images, H, W, C), the images that `gnunet sample` writes.

    Raises:
        GnunetError: the model cannot be loaded, or a setting is invalid.
    """
    if num_images < 1:
        raise ConfigError(f"num_images: given {num_images}; valid: an integer of at least 1")
    model = load_model(source, **settings)
    accelerator = open_accelerator(model.mixed_precision, cpu=cpu)
    return np.concatenate([images for _, images in sample_batches(model, num_images, accelerator, classes)])


def sample_batches(
    model: TrainedModel, num_images: int, accelerator: Accelerator, classes: Sequence[str] | None = None
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Sample this rank's share of images 0..num_images-1: yields the indices of a batch, and uint8 (len, H, W, C)."""
    labels = None if not classes else class_labels(model, classes)
    model.network.to(accelerator.device)
    size = model.sampling.batch_size
    indices = indices_for_rank(range(num_images), size, accelerator.process_index, accelerator.num_processes)
    for first in range(0, len(indices), size):
        batch = indices[first : first + size]
        of_batch = None if labels is None else labels[np.array(batch) % len(labels)]
        yield batch, model.sample(batch, accelerator, labels=of_batch)


def class_labels(model: TrainedModel, classes: Sequence[str]) -> np.ndarray:
    """int64 labels of classes given by name or number. Raises ConfigError for classes that the model does not have."""
    if model.class_names is None:
        raise ConfigError(f"classes: given {' '.join(map(str, classes))}, but {model.name} is not class-conditional")
    names = model.class_names
    labels = []
    for name in map(str, classes):
        if name in names:
            labels.append(names.index(name))
        elif name.isascii() and name.isdecimal() and int(name) < len(names):
            labels.append(int(name))
        else:
            raise ConfigError(f"classes: given {name!r}; valid: {', '.join(names)}, or a number below {len(names)}")
    return np.array(labels, dtype=np.int64)


@fresh_accelerate_state()
def evaluate(source: str | Path, *, cpu: bool = False, **settings: Any) -> dict[str, float]:
    """Measure a model's samples, or a directory of images, against reference images, in this process.

    Args:
        source: a run, a checkpoint, a diffusers directory or a directory of images.
        cpu: use the CPU even if there is a GPU.
        settings: as for `gnunet.commands.measure.Evaluation`: metrics, num_images, reference, seed, ...

    Returns:
        The metrics by name, means over the repeats.

    Raises:
        GnunetError: an input is missing or invalid.
    """
    evaluation = Evaluation(source, **settings)
    record, _ = evaluation.run(open_accelerator(evaluation.mixed_precision, cpu=cpu))
    for note in record["notes"]:
        logger.warning(note)
    return {name: entry["mean"] for name, entry in record["metrics"].items()}
