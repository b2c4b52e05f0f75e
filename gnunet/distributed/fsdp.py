"""Runs whose weights, gradients, moments and average are split over the processes, by torch's FSDP2.

A process has the same rows of each of them: a tensor is cut along its first dimension as torch.chunk cuts it, and the
last processes may have none of a short one. Buffers are whole everywhere. `accelerate launch` with the options of
configs/accelerate/fsdp2.yaml asks for it; applied here rather than by Accelerate, which has it on GPUs alone.
"""

import os
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, str_to_bool
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gnunet.config import Config
from gnunet.config.yaml_io import format_value
from gnunet.errors import ConfigError
from gnunet.models import UNet2D


def is_requested() -> bool:
    """Whether this process was launched for FSDP."""
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def check_options(config: Config) -> None:
    """Refuse, by a ConfigError, a launch for FSDP that does not go with a configuration or with this package."""
    if not is_requested():
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ConfigError(f"fsdp_version: given {version}; valid: 2")
    try:
        plugin = FullyShardedDataParallelPlugin()
    except ValueError as error:
        raise ConfigError(f"accelerate launch: refused by Accelerate: {error}") from None
    refused = {
        "fsdp_offload_params: given true; valid: false": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: given true; valid: false, and model.gradient_checkpointing": (
            plugin.activation_checkpointing
        ),
    }
    for problem, found in refused.items():
        if found:
            raise ConfigError(problem)
    check_settings(config, "FSDP")


def check_settings(config: Config, launch: str) -> None:
    """Refuse, by a ConfigError that names the launch, what goes with none that splits a run."""
    if config.train.compile:
        raise ConfigError(f"train.compile: given {format_value(config.train.compile)} with {launch}; valid: false")
    if config.train.mixed_precision == "fp16":
        raise ConfigError(f"train.mixed_precision: given fp16 with {launch}; valid: no or bf16")


@dataclass(frozen=True)
class Sharding:
    """How networks are split."""

    mesh: DeviceMesh
    """All processes, in one dimension."""
    reshard_after_forward: bool
    """Let go of other processes' rows between forward and backward, and fetch them again."""

    @classmethod
    def of_launch(cls, accelerator: Accelerator) -> "Sharding | None":
        """What this process was launched for; None where it is not FSDP, or no launcher has started it."""
        if not is_requested() or not torch.distributed.is_initialized():
            return None
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        return cls(mesh, bool(FullyShardedDataParallelPlugin().reshard_after_forward))

    def shard(self, network: UNet2D) -> None:
        """Leave this process its rows of a network's parameters, in place and on the device of the mesh.

        Layers that hold most of the parameters are fetched and let go one by one, in forward and backward.

        Raises:
            ConfigError: see `make_params_contiguous`.
        """
        make_params_contiguous(network)
        trains = any(parameter.requires_grad for parameter in network.parameters())
        # An average has no backward pass to be let go of after.
        reshard = self.reshard_after_forward or not trains
        for layer in network.layers():
            fully_shard(layer, mesh=self.mesh, reshard_after_forward=reshard)
        fully_shard(network, mesh=self.mesh, reshard_after_forward=not trains)


def make_params_contiguous(network: nn.Module) -> None:
    """Let the weights of a network that is to be split lie row by row, which those in channels_last do not.

    Raises:
        ConfigError: a parameter has no dimensions, and so no rows.
    """
    for name, parameter in network.named_parameters():
        if not parameter.dim():
            raise ConfigError(f"model.norm: {name} is a scalar, which cannot be split; valid: shape (1,)")
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def shard_of(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """The rows of a full tensor that FSDP2 assigns to a rank: a view, which may be empty."""
    chunks = tensor.chunk(world_size)
    return chunks[rank] if rank < len(chunks) else tensor[:0]


def to_local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process has, as they lie in memory; all of one that is not sharded."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def shard_offset(tensor: Tensor) -> int:
    """The number of the first row that this process has of a tensor, which may lie behind its last."""
    if not isinstance(tensor, DTensor):
        return 0
    chunk = -(-len(tensor) // tensor.device_mesh.size())
    return min(tensor.device_mesh.get_local_rank() * chunk, len(tensor))


def clip_gradients(network: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradients of a sharded network by their norm over all processes, which is returned, float32 ()."""
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
