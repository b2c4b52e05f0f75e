"""Opening what can be sampled from: a run's folder, one checkpoint, or a diffusers folder."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from accelerate import Accelerator

from gnunet.checkpoint.checkpoint import (
    BEST,
    best_checkpoint,
    load_weights,
    newest_checkpoint,
    read_state,
    stored,
    verify_checkpoint,
)
from gnunet.config import Config, SamplingConfig, from_yaml, unet_kwargs
from gnunet.diffusion import Process, make_process, process_from_scheduler, sample_images, sample_labels
from gnunet.diffusion.factory import check_scheduler
from gnunet.errors import CheckpointError, ConfigError
from gnunet.models import UNet2D
from gnunet.models.config_check import CLASSES, check_fits
from gnunet.safe_io import YAML_BYTES, read_json, read_text

logger = logging.getLogger(__name__)

WEIGHTS = {"ema": "ema", "raw": "model"}
"""What a checkpoint calls each kind of weights: averaged, and as they train."""


@dataclass
class TrainedModel:
    """A network and what sampling from it needs."""

    network: UNet2D
    """In fp32."""
    process: Process
    resolution: int
    channels: int
    sampling: SamplingConfig
    """The run's own sampling settings, or the defaults for a diffusers folder."""
    seed: int
    mixed_precision: str
    name: str
    """A short name: of the run and its images seen, or of the folder."""
    class_names: list[str] | None
    class_counts: list[int] | None
    """Training images of each class; None where the network is not class-conditional."""
    config: Config | None = None
    """The run's configuration, without what of a stranger's would run code or write (see `sanitize_config`); None for a
    diffusers folder."""
    fingerprint: str | None = None
    """Of the data that the run trained on; None for a diffusers folder."""

    @classmethod
    def of_run(cls, network: UNet2D, config: Config, data: dict[str, Any], name: str) -> "TrainedModel":
        """A network of the run of `config`, whose checkpoints remember `data` (see `TrainState.data`)."""
        return cls(
            network=network, process=make_process(**config.diffusion.model_dump()), resolution=config.data.resolution,
            channels=config.model.in_channels, sampling=config.sampling, seed=config.seed,
            mixed_precision=config.train.mixed_precision, name=name, class_names=data["class_names"],
            class_counts=data["class_counts"], config=config, fingerprint=data["fingerprint"],
        )  # fmt: skip

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class; None where the network was not trained with one."""
        embeddings, classes = self.network.config.num_class_embeds, self.class_counts
        return len(classes) if embeddings and classes and embeddings > len(classes) else None

    def sample(
        self, indices: Sequence[int], accelerator: Accelerator, *, labels: np.ndarray | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> np.ndarray:  # fmt: skip
        """Sample the images with these indices by the settings in `sampling` and `seed`.

        Args:
            indices: which images, in any order.
            accelerator: gives device and precision; the network is on its device.
            labels: int64 (len(indices),), each image's class; None draws them as often as in training.
            check: called before each run of the network; what it raises ends the sampling.

        Returns:
            uint8 (len(indices), H, W, C).

        Raises:
            ConfigError: see `sample_images`.
        """
        if labels is None and self.class_counts is not None:
            labels = sample_labels(indices, self.seed, self.class_counts)
        settings = self.sampling
        return sample_images(
            self.network, self.process, indices=indices, resolution=self.resolution, channels=self.channels,
            seed=self.seed, sampler=settings.sampler, steps=settings.num_inference_steps,
            batch_size=settings.batch_size, guidance_scale=settings.guidance_scale, labels=labels,
            null_label=self.null_label, device=accelerator.device, autocast=accelerator.autocast, check=check,
        )  # fmt: skip


def is_model_path(path: Path) -> bool:
    """Whether `load_trained_model` would take what lies at `path`, damaged or not."""
    marks = ("checkpoints", "manifest.json", "unet/config.json", "config.json")
    return _is_best(path) or any((path / mark).exists() for mark in marks)


def load_trained_model(path: Path, weights: str = "ema") -> TrainedModel:
    """Open a run's folder (its newest whole checkpoint), a checkpoint, or a diffusers folder.

    It may be a stranger's: weights are read from safetensors and settings from JSON and YAML, nothing is unpickled,
    executed or written, and weights are read only where their headers fit the configuration. The network is in eval
    mode on the CPU.

    Args:
        path: one of these, or RUN/checkpoints/best, which names a checkpoint.
        weights: one of WEIGHTS; a diffusers folder has only those that it was exported with, the averaged ones.

    Raises:
        CheckpointError: nothing of the kind is there, or it is damaged.
    """
    if (checkpoint := find_checkpoint(path)) is not None:
        return _open_checkpoint(checkpoint, weights)
    if (path / "unet" / "config.json").is_file() or (path / "config.json").is_file():
        if weights != "ema":
            raise CheckpointError(f"{path}: a diffusers folder has one kind of weights; valid: ema")
        return _open_diffusers(path)
    raise CheckpointError(
        f"{path}: not found as a run's folder (with checkpoints/), a checkpoint (with manifest.json), "
        "or a diffusers folder (with unet/ and scheduler/)"
    )


def find_checkpoint(path: Path) -> Path | None:
    """The whole checkpoint that a run's folder, a checkpoint's or RUN/checkpoints/best stands for.

    None where the path is none of them. Raises CheckpointError where there is none yet, or it is damaged.
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


def _open_checkpoint(path: Path, weights: str) -> TrainedModel:
    file = path / "config.yaml"
    config = sanitize_config(file)
    state = read_state(path)
    classes = _classes(state.data, path / "state.json")
    if not isinstance(state.data.get("fingerprint"), str):
        raise CheckpointError(f"{path / 'state.json'}: data lacks the fingerprint of the images")
    counts = classes["class_counts"]
    settings = unet_kwargs(config, None if counts is None else len(counts))
    tensors = stored(path, WEIGHTS[weights])
    try:
        check_fits(UNet2D, settings, tensors.found)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {tensors.files[0].name} and config.yaml: {error}") from None
    network = UNet2D(**settings)
    load_weights(path, WEIGHTS[weights], network)
    run = "".join(letter if letter.isprintable() else "_" for letter in Path(config.run_dir).name)
    name = f"{run}-{path.name}" + ("" if weights == "ema" else f"-{weights}")
    return TrainedModel.of_run(network.eval(), config, {**state.data, **classes}, name)


def sanitize_config(file: Path) -> Config:
    """A run's configuration, which may be a stranger's, without what evaluating it would run, unpickle, or write to.

    Dropped are extractors of one's own (TorchScript and classes are code), files of extractors' weights other than
    safetensors, and a cache folder that holds no cache yet.

    Raises:
        CheckpointError, ConfigError: the file cannot be read, or is no configuration.
    """
    config = from_yaml(read_text(file, YAML_BYTES), str(file))
    evaluate, data = config.evaluate, config.data
    files = {name: path for name, path in evaluate.weights.items() if path.endswith(".safetensors")}
    if evaluate.extractors or files != evaluate.weights:
        logger.warning("%s: evaluate.extractors and weights that may hold code are ignored; see --extractors", file)
        evaluate = evaluate.model_copy(update={"extractors": {}, "weights": files})
    if data.cache_dir is not None and not _has_cache(data.cache_dir):
        data = data.model_copy(update={"cache_dir": None})
    return config.model_copy(update={"evaluate": evaluate, "data": data})


def _has_cache(folder: str) -> bool:
    try:
        return any(Path(folder).expanduser().glob("images-*/table.json"))
    except (OSError, ValueError, RuntimeError):  # no such user, or no name of a folder at all
        return False


def _classes(about: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """`class_names` and `class_counts` of what `file` remembers; CheckpointError where they are none."""
    names, counts = (about.get(key, _ABSENT) for key in ("class_names", "class_counts"))
    if names is None and counts is None:
        return {"class_names": None, "class_counts": None}
    lists = isinstance(names, list) and isinstance(counts, list) and 0 < len(names) == len(counts) < CLASSES
    if not lists or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{file}: valid class_names and class_counts: two lists of one length, or null")
    if not all(type(count) is int and 0 <= count < 2**40 for count in counts) or not any(counts):
        raise CheckpointError(f"{file}: valid class_counts: whole numbers of training images, at least one above 0")
    return {"class_names": names, "class_counts": counts}


_ABSENT = object()


def _open_diffusers(path: Path) -> TrainedModel:
    unet_folder = path / "unet" if (path / "unet").is_dir() else path
    try:
        network = UNet2D.from_pretrained(unet_folder, use_safetensors=True).eval()
    except (OSError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"{unet_folder}: no U-Net that gnunet can load: {error}") from None
    embeddings = network.config.num_class_embeds
    classes: dict[str, Any] = {"class_names": None, "class_counts": None}
    if (about := path / "gnunet.json").exists():
        classes = _classes(read_json(about), about)
        count = classes["class_counts"] and len(classes["class_counts"])
        if embeddings not in ((None,) if count is None else (count, count + 1)):
            raise CheckpointError(f"{about}: has {count} classes; the U-Net beside it has {embeddings} embeddings")
    elif embeddings is not None:
        # A foreign class-conditional network: its classes have no names here, and all are equally frequent.
        classes = {"class_names": [str(i) for i in range(embeddings)], "class_counts": [1] * embeddings}
    if not isinstance(resolution := network.config.sample_size, int):
        raise CheckpointError(f"{unet_folder / 'config.json'}: sample_size {resolution}; valid: one whole number")
    return TrainedModel(
        network=network,
        process=_process(path),
        resolution=resolution,
        channels=network.config.in_channels,
        sampling=SamplingConfig(),
        seed=0,
        mixed_precision="no",
        name=path.resolve().name,
        **classes,
    )


def _process(path: Path) -> Process:
    """The process of the scheduler beside a U-Net, of the class that its own config names."""
    for file in (path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json"):
        if file.exists():
            settings = read_json(file)
            name = settings.get("_class_name")
            try:
                check_scheduler(settings)
                kind = getattr(diffusers, str(name), None) if str(name).endswith("Scheduler") else None
                if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
                    raise ConfigError(f"_class_name {repr(name)[:100]} is no scheduler of diffusers")
                return process_from_scheduler(kind.from_config(settings))
            except Exception as error:  # of any kind, as its values may be
                raise CheckpointError(f"{file}: {error}") from None
    raise CheckpointError(f"{path}: scheduler/scheduler_config.json is missing")
