"""What an evaluation measures, and against which reference images."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator

from gnunet.checkpoint.run_dir import find_autoencoder
from gnunet.checkpoint.trained_model import TrainedModel, is_model_path, sanitize_config
from gnunet.commands.conditions import load_training_data, open_model
from gnunet.commands.sample_folder import check_complete, read_record
from gnunet.config import Config, EvaluateConfig
from gnunet.data import DecodedImages, load_images
from gnunet.data.decode import read_size
from gnunet.data.sources import ImageFolder, open_source
from gnunet.errors import CheckpointError, ConfigError, DataError, did_you_mean_path, expand
from gnunet.evaluation import ImageFiles
from gnunet.evaluation.distances import evenly_spaced
from gnunet.evaluation.features import CHUNK, Images
from gnunet.scaling import PICTURES, Scaling
from gnunet.training.evaluation import sample_fn
from gnunet.training.progress import decode_progress
from gnunet.training.session import RunData, load_run_data

MAX_SIZES_CHECKED = 1000  # files of a reference directory whose size is checked


@dataclass(frozen=True)
class Subject:
    """The images to measure: a model's samples, or the files in a directory."""

    name: str
    size: tuple[int, int]  # height and width
    channels: int
    num_images: int  # in each repeat
    images: Callable[[int, Accelerator], Images]  # images(repeat, accelerator): the images of a repeat
    chunk: int  # images that are made together
    metadata: Mapping[str, Any]  # what decides the images besides a model's weights
    model: TrainedModel | None = None
    scaling: Scaling = PICTURES  # by which the images, and what they are compared with, become pictures

    def __post_init__(self) -> None:
        if not self.scaling.is_pictures and self.channels not in (1, 3):
            given = f"{self.name} has arrays of {self.channels} channels"
            raise ConfigError(f"{given}, and metrics see pictures of 1 or 3; valid: --validation_loss")


class ReferenceImages(NamedTuple):
    """The images that a subject is compared with: rows of a table."""

    table: DecodedImages
    rows: np.ndarray
    name: str
    cache_dir: str | None = None


def open_subject(
    path: Path, num_images: int | None, repeat: int, resolution: int | None, sampling: Mapping[str, Any]
) -> Subject:
    """A model's samples, or the images in a directory."""
    if is_model_path(path) or not path.exists():  # on the hub
        if resolution is not None:
            raise ConfigError("--resolution: only for a directory of images; a model samples at its own resolution")
        return _samples(open_model(path, **sampling), num_images, repeat)
    if not path.is_dir():
        valid = "a run, a checkpoint, a diffusers model or images"
        raise CheckpointError(f"{path}: no such directory{did_you_mean_path(path)}; valid: {valid}")
    if given := [name for name, value in sampling.items() if value is not None and (name, value) != ("weights", "ema")]:
        raise ConfigError(f"--{given[0]}: only for a model; {path} is a directory of images")
    return _files(path, num_images, repeat, resolution)


def _samples(model: TrainedModel, num_images: int | None, repeat: int) -> Subject:
    defaults = model.config.evaluate if model.config else EvaluateConfig()
    metadata = {"checkpoint": model.digest(), **model.sampling_metadata()}
    seed = metadata.pop("seed")

    def images(number: int, accelerator: Accelerator) -> Images:
        model.network.to(accelerator.device)
        return sample_fn(replace(model, seed=seed + number), accelerator)

    return Subject(
        model.name, model.size, model.channels, num_images or defaults.num_images, images,
        model.sampling.batch_size, {**metadata, "seeds": [seed + number for number in range(repeat)]}, model,
        model.scaling,
    )  # fmt: skip


def _files(path: Path, num_images: int | None, repeat: int, resolution: int | None) -> Subject:
    """Images evenly spaced over the directory; no two repeats have one in common."""
    metadata, scaling, channels = {}, PICTURES, 3
    if (record := read_record(path)) is not None:
        scaling, channels = record.settings.scaling, record.settings.channels
        check_complete(record, path)
        metadata = {**asdict(record.settings), "seeds": [record.settings.seed]}
        unset = [name for name in ("guidance_interval", "guide") if metadata[name] is None]
        for name in ("resolution", "channels", "seed", "scaling", *unset):
            del metadata[name]
    files = ImageFiles(path, resolution, scaling, channels)
    available = len(files) // repeat
    if (num_images or 1) > available:
        times = f" {repeat} times" if repeat > 1 else ""
        given = f"{num_images or 'none'}{times}, but {path} holds {len(files)} images"
        raise ConfigError(f"--num_images: given {given}; valid: at most {available}")
    count = num_images or available
    selected = evenly_spaced(len(files), repeat * count)

    def images(number: int, accelerator: Accelerator) -> Images:
        return lambda indices: files.read(selected[number::repeat][indices.start : indices.stop])

    return Subject(path.resolve().name, files.size, files.channels, count, images, CHUNK, metadata, scaling=scaling)


def open_reference(
    given: str | Path | None, split: str | None, subject: Subject, *, allow_enlarging: bool
) -> ReferenceImages:
    """The reference images, prepared like training images at the subject's resolution and channels.

    They are the images that a run or a checkpoint `given`, possibly untrusted, trained on; or a `data.source`, of which
    `split` is used, by default "train"; or, with None, those of the subject's own model. Files of a folder may be
    smaller than the subject's images only with `allow_enlarging`.
    """
    path = expand(given or "")
    is_run = given is not None and (path / "config.yaml").is_file()
    if split is not None and (given is None or is_run):
        raise ConfigError(f"--split: given {split}; valid: with a --reference that is a data.source, not a run")
    if given is None:
        model = subject.model
        if model is None or model.config is None:
            valid = "a run, or images in any form that data.source accepts"
            raise ConfigError(f"--reference: needed, as {subject.name} does not know its own; valid: {valid}")
        return _training_images(
            model.config, load_training_data(model, "; give others with --reference"), model.name, model.scaling
        )
    if is_run:
        config = sanitize_config(path / "config.yaml")
        data = load_run_data(config, find_autoencoder(config, path))
        reference = _training_images(config, data, str(given), subject.scaling)
        shape, expected = reference.table.images.shape[1:], (*subject.size, subject.channels)
        if shape != expected:
            sizes = f"{given} trains on images of shape {shape}, but {subject.name} has {expected}"
            raise DataError(f"{sizes}; valid: equal shapes (height, width, channels)")
        return reference
    if path.is_dir() and not allow_enlarging:
        _check_sizes(path, split or "train", subject)
    resize = subject.model.config.data.resize if subject.model and subject.model.config else "crop"
    table = load_images(
        str(given), split=split or "train", resolution=subject.size, channels=subject.channels, resize=resize,
        progress=decode_progress(), normalization="pixels" if subject.scaling.is_pictures else "range",
    )  # fmt: skip
    return ReferenceImages(replace(table, scaling=subject.scaling), np.arange(len(table)), str(given))


def _training_images(config: Config, data: RunData, name: str, scaling: Scaling) -> ReferenceImages:
    if data.table.scaling.is_pictures != scaling.is_pictures:
        valid = "arrays for arrays, pictures for pictures"
        raise DataError(f"{name}: data.normalization {config.data.normalization}; valid: {valid}")
    table = replace(data.table, scaling=scaling)
    return ReferenceImages(table, data.train_rows, f"training images of {name}", config.data.cache_dir)


def _check_sizes(folder: Path, split: str, subject: Subject) -> None:
    """Reject reference images that would have to be enlarged, which changes distances."""
    source = open_source(str(folder), split)
    files = source.files if isinstance(source, ImageFolder) else []
    for file in (files[i] for i in evenly_spaced(len(files), MAX_SIZES_CHECKED)):
        try:
            height, width = read_size(file)
        except (OSError, ValueError):
            continue  # the decoder has the better message
        if height < subject.size[0] or width < subject.size[1]:
            given = f"{width} x {height}, smaller than the {subject.size[1]} x {subject.size[0]} of {subject.name}"
            raise DataError(f"{file} is {given}; valid: images at least as large, or --resolution to resize both")
