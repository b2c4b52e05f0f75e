"""How the losses of a step change the weights: backward, the norm and clipping of gradients, the optimizer.

One class for each kind of launch: `DDPStrategy` by Accelerate, for one process and for DDP, `CudaGraphStrategy` in its
place where steps are replayed as CUDA graphs, and `FSDPStrategy` by torch's FSDP2.
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
    """Of a network that each process has all of."""

    state_is_sharded = False
    """Whether processes have parts of the optimizer's state, which they then write together."""

    def __init__(self, unet: UNet2D, adamw: torch.optim.AdamW, accelerator: Accelerator) -> None:
        self.unet, self.adamw, self.accelerator = unet, adamw, accelerator
        self._prepare()

    def _prepare(self) -> None:
        with warnings.catch_warnings():
            # torch 2.13 has a new name for DDP's option, which torch 2.9 does not know.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            # The network is where it belongs; on launched CPU processes Accelerate would move it to "cpu:0" all the
            # same, which copies buffers that the average follows.
            self.network, self.optimizer = self.accelerator.prepare(
                self.unet, self.adamw, device_placement=[False, False]
            )

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Context of the forward and backward pass of a micro-batch, after the `last` of which gradients are whole."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.network)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's loss; what `clip` finds are their means over the processes."""
        self.accelerator.backward(loss)

    def average_gradients(self, run: Callable[..., Any]) -> None:
        """Average the gradients over the processes, where `backward` has not; `run` is `Graphs.run`."""

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients of all processes together; their norm before, float () and the same on every process."""
        return self.accelerator.clip_grad_norm_(self.network.parameters(), max_norm)

    def step(self, learning_rate: float) -> None:
        """Take the optimizer's step and let go of the gradients."""
        self.set_learning_rate(learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip_step(self) -> None:
        """Let go of gradients that are not finite; weights and optimizer stay as they are."""
        if self.accelerator.scaler is not None:
            back_off_scale(self.accelerator.scaler)
        self.optimizer.zero_grad()

    def set_learning_rate(self, value: float) -> None:
        """Of all parameters; rounded to float32, which is what a CUDA graph can read."""
        for group in self.adamw.param_groups:
            group["lr"] = float(np.float32(value))


class CudaGraphStrategy(DDPStrategy):
    """`DDPStrategy` by functions that can be captured in CUDA graphs: nothing is decided on the host, and no collective
    runs within them. Gradients are averaged by one all-reduce instead of DDP, which cannot be captured in parts."""

    def _prepare(self) -> None:
        self.network = self.accelerator.prepare_model(self.unet, device_placement=False, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(self.adamw)
        self.parameters = list(self.unet.parameters())
        self.is_alone = self.accelerator.num_processes == 1
        if not self.is_alone:
            broadcast([tensor.data for tensor in (*self.parameters, *self.unet.buffers())])  # as DDP does
            sizes = [parameter.numel() for parameter in self.parameters]
            self.flat = torch.zeros(sum(sizes), device=self.accelerator.device)
            self.views = [
                part.as_strided(parameter.shape, parameter.stride())
                for part, parameter in zip(self.flat.split(sizes), self.parameters, strict=True)
            ]

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Nothing: gradients are averaged when all are there."""
        return nullcontext()

    @torch.no_grad()
    def pack(self) -> None:
        """Move the gradients into one buffer, each process's share of their mean, to be summed."""
        torch._foreach_copy_(self.views, [parameter.grad for parameter in self.parameters])
        self.flat.mul_(1 / self.accelerator.num_processes)
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view

    def average_gradients(self, run: Callable[..., Any]) -> None:
        if not self.is_alone:
            run("pack", self.pack)
            torch.distributed.all_reduce(self.flat)

    def step_where(self, condition: Tensor, learning_rate: Tensor) -> None:
        """Take the optimizer's step; if the condition is false, weights and optimizer stay as they are.

        Args:
            condition: bool (), on the device.
            learning_rate: float32 (), on the device.
        """
        before = [{"lr": group["lr"], "capturable": group["capturable"]} for group in self.adamw.param_groups]
        self.adamw.found_inf = 1.0 - condition.float()  # GradScaler's way to tell a fused optimizer
        try:
            for group in self.adamw.param_groups:
                group.update(lr=learning_rate, capturable=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*capturable=True")  # while it warms up
                self.adamw.step()
        finally:
            del self.adamw.found_inf
            for group, options in zip(self.adamw.param_groups, before, strict=True):
                group.update(options)


class FSDPStrategy(DDPStrategy):
    """Of a network that `Sharding.shard` has split."""

    state_is_sharded = True

    def _prepare(self) -> None:
        # For its autocast alone, which evaluation_mode leaves; Accelerate would shard on its own otherwise.
        self.network = self.accelerator.prepare_model(self.unet, device_placement=False, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(self.adamw)

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Nothing: FSDP adds to the rows of gradients at once, since it keeps no others."""
        return nullcontext()

    def clip(self, max_norm: float) -> Tensor:
        """See `DDPStrategy.clip`."""
        return fsdp.clip_gradients(self.unet, max_norm)


def back_off_scale(scaler: torch.amp.GradScaler) -> None:
    """What GradScaler does when it skips a step; it would decide by the gradients of this process alone."""
    scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 0})
