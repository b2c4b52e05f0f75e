"""The model that a command names, and what it samples from: a folder of pictures, or the images of its own run."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gnunet.checkpoint.trained_model import WEIGHTS, TrainedModel, load_trained_model
from gnunet.commands.options import check_integer
from gnunet.config import SamplingConfig
from gnunet.config.merge import ConfigSource, merge_and_validate
from gnunet.data import Condition, SampleConditions
from gnunet.data.decode import decode_array, decode_image, read_size, read_values
from gnunet.errors import ConfigError, DataError, GnunetError, as_data_error, did_you_mean_path, expand
from gnunet.evaluation.image_files import GRID, image_files
from gnunet.models.pretrained import find_model
from gnunet.training.session import RunData, load_run_data

MASK = "_mask"  # at the end of the name of an image's mask
JUMPS = {"jump_length": 10, "resample": 10}  # RePaint's settings in the paper


def load_model(
    source: str | Path, *, weights: str = "ema", seed: int | None = None, sampler: str | None = None,
    num_inference_steps: int | None = None, guidance_scale: float | None = None, batch_size: int | None = None,
) -> TrainedModel:  # fmt: skip
    """Load a run, a checkpoint or a diffusers model with settings as in the config's `sampling`; None: the run's own.

    Raises:
        CheckpointError: there is no model at `source`, or it is corrupted.
        ConfigError: a setting is not valid.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights: given {weights}; valid: {' or '.join(WEIGHTS)}")
    model = load_trained_model(find_model(Path(source).as_posix()), weights)
    if not expand(source).exists():  # on the hub: in place of the name of its folder, a hash
        model = replace(model, name="-".join(Path(source).parts))
    seed = model.seed if seed is None else check_integer("seed", seed)
    settings = {
        "sampler": sampler, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
        "batch_size": batch_size,
    }  # fmt: skip
    given = {key: value for key, value in settings.items() if value is not None}
    sources = [ConfigSource(model.name, model.sampling.model_dump()), ConfigSource("given", given)]
    sampling = merge_and_validate(SamplingConfig, sources)
    return replace(model, sampling=sampling, seed=seed)


def with_conditions(model: TrainedModel, folder: str | Path | None) -> TrainedModel:
    """The model with the conditions in a folder, or by default those of the held-out images of its run.

    Pictures, or arrays like the data, are taken in the order of their names, and prepared as in training; for
    low_resolution also those that are small already. Image NAME.png has its mask in NAME_mask.png, which is white where
    it is to be filled.

    Raises:
        ConfigError: a folder for a model without a condition, or none for one that does not know its run's images.
        DataError: no pictures, one that cannot be decoded, or a mask that is missing or of another size.
    """
    if model.condition is None:
        if folder is not None:
            raise ConfigError(f"--conditions: given {folder}, but {model.name} has no condition (data.condition)")
        return model
    if folder is not None:
        return replace(model, conditions=read_conditions(folder, model.condition, model))
    if model.config is None:
        raise ConfigError(f"--conditions: needed, because {model.name} does not know the images of its run")
    try:
        data = load_training_data(model)
    except GnunetError as error:
        raise DataError(f"{error}; --conditions FOLDER gives others") from None
    return replace(model, conditions=data.sample_conditions(model.config))


def open_model(
    source: str | Path, *, conditions: str | Path | None = None, inpaint: str | Path | None = None,
    jump_length: int | None = None, resample: int | None = None, **settings: Any,
) -> TrainedModel:  # fmt: skip
    """`load_model` with what to sample from: `with_conditions`, or the masked pictures in the folder `inpaint`, which
    are as those for the condition `mask`.

    Raises:
        ConfigError: also for a setting of RePaint without a folder, or a sampler with one, since it is the sampler.
        DataError: as by `with_conditions`.
    """
    model = with_conditions(load_model(source, **settings), conditions)
    options = {"jump_length": jump_length, "resample": resample}
    given = {name: check_integer(name, value) for name, value in options.items() if value is not None}
    if inpaint is None:
        if given:
            raise ConfigError(f"--{next(iter(given))}: given without --inpaint, which it is a setting of")
        return model
    if (sampler := settings.get("sampler")) is not None:
        raise ConfigError(f"--sampler: given {sampler} with --inpaint, which samples by RePaint; valid: none")
    if model.autoencoder is not None:
        raise ConfigError(f"--inpaint: given {inpaint}; valid: none with latents, of which masks leave out no pixels")
    jumps, steps = {**JUMPS, **given}, model.sampling.num_inference_steps
    if jumps["resample"] > 1 and jumps["jump_length"] >= steps:
        valid = f"below sampling.num_inference_steps {steps}, or any with --resample 1"
        raise ConfigError(f"--jump_length: {jumps['jump_length']}, with which nothing is resampled; valid: {valid}")
    masked = read_conditions(inpaint, Condition("mask", model.channels + 1), model)
    return replace(model, inpaint=masked, jumps=jumps)


def read_conditions(folder: str | Path, condition: Condition, model: TrainedModel) -> SampleConditions:
    """The conditions that the pictures in a folder are, or that are made of them."""
    folder = expand(folder)
    files = image_files(folder, model.scaling) if folder.is_dir() else []
    files = [file for file in files if file.name != GRID]
    if not files:
        raise DataError(f"{folder}: no folder of pictures{did_you_mean_path(folder)}")
    resize = model.config.data.resize if model.config else "crop"
    small = tuple(side // condition.factor for side in model.size)

    def read(file: Path) -> np.ndarray:
        with as_data_error(file):
            if condition.kind == "paired":
                return decode_image(file, model.size, condition.channels, resize, num_classes=condition.num_classes)
            if condition.kind == "low_resolution" and _size(file, model) == small:
                return _decode(file, small, model, resize)
            return condition.store(_decode(file, model.size, model, resize)[None])[0]

    if condition.kind == "mask":
        stored = [_read_masked(*pair, model, resize) for pair in _with_masks(files)]
    else:
        stored = [read(file) for file in files]
    return SampleConditions.of_arrays(condition, np.stack(stored))


def _with_masks(files: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    masks = {file.with_suffix("").as_posix().removesuffix(MASK): file for file in files if file.stem.endswith(MASK)}
    for file in [file for file in files if file not in masks.values()]:
        if (mask := masks.pop(file.with_suffix("").as_posix(), None)) is None:
            raise DataError(f"{file} has no mask; valid: {file.stem}{MASK}.png beside it, white where to fill it")
        yield file, mask
    if masks:
        raise DataError(f"{next(iter(masks.values()))} has no image; valid: a picture of its name without {MASK}")


def _read_masked(file: Path, mask: Path, model: TrainedModel, resize: str) -> np.ndarray:
    with as_data_error(f"{file} with {mask.name}"):
        (height, width), (high, wide) = _size(file, model), read_size(mask)
        if height * wide != width * high:
            raise ValueError(f"{width} x {height}, but its mask has {wide} x {high}; valid: equal shapes")
        image = _decode(file, model.size, model, resize)
        to_fill = decode_image(mask, model.size, 1, resize, padding="black") >= 128  # what is padded is known
    return np.concatenate([image, np.where(to_fill, 0, 255).astype(np.uint8)], axis=-1)


def load_training_data(model: TrainedModel, hint: str = "") -> RunData:
    """The data of a model's configuration; DataError, with `hint`, if it has other images than those trained on."""
    data = load_run_data(model.config, model.autoencoder)
    if data.table.fingerprint != model.fingerprint:
        raise DataError(f"{model.config.data.source}: not the images that {model.name} was trained on{hint}")
    return data


def _size(file: Path, model: TrainedModel) -> tuple[int, ...]:
    return read_size(file) if model.scaling.is_pictures else read_values(file, model.channels)[0].shape[:2]


def _decode(file: Path, size: tuple[int, int], model: TrainedModel, resize: str) -> np.ndarray:
    if model.scaling.is_pictures:
        return decode_image(file, size, model.channels, resize)
    return decode_array(file, size, model.channels, resize)[0]
