"""Compile the operator's kernels for GPUs that are not here, and read from the machine code what they need.

    python scripts/benchmarks/inspect_kernels.py [--backend cuda triton] [--arch 80 90 100] [--output resources.json]

Every launch of forward and backward on the shapes below is compiled as it would be on such a GPU. Printed for each
kernel: registers a thread, bytes of stack and of spills, and the widths in bytes of the loads from and stores to global
memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common import cuda_code, triton_code
from common.sass import KernelCode
from gnunet.ops.arguments import NormArgs

BACKENDS: dict[str, Any] = {"triton": triton_code, "cuda": cuda_code}
CENTERS = {"True": True, "False": False}
SHAPES = {
    # name: (shape, groups). One for each tiling, and sizes that no power of two divides.
    "a level of DDPM's U-Net": ((2, 128, 32, 32), 32),
    "a wider one in a large batch": ((64, 1024, 32, 32), 32),
    "its lowest level": ((2, 512, 4, 4), 32),
    "groups of 10 channels": ((1, 320, 16, 16), 32),
    "groups of 10 channels, large": ((1, 320, 64, 64), 32),
    "one group": ((1, 256, 16, 16), 1),
    "a group for each channel": ((1, 64, 32, 32), 64),
    "a decoder's last level": ((1, 128, 512, 512), 32),
    "no spatial dimensions": ((8, 512), 32),
    "odd sizes": ((1, 30, 37, 41), 3),
}


def arguments_of(shape: Sequence[int], groups: int, dtype: torch.dtype, layout: str, center: bool = True) -> NormArgs:
    """Arguments of a shape on the meta device, all of them given; weight and bias are fp32."""
    with torch.device("meta"):
        x = torch.empty(shape, dtype=dtype)
        if layout == "channels_last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        weight = torch.empty(shape[1], dtype=torch.float32)
        table = torch.empty(shape[:2], dtype=dtype)
        return NormArgs(x, weight, weight, table, table, table, groups, 1e-5, True, center)


def compile_launch(work: tuple[str, Any, int]) -> KernelCode:
    backend, launch, arch = work
    code: KernelCode = BACKENDS[backend].compile_launch(launch, arch)
    return code


def inspect_shapes(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each kernel that SHAPES launch, once."""
    seen, work, about = set(), [], []
    for (name, (shape, groups)), dtype, layout, center, arch, backend in product(
        SHAPES.items(), arguments.dtypes, ("contiguous", "channels_last"), arguments.center, arguments.arch,
        arguments.backend,
    ):  # fmt: skip
        args = arguments_of(shape, groups, getattr(torch, dtype), layout, CENTERS[center])
        for launch in BACKENDS[backend].launches(args, arch):
            if (launch, arch) not in seen:
                seen.add((launch, arch))
                work.append((backend, launch, arch))
                about.append(
                    {
                        "backend": backend,
                        "shape": name,
                        "dtype": dtype,
                        "layout": layout,
                        "center": center,
                        "arch": arch,
                    }
                )
    with ProcessPoolExecutor() as pool:
        for row, code in zip(about, pool.map(compile_launch, work), strict=True):
            yield {**asdict(code), **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="whose kernels")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities, times 10")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of x")
    parser.add_argument("--center", nargs="+", choices=CENTERS, default=list(CENTERS), help="the operator's argument")
    parser.add_argument("--output", type=Path, help="write what is printed to this JSON file")
    arguments = parser.parse_args()
    found = list(inspect_shapes(arguments))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1))
    numbers = ("arch", "registers", "stack", "spills")
    table = Table("backend", "kernel", "shape", "dtype", "layout", "center", *numbers, "loads", "stores")
    for row in found:
        moves = (" ".join(f"{n}x{width}" for width, n in row[name].items()) for name in ("loads", "stores"))
        names = ("backend", "kernel", "shape", "dtype", "layout", "center", *numbers)
        table.add_row(*(str(row[name]) for name in names), *moves)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
