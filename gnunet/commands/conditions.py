"""What a conditional model samples from: a folder of pictures, or the images of its own run."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from gnunet.checkpoint.trained_model import TrainedModel
from gnunet.data import SampleConditions
from gnunet.data.decode import decode_image, open_image, upright_size
from gnunet.errors import ConfigError, DataError, GnunetError, did_you_mean_path
from gnunet.evaluation.image_files import image_files
from gnunet.training.session import RunData, load_run_data

MASK = "_mask"


def with_conditions(model: TrainedModel, folder: str | Path | None) -> TrainedModel:
    """The model with the conditions in a folder, or by default those of the held-out images of its run.

    Pictures are taken in the order of their names, and prepared as in training; for low_resolution also those that are
    small already. Image NAME.png has its mask in NAME_mask.png, which is white where it is to be filled.

    Raises:
        ConfigError: a folder for a model without a condition, or none for one that does not know its run's images.
        DataError: no pictures, one that cannot be decoded, or a mask that is missing or of another size.
    """
    if model.condition is None:
        if folder is not None:
            raise ConfigError(f"--conditions: given {folder}, but {model.name} has no condition (data.condition)")
        return model
    if folder is not None:
        return replace(model, conditions=folder_conditions(model, Path(folder).expanduser()))
    if model.config is None:
        raise ConfigError(f"--conditions: needed, because {model.name} does not know the images of its run")
    try:
        data = load_training_data(model)
    except GnunetError as error:
        raise DataError(f"{error}; --conditions FOLDER gives others") from None
    return replace(model, conditions=data.sample_conditions(model.config))


def folder_conditions(model: TrainedModel, folder: Path) -> SampleConditions:
    """The conditions that the pictures in a folder are, or that are made of them."""
    condition = model.condition
    if condition.kind == "mask":
        return SampleConditions.of_arrays(read_masked(folder, model))
    height, width = model.size
    small = height // condition.factor, width // condition.factor
    stored = []
    for file in _pictures(folder):
        is_small = condition.kind == "low_resolution" and _size(file) == small
        picture = _decode(file, model, small if is_small else model.size, model.channels)
        stored.append(picture if is_small else condition.store(picture[None], ())[0])
    return SampleConditions.of_arrays(np.stack(stored))


def read_masked(folder: Path, model: TrainedModel) -> np.ndarray:
    """The images of a folder with their masks, as the condition `mask` stores them."""
    files = list(_pictures(folder))
    masks = {file.with_suffix("").as_posix().removesuffix(MASK): file for file in files if file.stem.endswith(MASK)}
    stored = []
    for file in [file for file in files if file not in masks.values()]:
        if (mask := masks.pop(file.with_suffix("").as_posix(), None)) is None:
            raise DataError(
                f"{file} has no mask; valid: {file.stem}{MASK}.png beside it, white where it is to be filled"
            )
        if (size := _size(file)) != (other := _size(mask)):
            text = "{1} x {0}".format
            raise DataError(f"{mask} is {text(*other)}, but {file} is {text(*size)}; valid: equal sizes")
        known = 255 * (_decode(mask, model, model.size, 1) < 128).astype(np.uint8)
        stored.append(np.concatenate([_decode(file, model, model.size, model.channels), known], axis=-1))
    if masks:
        raise DataError(f"{next(iter(masks.values()))} has no image; valid: a picture of its name without {MASK}")
    return np.stack(stored)


def load_training_data(model: TrainedModel, hint: str = "") -> RunData:
    """The data of a model's configuration; DataError, with `hint`, if it has other images than those trained on."""
    data = load_run_data(model.config)
    if data.table.fingerprint != model.fingerprint:
        raise DataError(f"{model.config.data.source}: not the images that {model.name} was trained on{hint}")
    return data


def _pictures(folder: Path) -> Iterator[Path]:
    files = image_files(folder) if folder.is_dir() else []
    if not files:
        raise DataError(f"{folder}: no folder of pictures{did_you_mean_path(folder)}")
    yield from files


def _size(file: Path) -> tuple[int, int]:
    try:
        with open_image(file) as image:
            return upright_size(image)
    except Exception as error:  # of any kind, as image decoders raise them
        raise DataError(f"{file} cannot be decoded: {error}") from None


def _decode(file: Path, model: TrainedModel, size: tuple[int, int], channels: int) -> np.ndarray:
    try:
        return decode_image(file, size, channels, model.config.data.resize if model.config else "crop")
    except Exception as error:
        raise DataError(f"{file} cannot be decoded: {error}") from None
