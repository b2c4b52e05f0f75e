"""What a conditional model samples from: a folder of pictures, or the images of its own run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gnunet.checkpoint.trained_model import TrainedModel
from gnunet.commands.options import check_integer
from gnunet.data import Condition, SampleConditions
from gnunet.data.decode import decode_image, open_image, upright_size
from gnunet.errors import ConfigError, DataError, GnunetError, did_you_mean_path
from gnunet.evaluation.image_files import GRID, decoding, image_files
from gnunet.training.session import RunData, load_run_data

MASK = "_mask"
"""At the end of the name of an image's mask."""
JUMPS = {"jump_length": 10, "resample": 10}
"""RePaint's settings in the paper."""


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
        stored = read_conditions(folder, model.condition, model)
        return replace(model, conditions=SampleConditions.of_arrays(model.condition, stored))
    if model.config is None:
        raise ConfigError(f"--conditions: needed, because {model.name} does not know the images of its run")
    try:
        data = load_training_data(model)
    except GnunetError as error:
        raise DataError(f"{error}; --conditions FOLDER gives others") from None
    return replace(model, conditions=data.sample_conditions(model.config))


def with_inpainting(
    model: TrainedModel, folder: str | Path | None, *, sampler: str | None = None, **jumps: int | None
) -> TrainedModel:
    """The model set to fill what is masked in the pictures in a folder, which are as those for the condition `mask`.

    Raises:
        ConfigError: a setting without a folder, or a sampler with one, since RePaint is the sampler.
        DataError: as by `with_conditions`.
    """
    given = {name: check_integer(name, value) for name, value in jumps.items() if value is not None}
    if folder is None:
        if given:
            raise ConfigError(f"--{next(iter(given))}: given without --inpaint, which it is a setting of")
        return model
    if sampler is not None:
        raise ConfigError(f"--sampler: given {sampler} with --inpaint, which samples by RePaint; valid: none")
    if model.autoencoder is not None:
        raise ConfigError(f"--inpaint: given {folder}; valid: none with latents, of which masks leave out no pixels")
    condition = Condition("mask", model.channels + 1)
    stored = read_conditions(folder, condition, model)
    return replace(model, inpaint=SampleConditions.of_arrays(condition, stored), jumps={**JUMPS, **given})


def read_conditions(folder: str | Path, condition: Condition, model: TrainedModel) -> np.ndarray:
    """The stored conditions (n, h, w, c) that the pictures in a folder are, or that are made of them."""
    folder = Path(folder).expanduser()
    files = [file for file in image_files(folder) if file.name != GRID] if folder.is_dir() else []
    if not files:
        raise DataError(f"{folder}: no folder of pictures{did_you_mean_path(folder)}")
    if condition.kind == "mask":
        return _read_masked(files, model)
    height, width = model.size
    small = height // condition.factor, width // condition.factor
    stored = []
    for file in files:
        is_small = condition.kind == "low_resolution" and _size(file) == small
        is_stored = is_small or condition.kind == "paired"
        channels = condition.channels if condition.kind == "paired" else model.channels
        picture = _decode(file, model, small if is_small else model.size, channels, condition.num_classes)
        stored.append(picture if is_stored else condition.store(picture[None])[0])
    return np.stack(stored)


def _read_masked(files: Sequence[Path], model: TrainedModel) -> np.ndarray:
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
    data = load_run_data(model.config, model.autoencoder)
    if data.table.fingerprint != model.fingerprint:
        raise DataError(f"{model.config.data.source}: not the images that {model.name} was trained on{hint}")
    return data


def _size(file: Path) -> tuple[int, int]:
    with decoding(file), open_image(file) as image:
        return upright_size(image)


def _decode(
    file: Path, model: TrainedModel, size: tuple[int, int], channels: int, classes: int | None = None
) -> np.ndarray:
    if not model.scaling.is_pictures:
        raise ConfigError(f"{file}: given, but {model.name} samples arrays; valid: what its own run conditions on")
    resize = model.config.data.resize if model.config else "crop"
    with decoding(file):
        return decode_image(file, size, channels, resize, num_classes=classes)
