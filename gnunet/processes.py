"""The processes of a launch, as functions that share work between them need to know them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Processes:
    """This process's rank, the number of processes, and how they exchange tensors; by default a single process."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Concatenates every rank's tensor along the first dimension, on every rank. All ranks must call it."""

    @classmethod
    def of(cls, accelerator: "Accelerator") -> "Processes":
        """Those of an Accelerator."""
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.gather)


SINGLE_PROCESS = Processes()
