"""Runs whose weights, gradients, optimizer state and EMA are sharded across ranks by torch's FSDP2.

Each rank has the same rows of all of them: a tensor is cut along its first dimension as by torch.chunk, so the last
ranks may have none of a short one. Buffers are replicated. `accelerate launch` requests it with the options of
configs/accelerate/fsdp2.yaml; it is applied here rather than by Accelerate, which supports it only on GPUs.
"""

import os
from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, str_to_bool
from torch import Tensor
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
    """Raise ConfigError for a launch with FSDP whose options, or whose configuration, are not supported."""
    if not is_requested():
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ConfigError(f"fsdp_version: given {version}; valid: 2")
    try:
        plugin = FullyShardedDataParallelPlugin()
    except ValueError as error:
        raise ConfigError(f"accelerate launch: rejected by Accelerate: {error}") from None
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError("fsdp_offload_params: given true; valid: false")
    if plugin.activation_checkpointing:
        raise ConfigError("fsdp_activation_checkpointing: given true; valid: false, and model.gradient_checkpointing")
    if config.train.compile:
        raise ConfigError(f"train.compile: given {format_value(config.train.compile)} with FSDP; valid: false")
    if config.train.optimizer != "adamw":
        raise ConfigError(f"train.optimizer: given {config.train.optimizer} with FSDP; valid: adamw")
    if config.train.mixed_precision == "fp16":
        raise ConfigError("train.mixed_precision: given fp16 with FSDP; valid: no or bf16")


def sharding_of_launch(accelerator: Accelerator) -> Callable[[UNet2D], None] | None:
    """`shard` with the options that this process was launched with; None without FSDP or without a launcher."""
    if not is_requested() or not torch.distributed.is_initialized():
        return None
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    return partial(shard, mesh=mesh, reshard_after_forward=bool(FullyShardedDataParallelPlugin().reshard_after_forward))


def shard(network: UNet2D, *, mesh: DeviceMesh, reshard_after_forward: bool) -> None:
    """Shard a network in place, leaving this rank its rows of the parameters on the mesh's device.

    With `reshard_after_forward` the other ranks' rows are freed after the forward pass, and gathered again for the
    backward pass.
    """
    for name, parameter in network.named_parameters():
        if not parameter.dim():
            raise ConfigError(f"model.norm: {name} is a scalar, which cannot be sharded; valid: shape (1,)")
        # Convolutions' weights are in channels_last, and FSDP2 shards rows of memory.
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    trains = any(parameter.requires_grad for parameter in network.parameters())
    # The EMA has no backward pass, after which its rows would be freed.
    for layer in network.fsdp_units():
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward or not trains)
    fully_shard(network, mesh=mesh, reshard_after_forward=not trains)


def shard_of(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """The rows of a full tensor that FSDP2 assigns to a rank: a view, which may be empty."""
    chunks = tensor.chunk(world_size)
    return chunks[rank] if rank < len(chunks) else tensor[:0]


def to_local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, or all of one that is not sharded; detached."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def shard_offset(tensor: Tensor) -> int:
    """The index of this rank's first row of a sharded tensor; its number of rows if this rank has none."""
    if not isinstance(tensor, DTensor):
        return 0
    chunk = -(-len(tensor) // tensor.device_mesh.size())
    return min(tensor.device_mesh.get_local_rank() * chunk, len(tensor))
