"""Compile the operator's Triton kernels for GPUs that are not here, and read from the machine code what they need.

    python scripts/inspect_kernels.py [--arch 80 90 100] [--output resources.json]
    python scripts/inspect_kernels.py --cases [--out assets/benchmarks]    # the benchmark's, with predicted times

Every launch of forward and backward on the shapes below, or on those of benchmark_op.py, is compiled as Triton would
compile it on such a GPU. Printed for each kernel: registers a thread, bytes of stack and of spills, the widths of the
loads from and stores to global memory in bytes, instructions for each element of x, resident warps. For the benchmark's
cases a record is written, with the times that `benchmarking.model` predicts from these numbers; where PyTorch has CUDA,
if only the fake one of scripts/gpu_check, also with the kernels that torch.compile launches, and the least they take.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
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

from benchmarking.inductor import compiled_kernels
from benchmarking.model import KernelCode, predict, predict_least
from benchmarking.record import origin
from benchmarking.sass import counts, cuobjdump, loops, widths
from benchmarking.shapes import Case, cases
from gnunet.ops.arguments import NormArgs
from gnunet.ops.triton_kernels import launch as op

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
WARP = 32
ALIGNMENT = 16  # bytes, of tensors, and divisor of numbers that Triton compiles another kernel for
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


@dataclass(frozen=True)
class Launch:
    """A kernel and all that decides how it is compiled."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


def launches(
    shape: Sequence[int], groups: int, dtype: torch.dtype, layout: str, center: bool = True, tables: bool = True
) -> dict[str, list[tuple[Launch, int, int]]]:
    """What forward and backward launch on tensors of a shape, the programs, and the tiles of each; nothing runs."""
    with torch.device("meta"), mock.patch.object(op, "_is_nvidia", lambda x: True):
        x = torch.empty(shape, dtype=dtype)
        if layout == "channels_last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        weight = torch.empty(shape[1], dtype=torch.float32 if tables else dtype)
        table = torch.empty(shape[:2], dtype=dtype) if tables else None
        args = NormArgs(x, groups, weight, weight, 1e-5, table, table, table, True, center)
        plans = {
            "forward": op.plan_forward(args),
            "backward": op.plan_backward(args, [t is not None for t in args.tensors]),
        }
    like_x = {"x": dtype, "y": dtype, "dy": dtype, "dx": dtype, "weight": weight.dtype, "bias": weight.dtype}
    like_x |= {"dweight": weight.dtype, "dbias": weight.dtype}
    like_x |= dict.fromkeys(("add", "scale", "shift", "dadd", "dscale", "dshift"), dtype if tables else None)
    found = {}
    for direction, plan in plans.items():
        buffers = ("stats",) if direction == "forward" else ("sums", "partial", "means", "combined")
        given = dict(zip(buffers, (torch.float32 if size else None for size in plan.buffers), strict=True))
        types = {"stats": torch.float32, **like_x, **given}
        found[direction] = [(_specialized(launch, types), launch.programs, _tiles(launch)) for launch in plan.launches]
    return found


def _tiles(launch: op.Launch) -> int:
    """How many tiles a program goes over, one after the other."""
    names = launch.kernel.arg_names[len(launch.tensors) :]
    values = dict(zip(names, launch.values, strict=True))
    if "SPLIT_SIZE" not in values:
        return 1
    positions = min(values["SPLIT_SIZE"], values["positions"] * values["ALIGN_S"])
    splits = values["position_splits"] * values["CHANNEL_SPLITS"] if "two_pass" in launch.kernel.__name__ else 1
    return splits * -(-positions // values["BLOCK_S"])


def _specialized(launch: op.Launch, dtypes: dict[str, torch.dtype | None]) -> Launch:
    """The arguments as Triton specializes them: by type, by divisibility by 16, by being 1 or None."""
    types, constants, aligned = [], [], []
    values = [*(dtypes[name] for name in launch.tensors), *launch.values]
    for i, (parameter, value) in enumerate(zip(launch.kernel.params, values, strict=True)):
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants.append((parameter.name, value))
            types.append((parameter.name, "constexpr"))
        elif isinstance(value, torch.dtype):
            types.append((parameter.name, TYPES[value]))
            aligned.append(i)
        elif isinstance(value, int):
            types.append((parameter.name, "i32" if value < 2**31 else "i64"))
            if value % ALIGNMENT == 0:
                aligned.append(i)
        else:
            types.append((parameter.name, "fp32"))
    return Launch(launch.kernel.__name__, tuple(types), tuple(constants), tuple(aligned), tuple(launch.options.items()))


def compile_launch(launch: Launch, arch: int) -> KernelCode:
    """The machine code for a GPU of compute capability arch / 10."""
    module = op.forward_kernels if launch.kernel.startswith("fwd") else op.backward_kernels
    attributes = {(i,): [["tt.divisibility", ALIGNMENT]] for i in launch.aligned}
    source = ASTSource(getattr(module, launch.kernel), dict(launch.signature), dict(launch.constants), attributes)
    options = dict(launch.options)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=options)
    usage, code = (cuobjdump(option, compiled.asm["cubin"]) for option in ("--dump-resource-usage", "--dump-sass"))
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    names = counts(code)
    constants = dict(launch.constants)
    tile = constants.get("BLOCK_S", constants.get("BLOCK_K", 0)) * constants["BLOCK_C"]
    return KernelCode(
        kernel=launch.kernel,
        warps=options["num_warps"],
        registers=numbers["REG"],
        shared=compiled.metadata.shared,
        stack=numbers["STACK"],
        spills=names["LDL"] + names["STL"],
        barriers=names["BAR"],
        instructions=names.total(),
        loops=loops(code),
        tile=tile,
        loads=widths("LDG", code),
        stores=widths("STG", code),
    )


def inspect_shapes(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each kernel that SHAPES launch, once."""
    seen, work, about = set(), [], []
    for (name, (shape, groups)), dtype, layout, center in product(
        SHAPES.items(), arguments.dtypes, ("contiguous", "channels_last"), arguments.center
    ):
        found = launches(shape, groups, getattr(torch, dtype), layout, CENTERS[center])
        for launch, _, _ in [*found["forward"], *found["backward"]]:
            if launch not in seen:
                seen.add(launch)
                work.append(launch)
                about.append({"shape": name, "dtype": dtype, "layout": layout, "center": center})
    with ProcessPoolExecutor() as pool:
        for arch in arguments.arch:
            for row, code in zip(about, pool.map(compile_launch, work, [arch] * len(work)), strict=True):
                yield {**row, "arch": arch, **asdict(code)}


def inspect_cases(arch: int) -> Iterator[tuple[Case, dict[str, list[tuple[KernelCode, int, int]]]]]:
    """What the default cases of benchmark_op.py launch, weight and bias being of x's type and no tables given."""
    todo = cases(None, None, [torch.bfloat16])
    planned = [launches(case.shape, case.num_groups, case.dtype, case.layout, tables=False) for case in todo]
    every = list(dict.fromkeys(launch for plan in planned for rows in plan.values() for launch, _, _ in rows))
    with ProcessPoolExecutor() as pool:
        codes = dict(zip(every, pool.map(compile_launch, every, [arch] * len(every)), strict=True))
    for case, plan in zip(todo, planned, strict=True):
        yield (
            case,
            {
                direction: [(codes[launch], programs, tiles) for launch, programs, tiles in rows]
                for direction, rows in plan.items()
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities, times 10")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of x")
    parser.add_argument("--center", nargs="+", choices=CENTERS, default=list(CENTERS), help="the operator's argument")
    parser.add_argument("--output", type=Path, help="write what is printed to this JSON file")
    parser.add_argument("--cases", action="store_true", help="the benchmark's cases, for an H100, with predicted times")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"), help="folder of the record of --cases")
    arguments = parser.parse_args()
    if arguments.cases:
        report_cases(arguments.out)
        return
    found = list(inspect_shapes(arguments))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1))
    numbers = ("arch", "registers", "stack", "spills")
    table = Table("kernel", "shape", "dtype", "layout", "center", *numbers, "loads", "stores")
    for row in found:
        moves = (" ".join(f"{n}x{width}" for width, n in row[name].items()) for name in ("loads", "stores"))
        names = ("kernel", "shape", "dtype", "layout", "center", *numbers)
        table.add_row(*(str(row[name]) for name in names), *moves)
    Console(width=180).print(table)


def report_cases(folder: Path) -> None:
    """Print, and write to a record, the kernels of the benchmark's cases and their predicted times."""
    table = Table("case", "MB", "direction", "kernels: programs, registers, warps a multiprocessor, instr./element",
                  "us", "copy", "two passes", "torch.compile")  # fmt: skip
    rows = []
    for case, found in inspect_cases(90):
        compiled = compiled_kernels(case) if torch.cuda.is_available() else {}
        for direction, kernels in found.items():
            p = asdict(predict(kernels, direction, case.tensor_bytes))
            text = "; ".join(
                f"{code.kernel} {programs}, {code.registers}, {code.resident_warps}, "
                f"{code.instructions_per_element:.0f}"
                for code, programs, _ in kernels
            )
            if compiled:
                p["compiled_seconds"] = predict_least(work[1:] for work in compiled[direction])
            times = (
                f"{p[name] * 1e6:.1f}" if name in p else ""
                for name in ("seconds", "copy_seconds", "two_pass_seconds", "compiled_seconds")
            )
            table.add_row(case.label, f"{case.tensor_bytes / 1e6:.1f}", direction, text, *times)
            rows.append(
                {
                    "case": case.label,
                    "direction": direction,
                    "kernels": [
                        {
                            "programs": programs, "tiles": tiles, "resident_warps": code.resident_warps,
                            "instructions_per_element": round(code.instructions_per_element, 1), **asdict(code),
                        }
                        for code, programs, tiles in kernels
                    ],
                    "compiled_kernels": [kernel._asdict() for kernel in compiled.get(direction, ())],
                    "predicted": {name: float(f"{value:.4g}") if isinstance(value, float) else value
                                  for name, value in p.items()},
                }
            )  # fmt: skip
    Console(width=220).print(table)
    about = origin(torch.device("cpu"), "triton") | {"device": "none; compiled for sm_90, times are predictions"}
    path = folder / f"{about['date']}-sm90-kernels.json"
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
