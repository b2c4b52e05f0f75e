"""The tensors of a checkpoint, in safetensors files: one of each kind, or one for each process of a sharded run.

    model.safetensors                       a model
    model-00001-of-00002.safetensors        its first rows, and what has none
    model-00002-of-00002.safetensors        the rows that follow

The rows of a tensor stand in the files' order. Each process writes the rows that it has, and reads those that it is to
have from whichever files they are in: any launch reads what any other has written, and none gathers a model.
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
from gnunet.errors import CheckpointError
from gnunet.safe_io import TensorSpec, describe_mismatch, read_safetensors_header

TENSOR_FILES = ("model", "ema", "optimizer")


class ShardId(NamedTuple):
    """The rows of one process, of those that write together."""

    rank: int
    world_size: int


UNSHARDED = ShardId(0, 1)


def file_name(kind: str, part: ShardId) -> str:
    """The file that holds a part of the tensors of a kind."""
    return (
        f"{kind}.safetensors"
        if part.world_size == 1
        else f"{kind}-{part.rank + 1:05d}-of-{part.world_size:05d}.safetensors"
    )


def file_names(kind: str, parts: int) -> list[str]:
    """The files that hold all tensors of a kind, in the order of their rows."""
    return [file_name(kind, ShardId(number, parts)) for number in range(parts)]


def write_tensors(file: Path, tensors: Mapping[str, Tensor], part: ShardId) -> None:
    """Write one process's rows of `tensors`, and if it is the first those that have no dimensions."""
    mine = {}
    for name, tensor in tensors.items():
        rows = to_local(tensor)
        if not isinstance(tensor, DTensor) and tensor.dim():
            rows = shard_of(rows, *part)
        if part.rank == 0 or (tensor.dim() and rows.numel()):
            mine[name] = rows.contiguous()
    save_file(mine, file)


class ShardedTensorReader:
    """Tensors that lie in one or several files, by the files' headers; nothing else has been read.

    Raises:
        CheckpointError: a file is missing or damaged, or the rows in it do not go with those before them.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.found: dict[str, TensorSpec] = {}
        """Dtype and shape of each tensor, all its rows together."""
        for file in files:
            for name, part in read_safetensors_header(file).items():
                before = self.found.get(name)
                if before is None:
                    self.found[name] = part
                elif before.shape and part.shape and (before.dtype, before.shape[1:]) == (part.dtype, part.shape[1:]):
                    self.found[name] = TensorSpec(part.dtype, (before.shape[0] + part.shape[0], *part.shape[1:]))
                else:
                    shown = (f"{dtype} {str(shape)[:100]}" for dtype, shape in (part, before))
                    raise CheckpointError(f"{file}: {name[:100]} is {next(shown)}; rows before it are {next(shown)}")

    def check(self, wanted: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless they are the `wanted` ones in names and shapes; those may be on `meta`."""
        if difference := describe_mismatch(self.found, wanted):
            raise CheckpointError(f"{self.files[0]}: belongs to another model: {difference}")

    @torch.no_grad()
    def read(self, into: Mapping[str, Tensor]) -> None:
        """Read into each tensor the rows that this process has of it; `check` has been called."""
        starts = dict.fromkeys(into, 0)
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        target, first = to_local(into[name]), shard_offset(into[name])
                        if not target.dim():
                            target.copy_(opened.get_tensor(name))
                            continue
                        rows = opened.get_slice(name)
                        start = starts[name]
                        starts[name] = stop = start + rows.get_shape()[0]
                        low, high = max(start, first), min(stop, first + len(target))
                        if low < high:
                            target[low - first : high - first].copy_(rows[low - start : high - start])
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: cannot be read ({error})") from None
