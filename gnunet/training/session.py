"""Everything a run is made of, and one step of its training."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gnunet.checkpoint.trained_model import TrainedModel
from gnunet.config import Config, accumulation_steps, unet_kwargs
from gnunet.data import TrainingDataset, ValidationSet, training_loader
from gnunet.diffusion import NoiseLevel, Process, make_process, to_unit_range
from gnunet.distributed.fsdp import Sharding
from gnunet.distributed.signals import StopSignal
from gnunet.distributed.strategy import CudaGraphStrategy, DDPStrategy, FSDPStrategy
from gnunet.models import UNet2D
from gnunet.norms import NORMS, force_weight_norm, running_buffers, update_bn_stats
from gnunet.random_streams import Stream, StreamKey
from gnunet.training import cuda_graph
from gnunet.training.cuda_graph import Graphs
from gnunet.training.data import load_run_data
from gnunet.training.ema import EMA, ema_decay
from gnunet.training.lr_schedule import learning_rate


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, the same on every process."""

    loss: float
    """Mean loss over the global batch."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    finite: bool
    """Whether both are finite; otherwise weights and average are as they were."""
    overflow: bool
    """Not finite only because the fp16 gradient scale is still being searched."""
    nonfinite_examples: tuple[int, ...]
    """The examples whose own loss is not finite, in order; none where only a gradient is not."""
    stop: bool
    """Some process was asked to stop."""


class Step:
    """One optimizer step, which the device may still be at."""

    def __init__(self, read: Callable[[], StepResult]) -> None:
        self._read = functools.cache(read)

    def wait(self) -> StepResult:
        """What it did, once the device has done it. Every process must call this, in the order of their steps."""
        return self._read()


@dataclass
class Session:
    """The parts of a run; `unet` is the bare network, which `update` wraps to train it."""

    config: Config
    accelerator: Accelerator
    micro_batch_size: int
    accumulation: int
    train_set: TrainingDataset
    val_set: ValidationSet
    data: dict[str, Any]
    """What a checkpoint records of the data, `TrainingDataset.metadata`."""
    unet: UNet2D
    ema: EMA
    strategy: DDPStrategy
    process: Process
    sharding: Sharding | None = None
    """How network and average are split over the processes; None where each has all of them."""
    graphs: Graphs | None = None
    """Runs the parts of a step, and decides on the device whether it counts; None where the host calls and decides."""
    precise: bool = False
    """The average has running statistics of its own weights; not so after a step (train.bn_update_batches)."""

    @property
    def total_images(self) -> int:
        """Images seen when the run ends: the first whole batch that reaches train.total_images."""
        batch_size = self.config.train.batch_size
        return math.ceil(self.config.train.total_images / batch_size) * batch_size

    @property
    def batch_norm_scope(self) -> dict[str, int]:
        """What the results of norms that depend on the batch depend on besides the configuration."""
        layers = [layer for layer in self.unet.modules() if getattr(layer, "batch_dependent", False)]
        if not layers:
            return {}
        across = any(isinstance(layer, NORMS["sync_batch"]) for layer in layers)
        processes = {"processes": self.accelerator.num_processes} if across else {}
        return {"micro_batch_size": self.micro_batch_size, **processes}

    @property
    def ema_model(self) -> TrainedModel:
        """The averaged weights, to sample from."""
        return TrainedModel.of_run(self.ema_network, self.config, self.data, Path(self.config.run_dir).name)

    @property
    def ema_network(self) -> UNet2D:
        """The averaged weights, with running statistics that are theirs."""
        if (count := self.config.train.bn_update_batches) and not self.precise:
            self.update_ema_bn_stats(count)
            self.precise = True
        return self.ema.model

    def update_ema_bn_stats(self, count: int) -> None:
        """Give the average running statistics of its own weights on so many micro-batches."""
        with self.accelerator.autocast():
            update_bn_stats(self.ema.model, self.bn_batches(count))

    def bn_batches(self, count: int) -> Iterator[tuple[Tensor, ...]]:
        """What the network is called with for the first micro-batches of a run of one process, which are the same at
        any time and on every process."""
        size = self.micro_batch_size
        batches = training_loader(
            self.train_set, first=0, last=count * size, batch_size=size, micro_batch_size=size, rank=0, world_size=1,
            num_workers=0,
        )  # fmt: skip
        for batch in batches:
            images, noise, level, labels = self.to_device(batch)
            x = self.process.add_noise(images, noise, level)
            call = (self.process.network_input(x, level), level.timestep)
            yield call if labels is None else (*call, labels)

    def batches(self, first: int) -> Iterator[dict[str, Tensor]]:
        """This process's micro-batches from example `first` to the end of the run."""
        return iter(
            training_loader(
                self.train_set, first=first, last=self.total_images, batch_size=self.config.train.batch_size,
                micro_batch_size=self.micro_batch_size, rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes, num_workers=self.config.data.num_workers,
                pin_memory=self.accelerator.device.type == "cuda",
            )
        )  # fmt: skip

    @property
    def reads_late(self) -> bool:
        """Whether a step's result should be waited for when the next one is queued, so that the device has work."""
        return self.graphs is not None and self.accelerator.device.type == "cuda"

    def step(self, batches: Iterator[dict[str, Tensor]], images_seen: int, *, stop: bool | StopSignal) -> Step:
        """One optimizer step: forward and backward over this process's share of a batch, update, average.

        Args:
            batches: this process's micro-batches; `accumulation` of them are taken.
            images_seen: images seen before the step.
            stop: whether this process was asked to stop, read as late in the step as can be; all processes learn of it.
        """
        train, accelerator, strategy = self.config.train, self.accelerator, self.strategy
        run = self.graphs.run if self.graphs is not None else call
        loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        seen = []  # the examples of each micro-batch and their losses
        for part in range(self.accumulation):
            batch = next(batches)
            if self.config.model.dropout:
                masks = Stream(self.config.seed, StreamKey.DROPOUT).raw(int(batch["index"][0]), 1)
                torch.manual_seed(int(masks[0]) >> 1)
            images, noise, level, labels = self.to_device(batch)
            given = [images, noise, *vars(level).values(), *([] if labels is None else [labels])]
            with strategy.accumulate(is_last=part == self.accumulation - 1):
                name, function = ("first", self.make_gradients) if part == 0 else ("next", self.add_gradients)
                losses = run(name, function, *given).clone()
            seen.append((batch["index"], losses))
            loss_sum += losses.sum(dtype=torch.float64)
        strategy.average_gradients(run)
        norm = run("clip", partial(strategy.clip, train.max_grad_norm or math.inf))

        # The norm is the same on every process, so its mean is exact; a process where it is not finite tells all.
        totals = torch.stack([loss_sum, norm.double(), loss_sum.new_full((), float(bool(stop)))])
        totals = accelerator.reduce(totals, "sum")
        self.all_reduce_running_stats()
        self.precise = False
        rate = learning_rate(train, images_seen + train.batch_size / 2)
        decay = ema_decay(train, images_seen + train.batch_size)
        if self.graphs is not None:
            numbers = (totals.new_full((), value, dtype=torch.float32) for value in (rate, 1.0 - decay))
            run("update", self.update_if_finite, totals, *numbers)
            self.graphs.end_step()
            values = cuda_graph.send(totals)
            return Step(lambda: self.result(values(), seen))
        result = self.result(totals.tolist(), seen)
        if result.finite:
            strategy.step(rate)
            force_weight_norm(self.unet)
            self.ema.update(decay)
        else:
            strategy.skip_step()
        return Step(lambda: result)

    def make_gradients(self, *given: Tensor) -> Tensor:
        """`add_gradients` of a step's first micro-batch, whatever a capture that failed has left."""
        self.unet.zero_grad()
        return self.add_gradients(*given)

    def add_gradients(self, images: Tensor, noise: Tensor, *rest: Tensor) -> Tensor:
        """Forward and backward of a micro-batch; its losses, (N,).

        Args:
            rest: the fields of its NoiseLevel, and labels where it has them.
        """
        count = len(fields(NoiseLevel))
        level, labels = NoiseLevel(*rest[:count]), rest[count] if len(rest) > count else None
        losses = self.process.loss(self.strategy.network, images, noise, level, labels)
        # Gradients are averaged over processes: what remains is the mean over the global batch.
        self.strategy.backward(losses.sum() * (self.accelerator.num_processes / self.config.train.batch_size))
        return losses.detach()

    def update_if_finite(self, totals: Tensor, learning_rate: Tensor, share: Tensor) -> None:
        """The optimizer's step and the average's, decided on the device by the totals of `step`."""
        finite = totals[:2].isfinite().all()
        self.strategy.step_where(finite, learning_rate)
        force_weight_norm(self.unet, where=finite)
        self.ema.update_where(finite, share)
        self.unet.zero_grad()  # a graph's own memory keeps them where it expects them

    def result(self, totals: list[float], seen: list[tuple[Tensor, Tensor]]) -> StepResult:
        """What a step did, by its totals over all processes and the examples and losses of this one."""
        loss, grad_norm = totals[0] / self.config.train.batch_size, totals[1] / self.accelerator.num_processes
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        scaler = self.accelerator.scaler
        overflow = scaler is not None and not finite and math.isfinite(loss) and scaler.get_scale() > 1
        bad = () if math.isfinite(loss) else self.nonfinite_of(seen)
        return StepResult(loss, grad_norm, finite, overflow, nonfinite_examples=bad, stop=totals[2] > 0)

    def nonfinite_of(self, seen: list[tuple[Tensor, Tensor]]) -> tuple[int, ...]:
        """All processes' examples whose loss is not finite, of the indices and losses that each has seen."""
        device = self.accelerator.device
        marked = [torch.where(losses.isfinite(), -1, indices.to(device)) for indices, losses in seen]
        return tuple(sorted(index for index in self.accelerator.gather(torch.cat(marked)).tolist() if index >= 0))

    def to_device(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, NoiseLevel, Tensor | None]:
        """A micro-batch's images in [-1, 1], noise, levels, and labels where it has them."""
        device = self.accelerator.device
        level = self.process.noise_level(batch["u"]).to(device)
        images = to_unit_range(batch["images"].to(device, non_blocking=True))
        noise = batch["noise"].to(device, non_blocking=True)
        labels = batch["labels"].to(device, non_blocking=True) if "labels" in batch else None
        return images, noise, level, labels

    def all_reduce_running_stats(self) -> None:
        """Give every process the mean of the processes' running statistics, each of which has seen its own share."""
        if self.accelerator.num_processes == 1 or not (buffers := running_buffers(self.unet)):
            return
        means = self.accelerator.reduce(torch.cat([buffer.float().flatten() for buffer in buffers]), "mean")
        for buffer, mean in zip(buffers, means.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_((mean if buffer.is_floating_point() else mean.round()).view_as(buffer))


def call(name: str, function: Callable[..., Any], *given: Tensor) -> Any:
    """`Graphs.run` without graphs."""
    return function(*given)


def build_session(config: Config, accelerator: Accelerator) -> Session:
    """Load the data and build the network, its average, the optimizer and the process.

    Raises:
        ConfigError, DataError: before anything is written but the cache of decoded images.
    """
    micro_batch_size, accumulation = accumulation_steps(config.train, accelerator.num_processes)

    run_data = load_run_data(config)
    table, train_rows = run_data.table, run_data.train_rows
    train_set = TrainingDataset(
        table, train_rows, seed=config.seed, flip=config.data.flip, label_dropout=config.data.label_dropout,
        class_conditional=config.data.class_conditional,
    )  # fmt: skip

    train, device = config.train, accelerator.device
    is_graphed = cuda_graph.is_wanted(config, accelerator)
    torch.manual_seed(config.seed)
    unet = UNet2D(**unet_kwargs(config, train_set.num_classes)).train()
    if config.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.enable_recompute(config.model.activation_checkpointing == "norm")
    sharding = Sharding.of_launch(accelerator)
    if sharding is None:
        unet.to(device)  # else layer by layer
    ema = EMA(unet, shard=sharding and sharding.shard, running_statistics=not train.bn_update_batches)
    adamw = torch.optim.AdamW(
        unet.parameters(), lr=train.learning_rate, betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_eps, weight_decay=train.weight_decay, fused=True,
    )  # fmt: skip
    kind = CudaGraphStrategy if is_graphed else DDPStrategy if sharding is None else FSDPStrategy
    strategy = kind(unet, adamw, accelerator)
    if train.compile:
        compile_network(unet, device, "default" if train.compile is True else train.compile)
    return Session(
        config=config, accelerator=accelerator, micro_batch_size=micro_batch_size, accumulation=accumulation,
        train_set=train_set, val_set=run_data.val_set(config.validation), data=train_set.metadata, unet=unet, ema=ema,
        strategy=strategy, process=make_process(**config.diffusion.model_dump()), sharding=sharding,
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
