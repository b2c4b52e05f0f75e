"""What torch.compile launches for silu(group_norm(x)): counted where PyTorch has CUDA, if only gpu_check's fake one."""

from math import ceil, prod
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._inductor.config
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from benchmarking.case import make_inputs
from benchmarking.peers import PEERS
from benchmarking.sass import counts, cuobjdump, loops
from benchmarking.shapes import Case


class Work(NamedTuple):
    """What a kernel does at the least: the bytes of the tensors that it reads and of those that it writes, each once,
    and the instructions of its warps, in that of its configurations which takes fewest."""

    kernel: str
    read: int
    written: int
    instructions: int


def compiled_kernels(case: Case) -> dict[str, list[Work]]:
    """Those of forward and of backward, in their order."""
    found: list[Work] = []
    run = CachingAutotuner.run

    def count(self: CachingAutotuner, *args: Any, **kwargs: Any) -> Any:
        if not self.compile_results:
            self.precompile()
        results = list(self.compile_results)  # of which tuning leaves one
        given = dict(zip(self.fn.arg_names, args, strict=False))
        moved = {
            way: sum(t.nbytes for name, t in given.items() if torch.is_tensor(t) and way in name.split("_"))
            for way in ("in", "out")
        }
        found.append(Work(self.fn.__name__, *moved.values(), min(_instructions(each, given) for each in results)))
        return run(self, *args, **kwargs)

    contender = PEERS["compile"](case)
    [(x, dy)] = make_inputs(case, {case.layout}, 1, torch.device("cuda"))[case.layout]
    weight, bias = torch.empty(2, case.shape[1], dtype=case.dtype, device="cuda")
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    # The machine code of all configurations is there only with these.
    settings = torch._inductor.config.patch(
        use_static_cuda_launcher=False, compile_threads=1, force_disable_caches=True
    )
    with settings, mock.patch.object(CachingAutotuner, "run", count):
        y = contender.function(*inputs)
        forward, found = found, []
        torch.autograd.grad(y, inputs, dy)
    return {"forward": forward, "backward": found}


def _instructions(result: Any, given: dict[str, Any]) -> int:
    """Of all warps: the loop, if there is one, is that over what is reduced, one block in each round, and all else is
    executed once."""
    code, blocks = cuobjdump("--dump-sass", result.kernel.asm["cubin"]), result.config.kwargs
    axes = [axis for axis in "xyz" if f"{axis}numel" in given]
    programs = prod(ceil(given[f"{axis}numel"] / blocks[f"{axis.upper()}BLOCK"]) for axis in axes)
    inner = sum(loop[0] for loop in loops(code))
    rounds = ceil(given["r0_numel"] / blocks["R0_BLOCK"]) if "R0_BLOCK" in blocks else 1
    return programs * result.config.num_warps * (counts(code).total() + (rounds - 1) * inner)
