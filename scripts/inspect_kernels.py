"""Compile the operator's kernels for GPUs that are not here, and read from the machine code what they need.

    python scripts/inspect_kernels.py [--backend cuda triton] [--arch 80 90 100] [--output resources.json]
    python scripts/inspect_kernels.py --cases [--out assets/benchmarks]    # the benchmark's, with predicted times
    python scripts/inspect_kernels.py --chart RECORD.json CHART.png        # draw these

Every launch of forward and backward on the shapes below, or on those of benchmark_op.py, is compiled as it would be on
such a GPU. Printed for each kernel: registers a thread, bytes of stack and of spills, the widths of the loads from and
stores to global memory in bytes, instructions for each element of x, resident warps. For the benchmark's cases a record
is written, with the times that `benchmarking.model` predicts from these numbers; where PyTorch has CUDA, if only the
fake one of scripts/gpu_check, also with the kernels that torch.compile launches, and the least they take.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarking import cuda_code, triton_code
from benchmarking.inductor import compiled_kernels
from benchmarking.model import KernelCode, Work, predict, predict_least
from benchmarking.record import origin
from benchmarking.roofline import draw
from benchmarking.shapes import Case, cases
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


def arguments_of(
    shape: Sequence[int], groups: int, dtype: torch.dtype, layout: str, center: bool = True, tables: bool = True
) -> NormArgs:
    """Arguments of a shape on the meta device; with tables, weight and bias are fp32."""
    with torch.device("meta"):
        x = torch.empty(shape, dtype=dtype)
        if layout == "channels_last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        weight = torch.empty(shape[1], dtype=torch.float32 if tables else dtype)
        table = torch.empty(shape[:2], dtype=dtype) if tables else None
        return NormArgs(x, groups, weight, weight, 1e-5, table, table, table, True, center)


def launches(backend: str, args: NormArgs, arch: int) -> dict[str, list[tuple[Any, Work]]]:
    found: dict[str, list[tuple[Any, Work]]] = (
        cuda_code.launches(args, arch) if backend == "cuda" else triton_code.launches(args)
    )
    return found


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
        for launch, _ in sum(launches(backend, args, arch).values(), []):
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


def inspect_cases(
    todo: Sequence[Case], backends: Sequence[str], arch: int
) -> Iterator[tuple[Case, str, str, list[tuple[KernelCode, Work]]]]:
    """Case, backend, direction and kernels, weight and bias being of x's type and no tables given."""
    planned = {
        (case, backend): launches(
            backend, arguments_of(case.shape, case.num_groups, case.dtype, case.layout, tables=False), arch
        )
        for case in todo
        for backend in backends
    }  # fmt: skip
    every = list(
        dict.fromkeys(
            (backend, launch, arch)
            for (_, backend), plan in planned.items()
            for rows in plan.values()
            for launch, _ in rows
        )
    )
    with ProcessPoolExecutor() as pool:
        codes = dict(zip(every, pool.map(compile_launch, every), strict=True))
    for (case, backend), plan in planned.items():
        for direction, rows in plan.items():
            if rows:
                yield case, backend, direction, [(codes[backend, launch, arch], work) for launch, work in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="whose kernels")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities, times 10")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of x")
    parser.add_argument("--center", nargs="+", choices=CENTERS, default=list(CENTERS), help="the operator's argument")
    parser.add_argument("--output", type=Path, help="write what is printed to this JSON file")
    parser.add_argument("--cases", action="store_true", help="the benchmark's cases, for an H100, with predicted times")
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks"), help="folder of the record of --cases")
    parser.add_argument("--chart", nargs=2, type=Path, metavar=("RECORD", "CHART"), help="only draw a record's chart")
    arguments = parser.parse_args()
    if arguments.chart:
        draw(json.loads(arguments.chart[0].read_text()), arguments.chart[1])
        return
    if arguments.cases:
        report_cases(arguments.out, arguments.backend)
        return
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


def report_cases(folder: Path, backends: Sequence[str]) -> None:
    """Print, and write to a record, the kernels of the benchmark's cases and their predicted times."""
    table = Table("case", "MB", "direction", "backend", "kernels: programs, registers, warps a multiprocessor, "
                  "instr./element", "us", "of a copy", "two passes", "torch.compile")  # fmt: skip
    todo = cases(None, None, [torch.bfloat16])
    compiled = {case: compiled_kernels(case) for case in todo if torch.cuda.is_available()}
    rows = []
    for case, backend, direction, kernels in inspect_cases(todo, backends, 90):
        prediction = predict(kernels, direction, case.tensor_bytes)
        numbers = {**asdict(prediction), "share_of_copy": prediction.share_of_copy}
        text = "; ".join(
            f"{code.kernel} {work.programs}, {code.registers}, {code.resident_warps}, "
            f"{code.instructions_per_element:.0f}"
            for code, work in kernels
        )
        if case in compiled:
            numbers["compiled_seconds"] = predict_least(work[1:] for work in compiled[case][direction])
        times = [f"{prediction.seconds * 1e6:.1f}", f"{prediction.share_of_copy:.2f}"]
        times += [
            f"{numbers[name] * 1e6:.1f}" if name in numbers else "" for name in ("two_pass_seconds", "compiled_seconds")
        ]
        megabytes = f"{case.tensor_bytes / 1e6:.1f}"
        table.add_row(case.label, megabytes, direction, backend, text, *times)
        rows.append(
            {
                "case": case.label,
                "samples": case.shape[0],
                "tensor_bytes": case.tensor_bytes,
                "direction": direction,
                "backend": backend,
                "kernels": [
                    {
                        **asdict(work), "resident_warps": code.resident_warps,
                        "instructions_per_element": round(code.instructions_per_element, 1), **asdict(code),
                    }
                    for code, work in kernels
                ],
                "compiled_kernels": [kernel._asdict() for kernel in compiled.get(case, {}).get(direction, ())],
                "predicted": {name: float(f"{value:.4g}") if isinstance(value, float) else value
                              for name, value in numbers.items()},
            }
        )  # fmt: skip
    Console(width=220).print(table)
    bars = bars_of(rows)
    for name, value in bars.items():
        print(f"{name}: {value}")
    about = origin(torch.device("cpu"), "triton") | {"device": "none; compiled for sm_90, times are predictions"}
    path = folder / f"{about['date']}-sm90-kernels.json"
    path.write_text(json.dumps({**about, "bars": bars, "rows": rows}, indent=1) + "\n")
    print(path)


def bars_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What is asked of the kernels in CUDA C++ at up to 32 samples: their share of a copy, where all is read once."""
    found: dict[str, float] = {}
    for direction, bar in (("forward", 0.75), ("backward", 0.65)):
        shares = [
            row["predicted"]["share_of_copy"]
            for row in rows
            if row["backend"] == "cuda" and row["direction"] == direction
            if row["kernels"][0]["held"] == 1 and row["samples"] <= 32
        ]
        if shares:
            mean = exp(sum(map(log, shares)) / len(shares))
            found[f"cuda {direction}: predicted share of a copy, geometric mean of {len(shares)}, >= {bar}"] = round(
                mean, 3
            )
            found[f"cuda {direction}: the same, least, >= 0.55"] = round(min(shares), 3)
    found["spills"] = sum(kernel["spills"] for row in rows for kernel in row["kernels"] if row["backend"] == "cuda")
    return found


if __name__ == "__main__":
    main()
