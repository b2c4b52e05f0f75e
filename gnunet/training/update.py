"""How the losses of a step change the weights: backward, the norm and clipping of gradients, the optimizer.

One class for each kind of launch: `Update` by Accelerate, for one process and for DDP; `ShardedUpdate` by torch's
FSDP2; and `gnunet.training.zero.ZeroUpdate` by DeepSpeed.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from gnunet.models import UNet2D
from gnunet.training import sharding


class Update:
    """Of a network that each process has all of."""

    in_parts = False
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

    def collecting(self, last: bool) -> AbstractContextManager[None]:
        """Context of the forward and backward pass of a micro-batch, after the `last` of which gradients are whole."""
        return nullcontext() if last else self.accelerator.no_sync(self.network)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's loss; what `clip` finds are their means over the processes."""
        self.accelerator.backward(loss)

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients of all processes together; their norm before, float () and the same on every process."""
        return self.accelerator.clip_grad_norm_(self.network.parameters(), max_norm)

    def step(self, learning_rate: float) -> None:
        """Take the optimizer's step and let go of the gradients."""
        self.set_learning_rate(learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip(self) -> None:
        """Let go of gradients that are not finite; weights and optimizer stay as they are."""
        if self.accelerator.scaler is not None:
            lower_scale(self.accelerator.scaler)
        self.optimizer.zero_grad()

    def set_learning_rate(self, value: float) -> None:
        """Of all parameters."""
        for group in self.adamw.param_groups:
            group["lr"] = value

    def take_over_weights(self) -> None:
        """Go on from the network's weights, which something else than a step has changed."""


class ShardedUpdate(Update):
    """Of a network that `Sharding.shard` has split."""

    in_parts = True

    def _prepare(self) -> None:
        # For its autocast alone, which evaluation_mode leaves; Accelerate would shard on its own otherwise.
        self.network = self.accelerator.prepare_model(self.unet, device_placement=False, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(self.adamw)

    def collecting(self, last: bool) -> AbstractContextManager[None]:
        """Nothing: FSDP adds to the rows of gradients at once, since it keeps no others."""
        return nullcontext()

    def clip(self, max_norm: float) -> Tensor:
        """See `Update.clip`."""
        return sharding.clip_gradients(self.unet, max_norm)


def lower_scale(scaler: torch.amp.GradScaler) -> None:
    """What GradScaler does when it skips a step; it would decide by the gradients of this process alone."""
    scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 0})
