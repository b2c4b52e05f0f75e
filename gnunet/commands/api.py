"""The Python interface next to the command line: `gnunet.sample` and `gnunet.evaluate`."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from gnunet.checkpoint.trained_model import TrainedModel
from gnunet.commands.conditions import open_model
from gnunet.commands.measure import Evaluation
from gnunet.commands.options import check_integer
from gnunet.distributed.accelerator import fresh_accelerate_state, open_accelerator
from gnunet.errors import ConfigError, as_data_error, did_you_mean, quoted, truncate

logger = logging.getLogger(__name__)


@fresh_accelerate_state()
def sample(
    source: str | Path, num_images: int = 16, *, start: int = 0, num_estimates: int | None = None,
    classes: Sequence[str] | None = None, labels: "Sequence[float] | np.ndarray | None" = None, cpu: bool = False,
    **settings: Any,
) -> np.ndarray:  # fmt: skip
    """Sample images start..start+num_images-1 in this process.

    Args:
        source: a run, a checkpoint, a diffusers directory, or OWNER/NAME of a model on the Hugging Face hub.
        num_images: how many.
        start: the first image.
        num_estimates: return, too, what the network estimates the images to be at so many of the steps.
        classes: class names or numbers, assigned to the images in turn; None draws them as often as in training.
        labels: numbers (n,) or vectors (n, D) in place of classes, for a model with `model.class_embed_type`.
        cpu: use the CPU even if there is a GPU.
        settings: weights ("ema" or "raw"), seed, and the keys sampler, num_inference_steps, guidance_scale,
            guidance_interval and batch_size of the config's `sampling`, by default the run's own; resolution (H or
            [H, W]), guide, conditions, inpaint, jump_length and resample as the options of `gnunet sample`.

    Returns:
        The images that `gnunet sample` writes, (num_images, H, W, C), uint8 or of the data's dtype; with num_estimates,
        (num_images, n, H, W, C), of which the last are the images, and n is lower if there are fewer steps.

    Raises:
        GnunetError: the model cannot be loaded, or a setting is invalid.
    """
    indices = range(start := check_integer("start", start), start + check_integer("num_images", num_images))
    if num_estimates is not None:
        check_integer("num_estimates", num_estimates)
    model = open_model(source, **settings)
    model = replace(model, given_labels=given_labels(model, classes, labels), num_estimates=num_estimates)
    accelerator = open_accelerator(model.mixed_precision, cpu=cpu)
    return np.concatenate([images for _, images in sample_batches(model, indices, accelerator)])


def sample_batches(
    model: TrainedModel, indices: Sequence[int], accelerator: Accelerator
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Sample this rank's share of images: yields the indices of a batch, and its images (len, H, W, C).

    `indices` are ascending. Batches are distributed round-robin across ranks.
    """
    model.network.to(accelerator.device)
    batches = groupby(indices, lambda index: index // model.sampling.batch_size)
    for _, group in islice(batches, accelerator.process_index, None, accelerator.num_processes):
        batch = list(group)
        yield batch, model.sample(batch, accelerator)


def given_labels(model: TrainedModel, classes: Sequence[str] | None, labels: Any) -> np.ndarray | None:
    """The labels that are asked for, if any, as `TrainedModel.given_labels`; `labels` may name a .npy file. Raises
    ConfigError for those that the model does not know."""
    if labels is not None and model.float_labels is None:
        known = "classes" if model.class_counts else "no labels"
        raise ConfigError(
            f"--labels: given {truncate(labels)}, but {model.name} has {known} (model.class_embed_type null)"
        )
    if labels is None or classes is not None:
        return class_labels(model, classes)
    if isinstance(labels, Sequence) and len(labels) == 1 and str(labels[0]).endswith(".npy"):
        with as_data_error(labels[0]):
            labels = np.load(labels[0], allow_pickle=False)
    return model.float_labels.check(labels)


def class_labels(model: TrainedModel, classes: Sequence[str] | None) -> np.ndarray | None:
    """int64 labels of classes given by name or number. Raises ConfigError for those that the model does not know."""
    if classes is None:
        return None
    if isinstance(classes, str) or not len(classes):
        raise ConfigError(f"classes: given {classes!r}; valid: a list of names or numbers of classes")
    if model.class_names is None or model.class_counts is None:
        hint = "; it has labels that are numbers: --labels" if model.float_labels else ""
        given = " ".join(map(str, classes))
        raise ConfigError(f"classes: given {given}, but {model.name} is not class-conditional{hint}")
    names = model.class_names
    trained = [name for name, count in zip(names, model.class_counts, strict=True) if count]
    labels = []
    for name in map(str, classes):
        if name in names:
            label = names.index(name)
        elif name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < len(names):
            label = int(name)
        else:
            valid = f"{quoted(trained)}, or a number below {len(names)}"
            raise ConfigError(f"classes: given {truncate(name)!r}{did_you_mean(name, trained)}; valid: {valid}")
        if not model.class_counts[label]:
            given = f"{truncate(name)!r}, of which {model.name} saw no training image"
            raise ConfigError(f"classes: given {given}; valid: {quoted(trained)}")
        labels.append(label)
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
