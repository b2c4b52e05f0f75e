"""Compare the fused GroupNorm+SiLU operator with PyTorch (eager and compiled), Apex and Liger.

python scripts/benchmarks/benchmark_op.py [--shapes sd15 vae512/256@512] [--dtypes bfloat16] [--out assets/benchmarks]
python scripts/benchmarks/benchmark_op.py --chart RECORD.json CHART.png

Every contender is first compared with float64; one that is wrong is reported and not timed. The others are timed in one
process, in rounds of alternating order: forward without gradients, backward (of x, weight and bias), and both. On a GPU
each is captured in a CUDA graph and timed by events, over enough sets of random inputs that none is in L2 when its turn
comes ("us"); small tensors also with one set ("warm_us") and as Python calls them ("call_us"). Reported are medians
over the rounds, the share of a large copy's bandwidth at minimum bytes, the median of the rounds' ratios of each peer's
time to the operator's, and errors. On a CPU shapes are shrunk and caches warm. Weight and bias have
x's dtype; autocast is off.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from common.case import Benchmark
from common.peers import PEERS
from common.program import run
from common.record import origin, record_path, rounded, write
from common.shapes import LAYOUTS, SHAPES, Case, cases
from common.summary import OURS, draw_chart, geometric_means, is_right, is_timed, print_summary, targets
from common.timing import ROUNDS
from gnunet.ops import backend_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the defaults that depend on the device, and the cases it asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shapes", nargs="+", help="families, FAMILY/CHANNELS@SIZE or full names (default: a choice)")
    which.add_argument("--all", action="store_true", help="every shape there is a name for")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default bfloat16; on a CPU float32")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default channels_last, and some in both")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default all; on a CPU all but compile")
    parser.add_argument("--backend", choices=backend_names(), default="auto", help="the operator's (default auto)")
    parser.add_argument("--seconds_per_case", type=float, help="of timing; default 1, on a CPU 0.1")
    parser.add_argument("--time_limit", type=float, help="seconds after which no case is begun but the first")
    parser.add_argument("--check_first", type=int, metavar="N", help="check every case in N processes, then time them")
    parser.add_argument("--check_only", action="store_true", help="time nothing")
    parser.add_argument("--max_elements", type=int, help="shrink larger shapes; default on a CPU 65536")
    parser.add_argument("--out", type=Path, help="folder to write DATE-DEVICE-RECORD.json to")
    parser.add_argument("--record", default="operator", help="what the record is called (default operator)")
    parser.add_argument("--chart", nargs=2, type=Path, metavar=("RECORD", "PNG"), help="only draw a record's chart")
    arguments = parser.parse_args(argv)
    is_cpu = arguments.device == "cpu"
    if not is_cpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; --device cpu runs shrunk shapes")
    arguments.dtypes = arguments.dtypes or ["float32" if is_cpu else "bfloat16"]
    arguments.peers = arguments.peers or [peer for peer in PEERS if not (is_cpu and peer == "compile")]
    arguments.seconds_per_case = arguments.seconds_per_case or (0.1 if is_cpu else 1.0)
    arguments.max_elements = arguments.max_elements or (2**16 if is_cpu else None)
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    try:
        shapes = list(SHAPES) if arguments.all else arguments.shapes
        arguments.cases = cases(shapes, arguments.layouts, dtypes, arguments.max_elements)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases; the record, if there is a folder for it, is rewritten after each one."""
    start, device = time.monotonic(), torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    todo = arguments.cases
    path = None if arguments.out is None else record_path(arguments.out, device, arguments.record)
    benchmark = Benchmark(device, arguments.peers, arguments.backend, arguments.seconds_per_case)
    record = {
        **origin(device, "triton", "apex", "liger_kernel"),
        "backend": arguments.backend, "rounds": ROUNDS, "seconds_per_case": arguments.seconds_per_case,
        "max_elements": arguments.max_elements, "cache_bytes": benchmark.cache_bytes,
    }  # fmt: skip
    done: dict[str, dict[str, Any]] = {}

    def update(result: dict[str, Any] | None = None) -> None:
        if result is not None:
            done[result["label"]] = result
        cases = [done[case.label] for case in todo if case.label in done]
        record.update(
            total_seconds=rounded(time.monotonic() - start),
            geometric_means=geometric_means(cases, arguments.peers),
            targets=targets(cases, len(todo), arguments.peers) if device.type == "cuda" else [],
            not_run=[case.label for case in todo if case.label not in done or not is_timed(done[case.label])],
            cases=cases,
        )
        if path is not None:
            write(path, record)

    update()
    if arguments.check_first or arguments.check_only:
        for result in checked(arguments, benchmark):
            update(result)
            print(f"checked {len(done)}/{len(todo)} {result['label']}: {result['results'][OURS]['status']}", flush=True)
    # A case that failed comes last, since an error of CUDA would spoil this process for the others.
    todo_in_order = sorted(todo, key=lambda case: case.label in done and not is_right(done[case.label]))
    for number, case in enumerate([] if arguments.check_only else todo_in_order):
        if number and arguments.time_limit and time.monotonic() - start > arguments.time_limit:
            break
        try:
            record["copy_gb_per_s"] = rounded(benchmark.bandwidth / 1e9)
            update(benchmark.run(case))
        except Exception as error:
            update(benchmark.failed(case, error))
        print(f"{number + 1}/{len(todo)} {case.label}", flush=True)
    return record


def checked(arguments: argparse.Namespace, benchmark: Benchmark) -> Iterator[dict[str, Any]]:
    """Yield the cases' records without times. Several processes check them, whose kernels are found compiled later."""
    count = arguments.check_first or os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    idle: list[ProcessPoolExecutor] = []  # each of one process, which is replaced after an error

    def check(case: Case) -> dict[str, Any]:
        pool = idle.pop() if idle else ProcessPoolExecutor(1, spawn)
        try:
            result = pool.submit(check_case, benchmark.device, benchmark.peers, benchmark.backend, case).result()
        except Exception as error:
            result = benchmark.failed(case, error)
        if is_right(result):
            idle.append(pool)
        else:
            pool.shutdown(wait=False)
        return result

    with ThreadPoolExecutor(count) as threads:
        for future in as_completed([threads.submit(check, case) for case in arguments.cases]):
            yield future.result()
    for pool in idle:
        pool.shutdown()


def check_case(device: torch.device, peers: Sequence[str], backend: str, case: Case) -> dict[str, Any]:
    """The record of one case without times. Its memory on the device is released."""
    torch._inductor.config.compile_threads = 1  # several processes compile at a time
    torch._inductor.config.autotune_local_cache = False  # of timings that other processes disturb
    try:
        return Benchmark(device, peers, backend, seconds=0).run(case, with_times=False)
    finally:
        if device.type == "cuda":
            with suppress(RuntimeError):  # after an error of CUDA
                torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases, print a table, write the record; or draw a record's chart. Fails where the operator is wrong."""
    arguments = parse(argv)
    if arguments.chart:
        draw_chart(json.loads(arguments.chart[0].read_text()), arguments.chart[1])
        return
    record = measure(arguments)
    print_summary(record)
    if arguments.out:
        print(f"record: {record_path(arguments.out, torch.device(arguments.device), arguments.record)}")
    if not all(map(is_right, record["cases"])):
        sys.exit("the operator failed or is wrong: see above")


if __name__ == "__main__":
    run(main)
