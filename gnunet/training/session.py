"""The images and the parts of a run, built from its configuration."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from gnunet.checkpoint.run_dir import find_autoencoder
from gnunet.checkpoint.sharded_tensors import POWER_EMAS
from gnunet.checkpoint.trained_model import TrainedModel
from gnunet.config import (
    Config,
    accumulation_steps,
    check_latents,
    image_kwargs,
    make_condition,
    process_kwargs,
    unet_kwargs,
)
from gnunet.data import Condition, DecodedImages, FloatLabels, SampleConditions, TrainingDataset, ValidationSet
from gnunet.data.cache import load_images
from gnunet.data.dataset import to_network
from gnunet.data.example_rng import split_rows
from gnunet.data.latents import encode_images
from gnunet.data.loader import TrainingLoader
from gnunet.diffusion import NoiseLevel, Process, make_process
from gnunet.diffusion.process import concatenate
from gnunet.distributed import fsdp
from gnunet.distributed.strategy import CudaGraphStrategy, DDPStrategy, FSDPStrategy
from gnunet.errors import ConfigError, first_few
from gnunet.models import UNet2D
from gnunet.models.autoencoder import Autoencoder
from gnunet.norms import NORMS, running_buffers, update_bn_stats
from gnunet.training import cuda_graph
from gnunet.training.cuda_graph import Graphs
from gnunet.training.ema import EMA, ema_decays
from gnunet.training.optimizer import make_optimizer
from gnunet.training.progress import decode_progress

MAX_LATENT_STD = 2.0  # and its inverse the least: the standard deviation of scaled latents


@dataclass(frozen=True)
class RunData:
    """A table of images and how its rows are split."""

    table: DecodedImages
    train_rows: np.ndarray  # int64, ascending
    validation_rows: np.ndarray  # int64, ascending; empty if none are held out
    condition: Condition | None = None

    @property
    def _fixed_rows(self) -> np.ndarray:
        return self.validation_rows if len(self.validation_rows) else self.train_rows

    def val_set(self, config: Config) -> ValidationSet:
        """The validation set, over training images if none are held out."""
        settings = config.validation.model_dump(exclude={"batch_size"})
        return ValidationSet(self.table, self._fixed_rows, condition=self.condition, **settings)

    def sample_conditions(self, config: Config) -> SampleConditions | None:
        """The conditions of held-out images, or of training images if none are held out, in a fixed order."""
        if self.condition is None:
            return None
        labels = self.table.labels if config.data.class_conditional else None
        return SampleConditions.of_rows(self.condition, self.table, self._fixed_rows, labels)


def load_run_data(config: Config, autoencoder: Autoencoder | None = None) -> RunData:
    """The images that a configuration trains and validates on; not their latents. Raises DataError if they cannot be
    loaded."""
    # One process fills the cache, the others wait for it.
    channels = config.model.in_channels if autoencoder is None else autoencoder.channels
    table = load_images(**image_kwargs(config), channels=channels, progress=decode_progress())
    labels = table.labels if config.data.class_conditional else None
    are_classes = config.model.class_embed_type is None
    train_rows, held_out = split_rows(len(table), config.data.validation_images, labels if are_classes else None)
    if not are_classes:
        table = replace(table, float_labels=FloatLabels.of(table.labels[train_rows], config.data.label_dropout > 0))
    return RunData(table, train_rows, held_out, make_condition(config))


def with_latents(data: RunData, config: Config, autoencoder: Autoencoder) -> RunData:
    """The data with the images' latents, which are encoded where the autoencoder is. Raises ConfigError if they are not
    scaled to unit standard deviation."""
    latents = encode_images(
        data.table, autoencoder, flip=config.data.flip, cache_dir=config.data.cache_dir,
        progress=decode_progress("encoding"),
    )  # fmt: skip
    if not 1 / MAX_LATENT_STD <= latents.std <= MAX_LATENT_STD:
        factor = autoencoder.model.config.scaling_factor
        fits = f"{factor / latents.std:.4g}" if latents.std else "none, since they are all equal"
        raise ConfigError(
            f"data.autoencoder: given {config.data.autoencoder}, whose scaling_factor {factor:g} gives these images "
            f"latents of standard deviation {latents.std:.3g}; valid: about 1; scaling_factor that fits: {fits}"
        )
    return replace(data, table=replace(data.table, latents=latents))


def summarize_data(data: RunData, train_set: TrainingDataset) -> tuple[dict[str, Any], str]:
    """What is trained on and what is left out, as a record and as a line for the terminal."""
    metadata, table = train_set.metadata, data.table
    counts = metadata["class_counts"]
    record = {
        "images": metadata["num_images"],
        "classes": None if counts is None else dict(zip(metadata["class_names"], counts, strict=True)),
        "held_out": len(data.validation_rows),
        "skipped": table.skipped,
        "unread": dict(sorted(table.unread.items(), key=lambda item: -item[1])),
        "fingerprint": table.fingerprint,
    }
    classes = "without classes" if counts is None else f"of {len(counts)} classes ({min(counts)} to {max(counts)} each)"
    if table.float_labels is not None:
        labels = table.labels[data.train_rows]
        record["labels"] = [float(labels.min()), float(labels.max())]
        classes = "with labels from {:g} to {:g}".format(*record["labels"])
    left_out = f"{record['held_out']} held out, {table.skipped} corrupted skipped"
    line = f"data: {record['images']} images {classes}, {left_out}"
    if table.unread:
        kinds = [f"{count} {suffix}" for suffix, count in record["unread"].items()]
        line += f"; other files, not read: {first_few(kinds)}"
    return record, line


@dataclass
class Session:
    """The parts of a run; `unet` is the bare network, which `strategy` wraps to train it."""

    config: Config
    accelerator: Accelerator
    micro_batch_size: int
    accumulation: int  # micro-batches of an optimizer step on each rank
    train_set: TrainingDataset
    val_set: ValidationSet
    data_summary: tuple[dict[str, Any], str]  # what `summarize_data` says of the images
    unet: UNet2D
    ema: EMA
    strategy: DDPStrategy
    process: Process
    autoencoder: Autoencoder | None = None  # whose latents the network sees, if any
    conditions: SampleConditions | None = None  # of the images that are sampled in training
    graphs: Graphs | None = None  # replays the parts of a step as CUDA graphs; None without train.cuda_graph
    ema_stats_are_current: bool = False  # re-estimated for its present weights (train.bn_update_batches)

    @property
    def total_images(self) -> int:
        """Images seen when the run ends: the first whole batch that reaches train.total_images."""
        batch_size = self.config.train.batch_size
        return math.ceil(self.config.train.total_images / batch_size) * batch_size

    @property
    def batch_norm_scope(self) -> dict[str, int]:
        """What batch-dependent norms average over besides what the configuration says; empty without such norms."""
        layers = [layer for layer in self.unet.modules() if getattr(layer, "batch_dependent", False)]
        if not layers:
            return {}
        synced = any(isinstance(layer, NORMS["sync_batch"]) for layer in layers)
        processes = {"processes": self.accelerator.num_processes} if synced else {}
        return {"micro_batch_size": self.micro_batch_size, **processes}

    @property
    def reads_late(self) -> bool:
        """Whether a step's result should be read only when the next step is queued, so that the device has work."""
        return self.graphs is not None and self.accelerator.device.type == "cuda"

    @property
    def models(self) -> dict[str, UNet2D]:
        """The network and its EMAs, by their kinds in a checkpoint."""
        return {"model": self.unet, **dict(zip(("ema", *POWER_EMAS), self.ema.models, strict=False))}

    @property
    def ema_network(self) -> UNet2D:
        """The EMA weights, with running statistics of these weights."""
        if (num_batches := self.config.train.bn_update_batches) and not self.ema_stats_are_current:
            self.update_ema_bn_stats(num_batches)
            self.ema_stats_are_current = True
        return self.ema.model

    @property
    def ema_model(self) -> TrainedModel:
        """The EMA weights, to sample from."""
        name = Path(self.config.run_dir).name
        data, config = self.train_set.metadata, self.config
        model = TrainedModel.of_run(self.ema_network, config, data, name, self.autoencoder)
        return replace(model, conditions=self.conditions)

    def update_ema_bn_stats(self, num_batches: int) -> None:
        """Re-estimate the EMA's running statistics on a single-process run's first micro-batches, on every rank."""
        size = self.micro_batch_size
        loader = TrainingLoader(
            self.train_set, first=0, last=num_batches * size, batch_size=size, micro_batch_size=size, num_workers=0
        )

        with self.accelerator.autocast():
            update_bn_stats(self.ema.model, map(self.network_inputs, loader))

    def network_inputs(self, batch: dict[str, Tensor]) -> tuple[Any, ...]:
        """The positional arguments of a network's call on a micro-batch."""
        images, noise, level, inputs = self.to_device(batch)
        x = self.process.network_input(self.process.add_noise(images, noise, level), level)
        x = concatenate(x, inputs.get("condition"))
        return x, level.timestep, inputs.get("labels"), True, None, inputs.get("augment_labels")

    def batches(self, first: int) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches from example `first` to the end of the run."""
        loader = TrainingLoader(
            self.train_set, first=first, last=self.total_images, batch_size=self.config.train.batch_size,
            micro_batch_size=self.micro_batch_size, rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes, num_workers=self.config.data.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )  # fmt: skip
        return iter(loader)

    def to_device(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, NoiseLevel, dict[str, Tensor]]:
        """A micro-batch's images as the network sees them, noise, noise levels, and those of the other arguments of
        `Process.loss_and_objective` that the run has, by name."""
        device = self.accelerator.device
        level = self.process.noise_level(batch["u"]).to(device)
        images, condition = to_network(self.train_set.table, self.train_set.condition, batch, device)
        noise = batch["noise"].to(device, non_blocking=True)
        names = [name for name in ("labels", "augment_labels") if name in batch]
        inputs = {name: batch[name].to(device, non_blocking=True) for name in names}
        if condition is not None:
            inputs["condition"] = condition
        if self.config.train.loss_weighting == "learned":
            inputs["log_snr"] = level.log_snr
        return images, noise, level, inputs

    def all_reduce_running_stats(self) -> None:
        """Average the ranks' running statistics, each of which has seen only its rank's micro-batches."""
        if self.accelerator.num_processes == 1 or not (buffers := running_buffers(self.unet)):
            return
        means = self.accelerator.reduce(torch.cat([buffer.float().flatten() for buffer in buffers]), "mean")
        for buffer, mean in zip(buffers, means.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_((mean if buffer.is_floating_point() else mean.round()).view_as(buffer))


def build_session(config: Config, accelerator: Accelerator) -> Session:
    """Load the data and build network, EMA, optimizer and process. Writes nothing but the cache of decoded images."""
    train, device = config.train, accelerator.device
    micro_batch_size, accumulation = accumulation_steps(train, accelerator.num_processes)

    autoencoder = find_autoencoder(config)
    if autoencoder is not None:
        check_latents(config, autoencoder.latent_channels, autoencoder.reduction)
    run_data = load_run_data(config, autoencoder)
    if autoencoder is not None:
        autoencoder.model.to(device)
        run_data = with_latents(run_data, config, autoencoder)
    train_set = TrainingDataset(
        run_data.table, run_data.train_rows, seed=config.seed, flip=config.data.flip,
        label_dropout=config.data.label_dropout, class_conditional=config.data.class_conditional,
        condition=run_data.condition, condition_dropout=config.data.condition_dropout, augment=config.data.augment,
    )  # fmt: skip

    is_graphed = cuda_graph.is_enabled(config, accelerator)
    torch.manual_seed(config.seed)
    unet = UNet2D(**unet_kwargs(config, train_set.num_classes, autoencoder.reduction if autoencoder else 1)).train()
    if config.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.enable_recompute(config.model.activation_checkpointing == "norm")
    shard = fsdp.sharding_of_launch(accelerator)
    if shard is None:
        unet.to(device)  # else layer by layer
    num_emas = len(ema_decays(train, images=1))
    ema = EMA(unet, num=num_emas, shard=shard, running_statistics=not train.bn_update_batches)
    kind = CudaGraphStrategy if is_graphed else DDPStrategy if shard is None else FSDPStrategy
    strategy = kind(unet, make_optimizer(unet, train), accelerator)
    if train.compile:
        compile_network(unet, device, "default" if train.compile is True else train.compile)
    return Session(
        config=config, accelerator=accelerator, micro_batch_size=micro_batch_size, accumulation=accumulation,
        train_set=train_set, val_set=run_data.val_set(config), conditions=run_data.sample_conditions(config),
        data_summary=summarize_data(run_data, train_set), autoencoder=autoencoder,
        unet=unet, ema=ema, strategy=strategy,
        process=make_process(**process_kwargs(config)),
        graphs=Graphs(accelerator, must_capture=train.cuda_graph is True) if is_graphed else None,
    )  # fmt: skip


def compile_network(unet: UNet2D, device: torch.device, mode: str = "default") -> None:
    """torch.compile `unet` in place, in one of inductor's modes: its parameters' names and its copies stay as they are.

    On a CPU a mode's CUDA graphs are left out by inductor itself.
    """
    from torch._inductor import list_mode_options  # takes a second

    options = dict(list_mode_options(mode))
    if device.type == "cpu":
        # Inductor's layout optimization gives some convolution weights zero gradients there (torch 2.13).
        options["layout_optimization"] = False
    unet.compile(options=options or None)
