"""The model that a command names, and what it samples from: a folder of pictures, or the images of its own run."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gnunet.checkpoint.trained_model import WEIGHTS, TrainedModel, load_trained_model
from gnunet.commands.options import check_integer
from gnunet.config import SamplingConfig
from gnunet.config.checks import nearest_multiples
from gnunet.config.merge import ConfigSource, merge_and_validate
from gnunet.data import Condition, SampleConditions
from gnunet.data.decode import decode_array, decode_image, read_size, read_values
from gnunet.errors import ConfigError, DataError, GnunetError, as_data_error, did_you_mean_path, expand, first_few
from gnunet.evaluation.image_files import image_files
from gnunet.models.pretrained import find_model
from gnunet.scaling import as_size
from gnunet.training.session import RunData, load_run_data

MASK = "_mask"  # at the end of the name of an image's mask
JUMPS = {"jump_length": 10, "resample": 10}  # RePaint's settings in the paper


def load_model(source: str | Path, *, weights: str = "ema", seed: int | None = None, **settings: Any) -> TrainedModel:
    """Load a run, a checkpoint or a diffusers model with settings as in the config's `sampling`; None: the run's own.

    Raises:
        CheckpointError: there is no model at `source`, or it is corrupted.
        ConfigError: a setting is not valid.
        TypeError: there is no such setting.
    """
    if unknown := settings.keys() - SamplingConfig.model_fields.keys():
        raise TypeError(f"no setting of sampling: {', '.join(sorted(unknown))}")
    if weights not in WEIGHTS:
        raise ConfigError(f"weights: given {weights}; valid: {' or '.join(WEIGHTS)}")
    model = load_trained_model(find_model(Path(source).as_posix()), weights)
    if not expand(source).exists():  # on the hub: in place of the name of its folder, a hash
        model = replace(model, name="-".join(Path(source).parts))
    seed = model.seed if seed is None else check_integer("seed", seed)
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
    if model.config is None or model.config.data.size != model.size:
        size = "{} x {}".format(*model.size)
        raise ConfigError(f"--conditions: needed, because {model.name} does not know the images of its run at {size}")
    try:
        data = load_training_data(model)
    except GnunetError as error:
        raise DataError(f"{error}; --conditions FOLDER gives others") from None
    return replace(model, conditions=data.sample_conditions(model.config))


def open_model(
    source: str | Path, *, resolution: int | Sequence[int] | None = None, guide: str | Path | None = None,
    conditions: str | Path | None = None, inpaint: str | Path | None = None,
    jump_length: int | None = None, resample: int | None = None, **settings: Any,
) -> TrainedModel:  # fmt: skip
    """`load_model` with what to sample from: `with_conditions`, or the masked pictures in the folder `inpaint`, which
    are as those for the condition `mask`; and with a `resolution` (H or [H, W]) other than that of training, and the
    model at `guide` for autoguidance.

    Raises:
        ConfigError: also for a setting of RePaint without a folder, or a sampler with one, since it is the sampler; a
            resolution that the network cannot have; a guide that does not fit, or is not used.
        DataError: as by `with_conditions`.
    """
    model = load_model(source, **settings)
    if guide is not None:
        model = replace(model, guide=load_guide(model, guide))
    if resolution is not None:
        model = replace(model, size=check_resolution(model, resolution))
    model = with_conditions(model, conditions)
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


def load_guide(model: TrainedModel, source: str | Path) -> TrainedModel:
    """The model at `source`, to guide another, whose process, data and labels it must share; else ConfigError."""
    if model.sampling.guidance_scale == 1:
        raise ConfigError("--guidance_scale: given 1 with --guide, which it turns off; valid: another, such as 2")
    guide = load_model(source)
    ours, theirs = _shared_with_guide(model), _shared_with_guide(guide)
    if differ := [f"{key} {theirs.get(key)}, not {ours[key]}" for key in ours if theirs.get(key) != ours[key]]:
        raise ConfigError(f"--guide: {guide.name} has {first_few(differ)}; valid: a model of the same process and data")
    return guide


def _shared_with_guide(model: TrainedModel) -> dict[str, Any]:
    network, schedule = model.network.config, model.process.export_scheduler().config
    return {
        "diffusion.kind": model.process.kind, **{key: schedule[key] for key in schedule if key[0] != "_"},
        "channels": network.out_channels, "resolution": as_size(network.sample_size), "classes": model.class_names,
        "labels": model.float_labels and model.float_labels.values, "scaling": model.scaling,
        "condition": model.condition and replace(model.condition, can_drop=False),
        "autoencoder": model.autoencoder and model.autoencoder.digest,
    }  # fmt: skip


def check_resolution(model: TrainedModel, resolution: int | Sequence[int]) -> tuple[int, int]:
    """A height and width to sample at, of H or [H, W]; ConfigError if the network cannot have it."""
    sides = [check_integer("resolution", side) for side in np.array(resolution, object).ravel()]
    factor = 2 ** (len(model.network.down_blocks) - 1) * (model.autoencoder.reduction if model.autoencoder else 1)
    factor = math.lcm(factor, model.condition.factor if model.condition else 1)
    if len(sides) not in (1, 2) or any(side % factor for side in sides):
        nearest = " and ".join(nearest_multiples(side, factor) for side in sides if side % factor)
        valid = f"HEIGHT or HEIGHT WIDTH, multiples of {factor}" + (f", for instance {nearest}" if nearest else "")
        raise ConfigError(f"--resolution: given {' '.join(map(str, sides))}; valid: {valid}")
    return sides[0], sides[-1]


def read_conditions(folder: str | Path, condition: Condition, model: TrainedModel) -> SampleConditions:
    """The conditions that the pictures in a folder are, or that are made of them."""
    folder = expand(folder)
    files = image_files(folder, model.scaling) if folder.is_dir() else []
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
