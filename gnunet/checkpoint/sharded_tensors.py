"""The tensors of a checkpoint in safetensors files: one per kind, or one per kind and rank of a sharded run.

    model.safetensors                       all of a model
    model-00001-of-00002.safetensors        its first rows (dim 0), and tensors without dimensions
    model-00002-of-00002.safetensors        the rows that follow

Each rank writes the rows it holds and reads the rows it needs from whichever files have them. So any number of
processes, sharded or not, reads what any other wrote, and no rank gathers a model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from gnunet.distributed.fsdp import shard_of, shard_offset, to_local
from gnunet.errors import CheckpointError, truncate
from gnunet.safe_io import TensorSpec, describe_mismatch, read_safetensors_header

TENSOR_FILES = ("model", "ema", "optimizer")  # the kinds of tensors in a checkpoint, each with its file or files
POWER_EMAS = {"ema_0.05": 0.05, "ema_0.10": 0.10}
"""Those of runs with train.ema_snapshot_every: power-function EMAs, by their relative widths."""


class ShardId(NamedTuple):
    rank: int
    world_size: int


UNSHARDED = ShardId(0, 1)


def file_name(kind: str, shard: ShardId) -> str:
    if shard == UNSHARDED:
        return f"{kind}.safetensors"
    return f"{kind}-{shard.rank + 1:05d}-of-{shard.world_size:05d}.safetensors"


def file_names(kind: str, num_shards: int) -> list[str]:
    """All files of a kind, in the order of their rows."""
    return [file_name(kind, ShardId(rank, num_shards)) for rank in range(num_shards)]


def write_tensors(file: Path, tensors: Mapping[str, Tensor], shard: ShardId) -> None:
    """Write one rank's rows of `tensors`; rank 0 also writes those without dimensions."""
    own = {}
    for name, tensor in tensors.items():
        rows = to_local(tensor)
        if not isinstance(tensor, DTensor) and tensor.dim():
            rows = shard_of(rows, *shard)
        if shard.rank == 0 or (tensor.dim() and rows.numel()):
            own[name] = rows.contiguous()
    save_file(own, file)


class ShardedTensorReader:
    """Tensors in one or several files; CheckpointError if one is damaged. The constructor reads only the headers."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.specs: dict[str, TensorSpec] = {}
        """Dtype and full shape of each tensor."""
        for file in files:
            for name, shard in read_safetensors_header(file).items():
                rows = self.specs.get(name)
                if rows is None:
                    self.specs[name] = shard
                elif rows.shape and shard.shape and (rows.dtype, rows.shape[1:]) == (shard.dtype, shard.shape[1:]):
                    self.specs[name] = TensorSpec(shard.dtype, (rows.shape[0] + shard.shape[0], *shard.shape[1:]))
                else:
                    given, before = (f"{dtype} {truncate(shape)}" for dtype, shape in (shard, rows))
                    raise CheckpointError(f"{file}: {truncate(name)} is {given}; rows before it are {before}")

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless names and shapes are those of `expected`, which may be on `meta`."""
        if mismatch := describe_mismatch(self.specs, expected):
            raise CheckpointError(f"{self.files[0]}: belongs to another model: {mismatch}")

    @torch.no_grad()
    def read(self, into: Mapping[str, Tensor]) -> None:
        """Read the rows of each tensor that this rank holds, in place, after `check`."""
        starts = dict.fromkeys(into, 0)
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        target, offset = to_local(into[name]), shard_offset(into[name])
                        if not target.dim():
                            target.copy_(opened.get_tensor(name))
                            continue
                        rows = opened.get_slice(name)
                        start = starts[name]
                        starts[name] = stop = start + rows.get_shape()[0]
                        low, high = max(start, offset), min(stop, offset + len(target))
                        if low < high:
                            target[low - offset : high - offset].copy_(rows[low - start : high - start])
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: cannot be read ({error})") from None
