"""Runs whose gradients and moments are split over the processes, by DeepSpeed's ZeRO-2; weights are whole on each.

`accelerate launch` with the options of configs/accelerate/zero2.yaml asks for it. DeepSpeed's engine is driven here
rather than by Accelerate, whose `backward` takes the engine's step before a loss can be found not finite on another
process, and which has DeepSpeed on GPUs alone. Nor are the engine's checkpoints used, since they are pickles.
"""

import importlib.metadata
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import compare_versions, is_deepspeed_available, str_to_bool
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor, Shard

from gnunet.config import Config
from gnunet.distributed.fsdp import check_settings, rows_of
from gnunet.distributed.strategy import Update
from gnunet.errors import ConfigError
from gnunet.models import UNet2D

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

ASKED = "ACCELERATE_USE_DEEPSPEED"
OPTIONS = {
    "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"),
    "offload_optimizer_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
    "offload_param_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none"),
    "deepspeed_config_file": ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"),
}
"""The options of `accelerate launch` that count here: where it tells its processes of each, and what is valid."""
OLDEST = "0.19.8"
"""Of earlier releases, 0.19.7 gives gradients in fp32 that are not finite a norm of 1, and 0.18.0 loses those of all
micro-batches but the last."""
BUCKET = 50_000_000
"""The most elements of gradients that are reduced at a time; DeepSpeed sets so much memory aside."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_asked_for() -> bool:
    """Whether this process was launched for DeepSpeed."""
    return bool(str_to_bool(os.environ.get(ASKED, "false")))


def is_launched() -> bool:
    """Whether this process is to train by DeepSpeed: not so where no launcher has started it."""
    return is_asked_for() and torch.distributed.is_initialized()


def check_options(config: Config) -> None:
    """Refuse, by a ConfigError, a launch for DeepSpeed that does not go with a configuration or with this package."""
    if not is_asked_for():
        return
    for name, (variable, valid) in OPTIONS.items():
        if (given := os.environ.get(variable, valid)) != valid:
            raise ConfigError(f"{name}: given {given}; valid: {valid}")
    check_settings(config, "DeepSpeed")
    found = importlib.metadata.version("deepspeed") if is_deepspeed_available() else "none"
    if found == "none" or compare_versions("deepspeed", "<", OLDEST):
        raise ConfigError(
            f'accelerate launch: given DeepSpeed {found}; valid: {OLDEST} or later, pip install "gnunet[deepspeed]"'
        )


@contextmanager
def hidden() -> Iterator[None]:
    """Context in which Accelerate does not know that DeepSpeed was asked for, and takes the launch for one of DDP."""
    asked = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[ASKED] = asked


class ZeroUpdate(Update):
    """Of a network whose gradients and moments DeepSpeed has split.

    Args:
        unet: see `lay_in_rows`.
        timeout: how long a process waits for the others.
    """

    in_parts = True

    def __init__(self, unet: UNet2D, adamw: torch.optim.AdamW, accelerator: Accelerator, *, timeout: timedelta) -> None:
        self.timeout = timeout
        super().__init__(unet, adamw, accelerator)

    def _prepare(self) -> None:
        os.environ["DS_ACCELERATOR"] = self.accelerator.device.type  # it would take the machine's best
        import deepspeed

        # For inference alone, and compiled at the first use on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # torch 2.13 has new names for collectives, which DeepSpeed 0.19 does not use.
        warnings.filterwarnings("ignore", ".*torch.distributed.*is deprecated", FutureWarning)
        self.accelerator.prepare_model(self.unet, device_placement=False, evaluation_mode=True)  # its autocast
        bucket = min(BUCKET, sum(parameter.numel() for parameter in self.unet.parameters()))
        options = {
            "train_micro_batch_size_per_gpu": 1,  # it asks for one; nothing depends on it
            "timers": {"throughput": {"enabled": False}},  # which wait for the GPU
            "zero_optimization": {"stage": 2, "reduce_bucket_size": bucket},
        }
        self.network: DeepSpeedEngine
        self.network, self.optimizer, _, _ = deepspeed.initialize(
            model=self.unet, optimizer=self.adamw, config=options, dist_init_required=False
        )
        _set_pg_timeout(self.timeout, self.network.data_parallel_group)  # its own; the default is long
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        self.adamw = PartitionedAdamW(self.adamw, self.optimizer, self.unet, mesh)

    def collecting(self, last: bool) -> AbstractContextManager[None]:
        """See `Update.collecting`; gradients are added to each process's stretch at once."""
        self.network.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Update.backward`."""
        self.network.backward(loss, scale_wrt_gas=False)

    def clip(self, max_norm: float) -> Tensor:
        """See `Update.clip`; they are clipped by the step."""
        self.optimizer.clip_grad = max_norm if math.isfinite(max_norm) else 0.0
        norm = self.optimizer.scaled_global_norm()
        return torch.where(norm < 0, torch.inf, norm)  # negative stands for one that is not finite

    def step(self, learning_rate: float) -> None:
        """See `Update.step`."""
        self.set_learning_rate(learning_rate)
        self.network.step()

    def skip(self) -> None:
        """See `Update.skip`."""
        # As the engine does in a step where it finds that itself; a loss that is not finite it does not look for.
        zero = self.optimizer
        zero.zero_grad()
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None

    def take_over_weights(self) -> None:
        """See `Update.take_over_weights`."""
        self.optimizer.refresh_fp32_params()


class PartitionedAdamW:
    """AdamW, of whose state each process has one stretch: what a checkpoint needs of an optimizer, by rows.

    Every process calls these methods together. No process ever has more than one tensor of the state whole.
    """

    def __init__(self, adamw: torch.optim.AdamW, zero: Any, unet: UNet2D, mesh: DeviceMesh) -> None:
        self.adamw, self.zero, self.mesh = adamw, zero, mesh
        self.parameters = list(unet.parameters())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of AdamW, with this process's stretch of the weights in the place of parameters."""
        return self.adamw.param_groups

    def empty_like(self, parameter: Tensor) -> DTensor:
        """Room for this process's rows of something of a parameter's shape."""
        return self._rows(torch.empty_like(parameter, requires_grad=False))

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's, with moments of which each process has its rows."""
        state = self.adamw.state.get(self._stretch, {})
        entries = {}
        for index, parameter in enumerate(self.parameters if state else []):
            entries[index] = {"step": state["step"].clone()}
            for name in MOMENTS:
                whole = torch.zeros_like(parameter, requires_grad=False)
                mine, here = self._shared(parameter, whole, state[name])
                mine.copy_(here)
                torch.distributed.all_reduce(whole)
                entries[index][name] = self._rows(whole)
        return {"state": entries, "param_groups": self.param_groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` has given, and the weights that the network has by now."""
        entries = state_dict["state"]
        self.adamw.state.clear()
        if entries:
            # A parameter that never had a gradient has no state but in a stretch with others, and there weight decay.
            state = self.adamw.state[self._stretch] = {
                "step": torch.stack([entry["step"] for entry in entries.values()]).max().to(self._stretch.device),
                **{name: torch.zeros_like(self._stretch, requires_grad=False) for name in MOMENTS},
            }
            for index, entry in entries.items():
                for name in MOMENTS:
                    mine, here = self._shared(self.parameters[index], entry[name].full_tensor(), state[name])
                    here.copy_(mine)
        self.zero.refresh_fp32_params()

    @property
    def _stretch(self) -> Tensor:
        """The weights that this process steps: one stretch of all of them, one behind the other."""
        return self.adamw.param_groups[0]["params"][0]

    def _shared(self, parameter: Tensor, whole: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the elements that a tensor of a parameter's shape and this process's stretch have in common."""
        if (mapping := parameter._hp_mapping) is None:
            return whole.new_empty(0), stretch.new_empty(0)
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        return whole.view(-1).narrow(0, there.start, there.numel), stretch.narrow(0, here.start, here.numel)

    def _rows(self, whole: Tensor) -> DTensor:
        """This process's rows of a tensor that all have whole, which they then can let go of."""
        rows = rows_of(whole, self.mesh.get_local_rank(), self.mesh.size()).clone()
        return DTensor.from_local(rows, self.mesh, [Shard(0)], shape=whole.shape, stride=whole.stride())
