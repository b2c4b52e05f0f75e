"""Host time of a call of the operator on a GPU, layer by layer, next to PyTorch's two operators, in microseconds.

    python scripts/benchmarks/benchmark_host_time.py [--rounds 40] [--out assets/benchmarks]

The device's work is not waited for: with few images per GPU a step is bound by the host, and this is its part in each
norm. CPU time of the process, with one thread, the least of `rounds` blocks; the sides alternate. It also runs on the
device that computes nothing (gpu_check/fake_cuda.py), where a launch by the driver costs nothing: PyTorch has
4 of them forward, the Triton kernels one or two, those in CUDA C++ one. gnunet is the backend "auto".
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.record import origin, record_path
from gnunet.ops import group_norm_silu
from gnunet.ops.arguments import NormArgs
from gnunet.ops.cuda import launch as cuda_launch
from gnunet.ops.planned import PlannedOperator
from gnunet.ops.triton_kernels import launch as triton_launch

SHAPES = ((8, 512, 4, 4), (8, 256, 16, 16), (8, 128, 32, 32), (1, 320, 64, 64))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GROUPS = 32
CALLS = 200
BARS = {"forward": 1.0, "forward and backward": 1.5}
"""The most that gnunet's time may be of PyTorch's."""

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def pytorchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def gnunets(x: Tensor, weight: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
    return group_norm_silu(x, GROUPS, weight, bias, backend=backend)


def microseconds(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Of a call of each, by turns."""
    least = dict.fromkeys(works, float("inf"))
    for work in works.values():
        for _ in range(20):
            work()
    for _ in range(rounds):
        for name, work in works.items():
            start = time.process_time()
            for _ in range(CALLS):
                work()
            least[name] = min(least[name], (time.process_time() - start) / CALLS)
    return {name: round(seconds * 1e6, 2) for name, seconds in least.items()}


def sides(x: Tensor, weight: Tensor, bias: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """gnunet and PyTorch: forward without gradients, forward of training, and both passes."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    dy = torch.empty_like(x)

    def without_gradients(norm: Norm) -> Callable[[], object]:
        return lambda: norm(x, weight, bias)

    def forward(norm: Norm) -> Callable[[], object]:
        return lambda: norm(*leaves)

    def both(norm: Norm) -> Callable[[], object]:
        return lambda: torch.autograd.grad(norm(*leaves), leaves, dy)

    found = {}
    norms = {"gnunet": gnunets, "triton": partial(gnunets, backend="triton"), "pytorch": pytorchs}
    for name, make in (
        ("forward", without_gradients), ("forward of training", forward), ("forward and backward", both),
    ):  # fmt: skip
        with torch.set_grad_enabled(make is not without_gradients):
            found[name] = microseconds({side: make(norm) for side, norm in norms.items()}, rounds)
    return found


def layers(x: Tensor, weight: Tensor, bias: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Of a call of each backend without gradients, from the outside in; each contains those after it."""
    args = NormArgs(x, weight, bias, None, None, None, GROUPS, 1e-5, True, True)
    found = {}
    for backend, planner in (("cuda", cuda_launch.PLANNER), ("triton", triton_launch.PLANNER)):
        operator = PlannedOperator(args, planner)
        y, stats = operator.forward(args)
        _, execute = operator.plans[()]
        tensors = (x, weight, bias, None, None, None, y, stats)
        works: dict[str, Callable[[], object]] = {
            "call": partial(gnunets, x, weight, bias, backend),
            "signature": args.signature,
            "allocations and launches": partial(operator.forward, args),
            "addresses and launches": partial(execute, tensors),
        }
        with torch.no_grad():
            found[backend] = microseconds(works, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help=f"blocks of {CALLS} calls (default 40)")
    parser.add_argument("--out", type=Path, help="folder to write DATE-DEVICE-host-time.json to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU, or the one of scripts/benchmarks/gpu_check/fake_cuda.py")
    torch.set_num_threads(1)
    device = torch.device("cuda", torch.cuda.current_device())
    table = Table("microseconds", *(f"{name}: gnunet, Triton / PyTorch" for name in (*BARS, "forward of training")))
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for layout, memory_format in LAYOUTS.items():
            x = torch.empty(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=memory_format)
            weight, bias = torch.ones(2, shape[1], device=device, dtype=x.dtype).unbind()
            found = sides(x, weight, bias, arguments.rounds)
            rows.append(
                {"shape": shape, "layout": layout, **found, "layers": layers(x, weight, bias, arguments.rounds)}
            )
            cells = ("{gnunet}, {triton} / {pytorch}".format(**found[name]) for name in (*BARS, "forward of training"))
            table.add_row(f"{shape} {layout}", *cells)
    console = Console(width=140)
    console.print(table)
    console.print(*(f"{row['shape']} {row['layout']}: {row['layers']}" for row in rows), sep="\n")
    bars = {}
    for name, most in BARS.items():
        worst = max(row[name]["gnunet"] / row[name]["pytorch"] for row in rows)
        bars[f"{name}: gnunet / PyTorch, most, <= {most:g}"] = round(worst, 3)
    console.print(bars)
    if arguments.out is not None:
        path = record_path(arguments.out, device, "host-time")
        path.write_text(json.dumps({**origin(device, "triton"), "bars": bars, "rows": rows}, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
