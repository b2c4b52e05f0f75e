"""Opening what can be sampled from: a run's folder, one checkpoint, or a diffusers folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from gnunet.config import SamplingConfig, from_yaml, unet_kwargs
from gnunet.diffusion import Process, make_process, process_from_scheduler
from gnunet.errors import CheckpointError
from gnunet.models import UNet2D
from gnunet.training.checkpoint import check_whole, load_weights, newest_checkpoint, read_state


@dataclass
class Sampleable:
    """A network and what sampling from it needs."""

    network: UNet2D
    """The averaged weights, fp32, in eval mode, on the CPU."""
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

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class; None where the network was not trained with one."""
        embeddings, classes = self.network.config.num_class_embeds, self.class_counts
        return len(classes) if embeddings and classes and embeddings > len(classes) else None


def open_sampleable(path: Path) -> Sampleable:
    """Open a run's folder (its newest whole checkpoint), a checkpoint, or a diffusers folder.

    Weights are read from safetensors and settings from JSON and YAML; nothing is unpickled or executed.

    Raises:
        CheckpointError: nothing of the kind is there, or it is damaged.
    """
    if (path / "checkpoints").is_dir():
        if (checkpoint := newest_checkpoint(path / "checkpoints")) is None:
            raise CheckpointError(f"{path}: the run has no checkpoint yet")
        return _open_checkpoint(checkpoint)
    if (path / "manifest.json").is_file():
        check_whole(path)
        return _open_checkpoint(path)
    if (path / "unet" / "config.json").is_file() or (path / "config.json").is_file():
        return _open_diffusers(path)
    raise CheckpointError(
        f"{path}: not found as a run's folder (with checkpoints/), a checkpoint (with manifest.json), "
        "or a diffusers folder (with unet/ and scheduler/)"
    )


def _open_checkpoint(path: Path) -> Sampleable:
    config = from_yaml((path / "config.yaml").read_text(), str(path / "config.yaml"))
    state = read_state(path)
    counts = state.data["class_counts"]
    network = UNet2D(**unet_kwargs(config, None if counts is None else len(counts)))
    load_weights(path / "ema.safetensors", network)
    return Sampleable(
        network=network.eval(),
        process=make_process(config.diffusion),
        resolution=config.data.resolution,
        channels=config.model.in_channels,
        sampling=config.sampling,
        seed=config.seed,
        mixed_precision=config.train.mixed_precision,
        name=f"{Path(config.run_dir).name}-{path.name}",
        class_names=state.data["class_names"],
        class_counts=counts,
    )


def _open_diffusers(path: Path) -> Sampleable:
    unet_folder = path / "unet" if (path / "unet").is_dir() else path
    try:
        network = UNet2D.from_pretrained(unet_folder, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{unet_folder}: no U-Net that gnunet can load: {error}") from None
    about: dict[str, Any] = {"class_names": None, "class_counts": None}
    if (path / "gnunet.json").is_file():
        about |= json.loads((path / "gnunet.json").read_text())
    elif network.config.num_class_embeds is not None:
        # A foreign class-conditional network: its classes have no names here, and all are equally frequent.
        count = network.config.num_class_embeds
        about = {"class_names": [str(i) for i in range(count)], "class_counts": [1] * count}
    if not isinstance(resolution := network.config.sample_size, int):
        raise CheckpointError(f"{unet_folder / 'config.json'}: sample_size {resolution}; valid: one whole number")
    return Sampleable(
        network=network,
        process=process_from_scheduler(_scheduler(path)),
        resolution=resolution,
        channels=network.config.in_channels,
        sampling=SamplingConfig(),
        seed=0,
        mixed_precision="no",
        name=path.resolve().name,
        class_names=about["class_names"],
        class_counts=about["class_counts"],
    )


def _scheduler(path: Path) -> diffusers.SchedulerMixin:
    """The scheduler beside a U-Net, of the class that its own config names."""
    for file in (path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json"):
        if file.is_file():
            name = json.loads(file.read_text()).get("_class_name")
            kind = getattr(diffusers, str(name), None)
            if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
                raise CheckpointError(f"{file}: _class_name {name!r} is no scheduler of diffusers")
            return kind.from_pretrained(file.parent)
    raise CheckpointError(f"{path}: scheduler/scheduler_config.json is missing")
