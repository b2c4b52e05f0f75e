"""Load a trained model to sample from or evaluate: a run's directory, one checkpoint, or a diffusers folder."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor

from gnunet.checkpoint.checkpoint import (
    BEST,
    best_checkpoint,
    newest_checkpoint,
    open_tensors,
    read_state,
    verify_checkpoint,
)
from gnunet.checkpoint.run_dir import find_autoencoder
from gnunet.config import Config, SamplingConfig, from_yaml, label_shape, make_condition, process_kwargs, unet_kwargs
from gnunet.data import Condition, FloatLabels, SampleConditions
from gnunet.diffusion import ImageSampler, Process, make_process, sample_labels
from gnunet.diffusion.factory import load_process
from gnunet.errors import CheckpointError, ConfigError, did_you_mean_path, truncate
from gnunet.models import UNet2D
from gnunet.models.autoencoder import Autoencoder, load_autoencoder
from gnunet.models.pretrained import check_weights_match, weights_digest
from gnunet.safe_io import MAX_YAML_BYTES, check_fits_memory, read_json, read_text
from gnunet.scaling import PICTURES, Scaling, as_colours, as_size, to_uint8

logger = logging.getLogger(__name__)

WEIGHTS = {"ema": "ema", "raw": "model"}
"""Kinds of weights, and their files in a checkpoint: the EMA weights, and those being trained."""
VALID_SOURCES = (
    "a run's directory (with checkpoints/), a checkpoint (with manifest.json), or a diffusers folder (with unet/ and "
    "scheduler/)"
)


@dataclass
class TrainedModel:
    """A network and what sampling from it needs."""

    network: UNet2D  # fp32, in eval mode
    process: Process
    size: tuple[int, int]  # height and width of images, as channels
    channels: int
    sampling: SamplingConfig  # the run's sampling settings; the defaults for a diffusers folder
    seed: int
    mixed_precision: str
    name: str  # the run's name and its images seen, or the folder's name
    class_names: list[str] | None
    class_counts: list[int] | None  # number of training images per class; None if the network is not class-conditional
    config: Config | None = None  # the run's configuration, after `sanitize_config`; None for a diffusers folder
    fingerprint: str | None = None  # fingerprint of the training images; None for a diffusers folder
    condition: Condition | None = None  # what is concatenated to the network's input, if anything
    autoencoder: Autoencoder | None = None  # whose latents the network sees, if any
    conditions: SampleConditions | None = None  # what to sample from if there is a condition
    inpaint: SampleConditions | None = None  # images with masks, as of the condition `mask`, for RePaint
    jumps: Mapping[str, int] = field(default_factory=dict)  # jump_length and resample of RePaint
    float_labels: FloatLabels | None = None  # of labels that are numbers or vectors, in place of classes
    scaling: Scaling = PICTURES  # between the values of the training images and the network's
    given_labels: np.ndarray | None = None  # that images take in turn, in place of those drawn as in training
    guide: "TrainedModel | None" = None  # of autoguidance, from `load_guide`
    num_estimates: int | None = None  # as ImageSampler's

    @classmethod
    def of_run(
        cls, network: UNet2D, config: Config, data: dict[str, Any], name: str, autoencoder: Autoencoder | None = None
    ) -> "TrainedModel":
        """A network trained with `config` on `data`, which is `TrainState.data`."""
        channels = autoencoder.channels if autoencoder else config.model.in_channels
        return cls(
            network=network, process=make_process(**process_kwargs(config)), size=config.data.size,
            channels=channels, autoencoder=autoencoder,
            sampling=config.sampling, seed=config.seed,
            mixed_precision=config.train.mixed_precision, name=name, class_names=data["class_names"],
            class_counts=data["class_counts"], config=config, fingerprint=data["fingerprint"],
            condition=make_condition(config),
            float_labels=FloatLabels.from_dict(data.get("labels"), label_shape(network.config), name),
            scaling=Scaling.from_dict(data.get("scaling"), channels, name),
        )  # fmt: skip

    @property
    def null_label(self) -> float | None:
        """The label of a dropped class, or each number of it; None if the network was trained without label dropout."""
        if self.float_labels is not None:
            return self.float_labels.null
        embeddings, classes = self.network.config.num_class_embeds, self.class_counts
        return len(classes) if embeddings and classes and embeddings > len(classes) else None

    def sampling_metadata(self) -> dict[str, Any]:
        """The settings that determine the samples, under their names in records."""
        sampling = self.sampling
        return {
            "sampler": self.process.resolve_sampler(sampling.sampler, sampling.num_inference_steps),
            "steps": sampling.num_inference_steps,
            "guidance": sampling.guidance_scale,
            "batch_size": sampling.batch_size,
            "seed": self.seed,
            **({"conditions": self.conditions.fingerprint} if self.conditions else {}),
            **({"guidance_interval": sampling.guidance_interval} if sampling.guidance_interval else {}),
            **({"guide": self.guide.digest()} if self.guide else {}),
            **({"inpaint": self.inpaint.fingerprint, **self.jumps, "sampler": "repaint"} if self.inpaint else {}),
        }

    def digest(self) -> str:
        """sha256 of the weights, the network's configuration and the noise schedule, wherever they are stored."""
        scheduler = self.process.export_scheduler()
        configs = [(type(each).__name__, each.config) for each in (self.network, scheduler)]
        hidden = self.network.training_only
        public = [
            (name, {key: config[key] for key in config if key[0] != "_" and key not in hidden})
            for name, config in configs
        ]
        text = json.dumps(public, sort_keys=True, default=str)
        return weights_digest(text + (self.autoencoder.digest if self.autoencoder else ""), self.network)

    def grid_tiles(self, images: np.ndarray, start: int = 0) -> tuple[np.ndarray, int]:
        """Pictures of the images from `start` on, uint8 (N, H, W, C), each between what it was sampled from, if
        anything, and the image that this was made of, if known: uint8 (N, H, W', 1 or 3); and the column at which they
        begin."""
        if (source := self.conditions or self.inpaint) is None:
            return images, 0
        indices, to_network = range(start, start + len(images)), self.scaling.to_network
        seen = to_uint8(source.condition.shown(source.network_input(indices, images.shape[1:3], to_network)))
        originals = [] if source.images is None else [source.images(source.entries(indices))]
        originals = [self.scaling.to_pictures(each) for each in originals]
        shown = (as_colours(seen), images, *originals)
        in_rgb = [each.repeat(3 if each.shape[-1] == 1 else 1, axis=-1) for each in shown]
        return np.concatenate(in_rgb, axis=2), images.shape[2]

    def labels(self, indices: Sequence[int]) -> np.ndarray | None:
        """Each image's class, int64 (len(indices),), or float64 label, also (len(indices), D): one of `given_labels`,
        or that of its condition, if known, or drawn as often as in training. None for a network without labels."""
        if self.given_labels is not None:
            return self.given_labels[np.asarray(indices, np.int64) % len(self.given_labels)]
        if self.class_counts is None and self.float_labels is None:
            return None
        if self.conditions is not None and self.conditions.labels is not None:
            return self.conditions.labels[self.conditions.entries(indices)]
        if self.float_labels is not None:
            return self.float_labels.draw(indices, self.seed)
        return sample_labels(indices, self.seed, self.class_counts)

    def sample(
        self, indices: Sequence[int], accelerator: Accelerator, check: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        """Sample the images with these indices, in any order, as `ImageSampler.sample` returns them, on the
        accelerator's device, which the network is on, and in its precision.

        `check` is called before each forward pass of the network, and what it raises ends the sampling. ConfigError if
        the sampler does not fit the process, there are no conditions for a network that needs them, or guidance needs
        labels that there are not.
        """
        labels = self.labels(indices)
        if self.float_labels is not None:
            labels = self.float_labels.to_network(labels)
        if self.condition is not None and self.conditions is None:
            raise ConfigError(f"--conditions: none given; valid: a folder, since {self.name} samples from images")

        def network_input(conditions: SampleConditions | None) -> Tensor | None:
            return conditions and conditions.network_input(indices, self.size, self.scaling.to_network)

        reduction, guide = self.autoencoder.reduction if self.autoencoder else 1, self.guide and self.guide.network
        sampler = ImageSampler(
            self.network, self.process, size=(self.size[0] // reduction, self.size[1] // reduction),
            guide=guide and guide.to(accelerator.device), num_estimates=self.num_estimates,
            channels=self.network.config.out_channels, seed=self.seed, null_label=self.null_label,
            can_drop_condition=self.condition is not None and self.condition.can_drop, jumps=self.jumps,
            scaling=self.scaling, decode=self.autoencoder and self.autoencoder.decode, device=accelerator.device,
            autocast=accelerator.autocast, check=check, **self.sampling.model_dump(exclude={"num_images"}),
        )  # fmt: skip
        return sampler.sample(indices, labels, network_input(self.conditions), network_input(self.inpaint))


def is_model_path(path: Path) -> bool:
    """Whether `path` looks like something that `load_trained_model` loads; it may still be damaged."""
    markers = ("checkpoints", "manifest.json", "unet/config.json", "config.json")
    return _is_best(path) or any((path / marker).exists() for marker in markers)


def load_trained_model(path: Path, weights: str = "ema") -> TrainedModel:
    """Load a model on the CPU, in eval mode: of a run's directory (its newest undamaged checkpoint), a checkpoint,
    RUN/checkpoints/best or a diffusers folder; `weights` is one of WEIGHTS, ema for a diffusers folder.

    It may be untrusted: weights are read from safetensors and settings from JSON and YAML, nothing is unpickled,
    executed or written, and weights are read only after their headers match the configuration. CheckpointError if
    `path` is none of these, or is damaged.
    """
    if (checkpoint := find_checkpoint(path)) is not None:
        return load_from_checkpoint(checkpoint, weights)
    if (path / "unet" / "config.json").is_file() or (path / "config.json").is_file():
        if weights != "ema":
            raise CheckpointError(f"{path}: a diffusers folder has one kind of weights; valid: ema")
        return _load_diffusers(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory{did_you_mean_path(path)}; valid: {VALID_SOURCES}")
    raise CheckpointError(f"{path}: holds no model; valid: {VALID_SOURCES}")


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint, verified, of a run's directory, of its own path or of RUN/checkpoints/best; None for other paths.

    Raises:
        CheckpointError: the run has no checkpoint yet, or it is damaged.
    """
    if (path / "checkpoints").is_dir():
        if (checkpoint := newest_checkpoint(path / "checkpoints")) is None:
            raise CheckpointError(f"{path}: the run has no checkpoint yet")
        return checkpoint
    if _is_best(path):
        path = best_checkpoint(path)
    elif not (path / "manifest.json").is_file():
        return None
    verify_checkpoint(path)
    return path


def _is_best(path: Path) -> bool:
    return path.name == BEST and path.is_file()


def load_from_checkpoint(path: Path, weights: str = "ema") -> TrainedModel:
    """`load_trained_model` of a verified checkpoint, or of one of POWER_EMAS in a snapshot."""
    config = sanitize_config(path / "config.yaml")
    data = read_state(path).data
    names, counts = _classes(data, path / "state.json")
    if not isinstance(data.get("fingerprint"), str):
        raise CheckpointError(f"{path / 'state.json'}: data lacks the fingerprint of the images")
    autoencoder = find_autoencoder(config, path, data.get("autoencoder"))
    settings = unet_kwargs(config, len(counts or ()), autoencoder.reduction if autoencoder else 1)
    tensors = open_tensors(path, WEIGHTS.get(weights, weights))
    check_weights_match(UNet2D, settings, tensors.specs, f"{path}: {tensors.files[0].name} and config.yaml")
    check_fits_memory(tensors.files)
    network = UNet2D(**settings)
    tensors.check(network.state_dict())
    tensors.read(network.state_dict())
    run = "".join(letter if letter.isprintable() else "_" for letter in Path(config.run_dir).name)
    name = f"{run}-{path.name}" + ("" if weights == "ema" else f"-{weights}")
    data |= {"class_names": names, "class_counts": counts}
    return TrainedModel.of_run(network.eval(), config, data, name, autoencoder)


def sanitize_config(file: Path) -> Config:
    """An untrusted run's configuration, without what would run code or write files when the run is evaluated.

    Ignored are custom extractors (TorchScript and classes are code), extractor weights that are not safetensors, and
    a cache directory that does not hold a cache yet.
    """
    config = from_yaml(read_text(file, MAX_YAML_BYTES), str(file))
    evaluate, data = config.evaluate, config.data
    safe_weights = {name: path for name, path in evaluate.weights.items() if path.endswith(".safetensors")}
    if evaluate.extractors or safe_weights != evaluate.weights:
        logger.warning("%s: evaluate.extractors and weights that may hold code are ignored; see --extractors", file)
        evaluate = evaluate.model_copy(update={"extractors": {}, "weights": safe_weights})
    if data.cache_dir is not None and not _has_cache(data.cache_dir):
        data = data.model_copy(update={"cache_dir": None})
    return config.model_copy(update={"evaluate": evaluate, "data": data})


def _has_cache(folder: str) -> bool:
    try:
        return any(Path(folder).expanduser().glob("images-*/table.json"))
    except (OSError, ValueError, RuntimeError):  # an unknown user, or not a valid path
        return False


def _classes(values: Mapping[str, Any], file: Path) -> tuple[list[str] | None, list[int] | None]:
    """Validated `class_names` and `class_counts` of the values read from `file`."""
    names, counts = values.get("class_names"), values.get("class_counts")
    if names is None and counts is None:
        return None, None
    valid = isinstance(names, list) and isinstance(counts, list) and len(names) == len(counts)
    valid = valid and all(isinstance(name, str) for name in names)
    if not valid or not all(type(count) is int and count >= 0 for count in counts) or not any(counts):
        valid = "a name and a number of training images per class, or null"
        raise CheckpointError(f"{file}: valid class_names and class_counts: {valid}")
    return names, counts


def _load_diffusers(path: Path) -> TrainedModel:
    unet_folder, metadata = path / "unet" if (path / "unet").is_dir() else path, path / "gnunet.json"
    try:
        network = UNet2D.from_pretrained(unet_folder, use_safetensors=True).eval()
    except (OSError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"{unet_folder}: not a U-Net that gnunet can load: {error}") from None
    values = read_json(metadata) if metadata.exists() else {}  # of gnunet's export
    embeddings, channels = network.config.num_class_embeds, network.config.out_channels
    names, counts = _classes(values, metadata)
    if not values and embeddings is not None:  # classes without names, of equal frequency
        names, counts = [str(i) for i in range(embeddings)], [1] * embeddings
    if embeddings not in ((None,) if counts is None else (len(counts), len(counts) + 1)):
        raise CheckpointError(f"{metadata}: class_counts {truncate(counts)}; the U-Net has {embeddings} embeddings")
    autoencoder, condition = None, None
    if (digest := values.get("autoencoder")) is not None or (path / "vae" / "config.json").is_file():
        autoencoder = load_autoencoder(path / "vae", digest)
    if (conditioning := values.get("condition")) is not None:
        try:
            config = Config.model_validate({"data": conditioning, "model": {"in_channels": channels}})
            condition = make_condition(config)
        except (ValidationError, ConfigError) as error:
            raise CheckpointError(f"{metadata}: condition {truncate(conditioning)} is not valid") from error
    added, latents = condition.channels if condition else 0, (autoencoder.latent_channels,) if autoencoder else None
    if network.config.in_channels != channels + added or (not values and channels not in (latents or (1, 3))):
        raise CheckpointError(
            f"{unet_folder / 'config.json'}: in_channels {network.config.in_channels} and out_channels {channels}; "
            f"valid: 1 for both, grey images, or 3, in colour, or what {metadata.name} or vae are about, and "
            f"{added} more in_channels for the condition"
        )
    if (given := network.config.sample_size) is None:
        raise CheckpointError(f"{unet_folder / 'config.json'}: lacks sample_size; valid: an integer, or two of them")
    (height, width), factor = as_size(given), 1
    if autoencoder is not None:
        channels, factor = autoencoder.channels, autoencoder.reduction
    folder = path.resolve()
    # As RUN/model or RUN/ema/std-0.1: the name of the run tells it from others.
    depth = next((n for n, each in enumerate(folder.parents[:2], 1) if (each / "config.yaml").is_file()), 0)
    return TrainedModel(
        network=network, process=load_process(path), size=(height * factor, width * factor), autoencoder=autoencoder,
        channels=channels,
        sampling=SamplingConfig(), seed=0, mixed_precision="no",
        name="-".join(folder.parts[-1 - depth :]), class_names=names, class_counts=counts,
        float_labels=FloatLabels.from_dict(values.get("labels"), label_shape(network.config), metadata),
        condition=condition, scaling=Scaling.from_dict(values.get("scaling"), channels, metadata),
    )  # fmt: skip
