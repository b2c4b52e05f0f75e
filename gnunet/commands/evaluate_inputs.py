"""What an evaluation measures, against what, and by which metrics: checked before anything is computed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from gnunet.checkpoint.trained_model import TrainedModel, is_model_path, sanitize_config
from gnunet.commands.options import load_model
from gnunet.config import Config, EvaluateConfig
from gnunet.data import DecodedImages, load_images
from gnunet.data.sources.files import visible_files
from gnunet.data.sources.image_folder import IMAGE_SUFFIXES
from gnunet.errors import CheckpointError, ConfigError, DataError
from gnunet.evaluation import FeatureMetric, ImageFiles, check_reference, get_metrics, load_extractors
from gnunet.evaluation.distances import evenly_spaced
from gnunet.evaluation.extractors import EXTRACTORS
from gnunet.evaluation.features import CHUNK, Images
from gnunet.training.data import load_run_data
from gnunet.training.evaluation import sample_fn, sampling_metadata
from gnunet.training.progress import decode_progress

MAX_SIZES_CHECKED = 1000
"""Files of a reference directory whose size is checked."""


@dataclass(frozen=True)
class Subject:
    """The images to measure: a model's samples, or the files in a directory."""

    name: str
    resolution: int
    channels: int
    num_images: int
    """In each repeat."""
    images: Callable[[int, Accelerator], Images]
    """images(repeat, accelerator): the images of a repeat."""
    chunk: int
    """Images that are made together."""
    metadata: Mapping[str, Any]
    """What decides the images besides a model's weights."""
    model: TrainedModel | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.resolution, self.resolution, self.channels


@dataclass(frozen=True)
class ReferenceImages:
    """The images that a subject is compared with."""

    table: DecodedImages
    rows: np.ndarray
    name: str
    cache_dir: str | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """What identifies them, for the record."""
        resolution, _, channels = self.table.images.shape[1:]
        return {
            "source": self.name,
            "num_images": len(self.rows),
            "resolution": resolution,
            "channels": channels,
            "fingerprint": self.table.fingerprint,
        }


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything that an evaluation needs."""

    source: Path
    subject: Subject
    reference: ReferenceImages
    metrics: list[FeatureMetric]
    repeat: int
    nearest: int | None
    extractor_sources: Mapping[str, str]
    extractor_weights: Mapping[str, str]

    @property
    def mixed_precision(self) -> str:
        return self.subject.model.mixed_precision if self.subject.model else "no"


def open_inputs(
    source: str | Path,
    *,
    metrics: Sequence[str] | None = None,
    num_images: int | None = None,
    repeat: int = 1,
    reference: str | Path | None = None,
    split: str = "train",
    resolution: int | None = None,
    nearest: int | None = None,
    extractors: Mapping[str, str] | None = None,
    extractor_weights: Mapping[str, str] | None = None,
    **sampling: Any,
) -> EvaluationInputs:
    """Open and check the inputs of an evaluation.

    Args:
        source: a run, a checkpoint, a diffusers directory or a directory of images.
        metrics: names such as kid_dinov2; None takes the run's.
        num_images: None takes the run's number, or all images of a directory.
        repeat: number of measurements, of images with other seeds or of other files.
        reference: a run, or any `data.source`; None takes the images that the model trained on.
        split: split of the reference.
        resolution: resize and crop a directory's images to this size, in RGB.
        nearest: number of nearest reference images to find for each image.
        extractors: user-defined extractors by name (see `load_user_extractor`).
        extractor_weights: weights files by extractor.
        sampling: as for `load_model`.

    Raises:
        GnunetError: an input is missing, unknown, too small, or does not fit the others.
    """
    path = Path(source).expanduser()
    subject = open_subject(path, num_images, repeat, resolution, sampling)
    model = subject.model
    defaults = model.config.evaluate if model and model.config else EvaluateConfig()
    sources = {**defaults.extractors, **(extractors or {})}
    weights = {**defaults.weights, **(extractor_weights or {})}
    chosen = get_metrics(list(dict.fromkeys(metrics or defaults.metrics)), [*EXTRACTORS, *sources])
    load_extractors(chosen, sources=sources, weights=weights)  # raises if something is missing
    for metric in chosen:
        if subject.num_images < metric.min_images:
            valid = f"at least {metric.min_images}, which {metric.name} needs"
            raise ConfigError(f"--num_images: given {subject.num_images}; valid: {valid}")
    opened = open_reference(reference, split, subject, allow_enlarging=resolution is not None)
    check_reference(chosen, len(opened.rows))
    if nearest and nearest >= len(opened.rows):
        raise ConfigError(f"--nearest: given {nearest}; valid: below the {len(opened.rows)} reference images")
    return EvaluationInputs(path, subject, opened, chosen, repeat, nearest, sources, weights)


def open_subject(
    path: Path, num_images: int | None, repeat: int, resolution: int | None, sampling: Mapping[str, Any]
) -> Subject:
    """A model's samples, or the images in a directory."""
    if is_model_path(path):
        if resolution is not None:
            raise ConfigError("--resolution: only for a directory of images; a model samples at its own resolution")
        return _samples(load_model(path, **sampling), num_images, repeat)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; valid: a run, a checkpoint, a diffusers model or images")
    return _files(path, num_images, repeat, resolution)


def _samples(model: TrainedModel, num_images: int | None, repeat: int) -> Subject:
    defaults = model.config.evaluate if model.config else EvaluateConfig()
    metadata = sampling_metadata(model)
    seed = metadata.pop("seed")

    def images(number: int, accelerator: Accelerator) -> Images:
        model.network.to(accelerator.device)
        return sample_fn(replace(model, seed=seed + number), accelerator)

    return Subject(
        model.name, model.resolution, model.channels, num_images or defaults.num_images, images,
        model.sampling.batch_size, {**metadata, "seeds": [seed + number for number in range(repeat)]}, model,
    )  # fmt: skip


def _files(path: Path, num_images: int | None, repeat: int, resolution: int | None) -> Subject:
    """Images from all over the directory, none in two repeats."""
    files = ImageFiles(path, resolution)
    available = len(files) // repeat
    if (num_images or 1) > available:
        times = f" {repeat} times" if repeat > 1 else ""
        raise ConfigError(
            f"--num_images: given {num_images or 'none'}{times}, but {path} holds {len(files)} images; valid: at most "
            f"{available}"
        )
    count = num_images or available
    selected = evenly_spaced(len(files), repeat * count)

    def images(number: int, accelerator: Accelerator) -> Images:
        return lambda indices: files.read(selected[number::repeat][indices.start : indices.stop])

    return Subject(path.resolve().name, files.resolution, files.channels, count, images, CHUNK, {})


def open_reference(given: str | Path | None, split: str, subject: Subject, *, allow_enlarging: bool) -> ReferenceImages:
    """The reference images, prepared like training images at the subject's resolution and channels.

    Args:
        given: a run or a checkpoint (possibly untrusted), for the images that it trained on; or a `data.source`; None
            for the images that the subject's own model trained on.
        split: of a `data.source`.
        subject: what will be compared with them.
        allow_enlarging: whether smaller images may be enlarged to the subject's resolution.

    Raises:
        ConfigError: none given for a subject that has no training images.
        DataError: other images than the model's, or too small.
        CheckpointError: the given run's configuration cannot be read.
    """
    if given is None:
        model = subject.model
        if model is None or model.config is None:
            raise ConfigError(
                f"--reference: needed, because {subject.name} does not know its training images; valid: a run, or "
                "images in any form that data.source accepts"
            )
        reference = _training_images(model.config, model.name)
        if reference.table.fingerprint != model.fingerprint:
            raise DataError(
                f"{model.config.data.source}: not the images that {model.name} was trained on; give others with "
                "--reference"
            )
        return reference
    path = Path(given).expanduser()
    if (path / "config.yaml").is_file():
        reference = _training_images(sanitize_config(path / "config.yaml"), str(given))
        if (shape := reference.table.images.shape[1:]) != subject.shape:
            raise DataError(
                f"{given} trains on {_describe(*shape)}, but {subject.name} has {_describe(*subject.shape)}; valid: "
                "equal ones"
            )
        return reference
    if path.is_dir() and not allow_enlarging:
        _check_sizes(path, subject)
    table = load_images(
        str(given), split=split, resolution=subject.resolution, channels=subject.channels, progress=decode_progress()
    )
    return ReferenceImages(table, np.arange(len(table)), str(given))


def _training_images(config: Config, name: str) -> ReferenceImages:
    data = load_run_data(config)
    return ReferenceImages(data.table, data.train_rows, f"training images of {name}", config.data.cache_dir)


def _describe(height: int, width: int, channels: int) -> str:
    return f"{'grey' if channels == 1 else 'RGB'} images of {width} x {height}"


def _check_sizes(folder: Path, subject: Subject) -> None:
    """Reject reference images that would have to be enlarged, which changes distances."""
    files = [file for file in visible_files(folder) if file.suffix.lower() in IMAGE_SUFFIXES]
    for file in (files[i] for i in evenly_spaced(len(files), MAX_SIZES_CHECKED)):
        try:
            with Image.open(file) as image:
                width, height = image.size
        except OSError:
            continue  # the decoder has the better message
        if min(width, height) < subject.resolution:
            raise DataError(
                f"{file} is {width} x {height}, smaller than the {subject.resolution} x {subject.resolution} of "
                f"{subject.name}; valid: images at least as large, or --resolution to resize both"
            )
