"""The backward pass, gradient clipping and the optimizer step, for each kind of launch.

`DDPStrategy`: one process or DDP, by Accelerate. `CudaGraphStrategy`: the same for steps that are replayed as CUDA
graphs. `FSDPStrategy`: torch's FSDP2.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from gnunet.distributed import fsdp
from gnunet.models import UNet2D


class DDPStrategy:
    """DDP or a single process: every rank has a full replica of the network."""

    state_is_sharded = False
    """Whether each rank has only a shard of weights and optimizer state, so that all write a checkpoint together."""

    def __init__(self, unet: UNet2D, adamw: torch.optim.AdamW, accelerator: Accelerator) -> None:
        self.unet, self.adamw, self.accelerator = unet, adamw, accelerator
        self._prepare()

    def _prepare(self) -> None:
        with warnings.catch_warnings():
            # torch 2.13 has a new name for DDP's option, which torch 2.9 does not know.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            # The network is on its device already; on launched CPU processes Accelerate would move it to "cpu:0" all
            # the same, which copies buffers that the EMA follows.
            self.network, self.optimizer = self.accelerator.prepare(
                self.unet, self.adamw, device_placement=[False, False]
            )

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Context for a micro-batch's forward and backward pass; DDP averages gradients in that of the last one."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.network)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of this rank's loss, which are averaged over the ranks before `clip`."""
        self.accelerator.backward(loss)

    def average_gradients(self, run: Callable[..., Any]) -> None:
        """Average gradients over the ranks if `backward` has not; `run` is `Graphs.run`."""

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients by their global norm, which is returned, float () and the same on every rank."""
        return self.accelerator.clip_grad_norm_(self.network.parameters(), max_norm)

    def step(self, learning_rate: float) -> None:
        """Take the optimizer step and free the gradients."""
        self.set_learning_rate(learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip_step(self) -> None:
        """Free gradients that are not finite; weights and optimizer stay unchanged."""
        if self.accelerator.scaler is not None:
            back_off_scale(self.accelerator.scaler)
        self.optimizer.zero_grad()

    def set_learning_rate(self, value: float) -> None:
        """Set that of all parameters, rounded to float32, as a CUDA graph reads it."""
        for group in self.adamw.param_groups:
            group["lr"] = float(np.float32(value))


class CudaGraphStrategy(DDPStrategy):
    """`DDPStrategy` with capturable functions: nothing is decided on the host, and no collective runs in them.

    One all-reduce averages the gradients instead of DDP, whose collectives cannot be captured separately.
    """

    def _prepare(self) -> None:
        self.network = self.accelerator.prepare_model(self.unet, device_placement=False, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(self.adamw)
        self.parameters = list(self.unet.parameters())
        if self.accelerator.num_processes > 1:
            broadcast([tensor.data for tensor in (*self.parameters, *self.unet.buffers())])  # as DDP does
            sizes = [parameter.numel() for parameter in self.parameters]
            self.flat_grad = torch.zeros(sum(sizes), device=self.accelerator.device)
            self.grad_views = [
                flat.as_strided(parameter.shape, parameter.stride())
                for flat, parameter in zip(self.flat_grad.split(sizes), self.parameters, strict=True)
            ]

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def average_gradients(self, run: Callable[..., Any]) -> None:
        if self.accelerator.num_processes > 1:
            run("pack", self.pack_gradients)
            torch.distributed.all_reduce(self.flat_grad)

    @torch.no_grad()
    def pack_gradients(self) -> None:
        """Copy the gradients into one buffer, divided by the number of ranks, for the sum over them."""
        torch._foreach_copy_(self.grad_views, [parameter.grad for parameter in self.parameters])
        self.flat_grad.mul_(1 / self.accelerator.num_processes)
        for parameter, view in zip(self.parameters, self.grad_views, strict=True):
            parameter.grad = view

    def step_where(self, condition: Tensor, learning_rate: Tensor) -> None:
        """Take the optimizer step; if the condition is false, weights and optimizer stay unchanged.

        Args:
            condition: bool (), on the device.
            learning_rate: float32 (), on the device.
        """
        before = [{"lr": group["lr"], "capturable": group["capturable"]} for group in self.adamw.param_groups]
        self.adamw.found_inf = 1.0 - condition.float()  # by which GradScaler makes a fused optimizer skip a step
        try:
            for group in self.adamw.param_groups:
                group.update(lr=learning_rate, capturable=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*capturable=True")  # during warm-up
                self.adamw.step()
        finally:
            del self.adamw.found_inf
            for group, options in zip(self.adamw.param_groups, before, strict=True):
                group.update(options)


class FSDPStrategy(DDPStrategy):
    """FSDP2: a network that `Sharding.shard` has sharded across ranks."""

    state_is_sharded = True

    def _prepare(self) -> None:
        # Only for its autocast, which evaluation_mode leaves: Accelerate would shard the network itself otherwise.
        self.network = self.accelerator.prepare_model(self.unet, device_placement=False, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(self.adamw)

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()  # FSDP reduces the gradients of each micro-batch, since it keeps only shards

    def clip(self, max_norm: float) -> Tensor:
        return fsdp.clip_gradients(self.unet, max_norm)


def back_off_scale(scaler: torch.amp.GradScaler) -> None:
    """Lower the scale as GradScaler does when it skips a step, which it would decide by this rank's gradients alone."""
    scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 0})
