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
from torch.distributed.tensor import DTensor

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
        return self.accelerator.clip_grad_norm_(self.adamw.param_groups[0]["params"], max_norm)

    def step(self, learning_rate: float) -> None:
        """Take the optimizer step and free the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = float(np.float32(learning_rate) * np.float32(group["lr_factor"]))  # as a CUDA graph has it
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip_step(self) -> None:
        """Free gradients that are not finite; weights and optimizer stay unchanged."""
        if (scaler := self.accelerator.scaler) is not None:
            # As GradScaler does when it skips a step, which it would decide by this rank's gradients alone.
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
            scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 0})
        self.optimizer.zero_grad()


class _UnwrappedStrategy(DDPStrategy):
    """The base of those whose network Accelerate neither wraps in DDP nor shards."""

    def _prepare(self) -> None:
        # In evaluation mode it only adds autocast.
        self.network = self.accelerator.prepare_model(self.unet, device_placement=False, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(self.adamw)

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        return nullcontext()


class CudaGraphStrategy(_UnwrappedStrategy):
    """`DDPStrategy` with capturable functions: nothing is decided on the host, and no collective runs in them.

    One all-reduce averages the gradients instead of DDP, whose collectives cannot be captured separately.
    """

    def _prepare(self) -> None:
        super()._prepare()
        self.parameters = list(self.unet.parameters())
        if self.accelerator.num_processes > 1:
            broadcast([tensor.data for tensor in (*self.parameters, *self.unet.buffers())])  # as DDP does
            sizes = [parameter.numel() for parameter in self.parameters]
            self.flat_grad = torch.zeros(sum(sizes), device=self.accelerator.device)
            self.grad_views = [
                flat.as_strided(parameter.shape, parameter.stride())
                for flat, parameter in zip(self.flat_grad.split(sizes), self.parameters, strict=True)
            ]

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
        """Take the optimizer step if the condition is true; otherwise weights and optimizer stay unchanged.

        Both arguments are on the device: bool () and float32 ().
        """
        before = [{"lr": group["lr"], "capturable": group["capturable"]} for group in self.adamw.param_groups]
        self.adamw.found_inf = 1.0 - condition.float()  # by which GradScaler makes a fused optimizer skip a step
        try:
            for group in self.adamw.param_groups:
                group.update(lr=learning_rate * group["lr_factor"], capturable=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*capturable=True")  # during warm-up
                self.adamw.step()
        finally:
            del self.adamw.found_inf
            for group, options in zip(self.adamw.param_groups, before, strict=True):
                group.update(options)


class FSDPStrategy(_UnwrappedStrategy):
    """FSDP2: a network that `fsdp.shard` has sharded across ranks.

    It reduces the gradients of each micro-batch, since it keeps only shards.
    """

    state_is_sharded = True

    def clip(self, max_norm: float) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.adamw.param_groups[0]["params"], max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
