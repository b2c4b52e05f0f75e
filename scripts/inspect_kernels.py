"""Compile the operator's Triton kernels for GPUs that are not here, and read from the machine code what they need.

    python scripts/inspect_kernels.py [--arch 80 90 100] [--output resources.json]

Every launch of forward and backward on the shapes below is compiled as Triton would compile it on such a GPU.
Printed for each: registers a thread, bytes of stack and of spills, and the widths of the loads from and stores to
global memory in bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gnunet.ops.gpu import operator

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
WARP = 32
CENTERS = {"True": True, "False": False}
SHAPES = {
    # name: (shape, groups). One for each way of cutting a tensor up, and sizes that no power of two divides.
    "a level of DDPM's U-Net": ((2, 128, 32, 32), 32),
    "its lowest level": ((2, 512, 4, 4), 32),
    "groups of 10 channels": ((1, 320, 16, 16), 32),
    "groups of 10 channels, large": ((1, 320, 64, 64), 32),
    "one group": ((1, 256, 16, 16), 1),
    "a group for each channel": ((1, 64, 32, 32), 64),
    "a decoder's last level": ((1, 128, 512, 512), 32),
    "no spatial dimensions": ((8, 512), 32),
    "odd sizes": ((1, 30, 37, 41), 3),
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    tile_bytes: of a tile of x that one thread has. loads, stores: how many instructions move how many bytes from and
    to global memory.
    """

    module: str
    kernel: str
    shape: str
    dtype: str
    layout: str
    center: bool
    arch: int
    tile_bytes: int
    registers: int
    stack: int
    spills: int
    loads: dict[str, int]
    stores: dict[str, int]


@dataclass(frozen=True)
class Launch:
    """A kernel and all that decides how it is compiled."""

    module: str
    kernel: str
    shape: str
    dtype: str
    layout: str
    center: bool
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


def launches(
    shapes: dict[str, tuple[tuple[int, ...], int]], dtypes: list[torch.dtype], centers: list[bool]
) -> Iterator[Launch]:
    """What forward and backward launch on tensors of these shapes, none of it twice; nothing runs."""
    seen = set()
    for name, (shape, groups) in shapes.items():
        for dtype in dtypes:
            for layout, center in product(("contiguous", "channels_last"), centers):
                for launch in _launches(name, shape, groups, dtype, layout, center):
                    key = (launch.module, launch.kernel, launch.signature, launch.constants, launch.aligned)
                    if key not in seen:
                        seen.add(key)
                        yield launch


def _launches(
    name: str, shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: str, center: bool
) -> list[Launch]:
    x = torch.empty(shape, dtype=dtype)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight = torch.empty(shape[1])
    table = torch.empty(shape[:2], dtype=dtype)
    found: list[Launch] = []

    class Recorder:
        """Stands for a kernel, and keeps what it is launched with."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            of = (name, str(dtype).removeprefix("torch."), layout, center)
            return lambda **arguments: found.append(_launch(self.kernel, of, arguments))

    launch = operator._launch
    with mock.patch.object(operator, "_launch", lambda kernel, *a, **k: launch(Recorder(kernel), *a, **k)):
        tables = (weight, weight, 1e-5, table, table, table, True, center)
        _, mean, rstd = operator.forward(x, groups, *tables)
        operator.backward(x, x, mean, rstd, groups, *tables, needs=[True] * 6)
    return found


def _launch(kernel: Any, of: tuple[str, str, str, bool], arguments: dict[str, Any]) -> Launch:
    """The arguments as Triton specializes them: by type, by divisibility by 16, by being 1 or None."""
    types, constants, aligned = [], [], []
    for i, parameter in enumerate(kernel.params):
        value = arguments.pop(parameter.name)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants.append((parameter.name, value))
            types.append((parameter.name, "constexpr"))
            continue
        if isinstance(value, torch.Tensor):
            types.append((parameter.name, TYPES[value.dtype]))
            aligned.append(i)
        elif isinstance(value, int):
            types.append((parameter.name, "i32" if value < 2**31 else "i64"))
            if value % 16 == 0:
                aligned.append(i)
        else:
            types.append((parameter.name, "fp32"))
    module = kernel.fn.__module__.rpartition(".")[2]
    return Launch(
        module, kernel.__name__, *of, tuple(types), tuple(constants), tuple(aligned), tuple(arguments.items())
    )


def compile_launch(launch: Launch, arch: int) -> Resources:
    """What the machine code for a GPU of compute capability arch / 10 needs."""
    kernel = getattr(getattr(operator, f"{launch.module}_kernels"), launch.kernel)
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), attributes)
    options = dict(launch.options)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=options)
    usage, code = _disassemble(compiled.asm["cubin"])
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    of = (launch.module, launch.kernel, launch.shape, launch.dtype, launch.layout, launch.center, arch)
    constants = dict(launch.constants)
    elements = constants.get("BLOCK_S", 0) * constants.get("BLOCK_C", 0)
    tile_bytes = elements * ITEMSIZES[launch.dtype] // (WARP * options["num_warps"])
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return Resources(
        *of, tile_bytes, numbers["REG"], numbers["STACK"], spills, _widths("LDG", code), _widths("STG", code)
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([cuobjdump, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    return usage, code


def _widths(instruction: str, code: str) -> dict[str, int]:
    """How many of the instructions move how many bytes: LDG.E.128 moves 16, LDG.E.U16 2, LDG.E 4."""
    widths: dict[str, int] = {}
    for suffix in re.findall(rf"\b{instruction}\.E([.\w]*)", code):
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", suffix)
        width = str(int(bits[1]) // 8 if bits else 4)
        widths[width] = widths.get(width, 0) + 1
    return widths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities, times 10")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of x")
    parser.add_argument("--center", nargs="+", choices=CENTERS, default=list(CENTERS), help="the operator's argument")
    parser.add_argument("--output", type=Path, help="write what is printed to this JSON file")
    arguments = parser.parse_args()
    dtypes = [getattr(torch, dtype) for dtype in arguments.dtypes]
    work = list(launches(SHAPES, dtypes, [CENTERS[center] for center in arguments.center]))
    with ProcessPoolExecutor() as pool:
        found = [
            resources for arch in arguments.arch for resources in pool.map(compile_launch, work, [arch] * len(work))
        ]
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([asdict(resources) for resources in found], indent=1))
    numbers = ("arch", "registers", "stack", "spills")
    table = Table("", "kernel", "shape", "dtype", "layout", "center", *numbers, "loads", "stores")
    for r in found:
        widths = (" ".join(f"{n}x{width}" for width, n in counts.items()) for counts in (r.loads, r.stores))
        values = (str(getattr(r, name)) for name in numbers)
        table.add_row(r.module, r.kernel, r.shape, r.dtype, r.layout, str(r.center), *values, *widths)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
