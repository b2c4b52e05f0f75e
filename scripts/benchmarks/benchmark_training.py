"""Compare gnunet's training loop with diffusers' UNet2DModel driven as its train_unconditional.py drives it.

python scripts/benchmarks/benchmark_training.py [--cases small cifar10] [--rounds 30] [--out assets/benchmarks]

All sides train the same architecture on the same images with DDPM's noise prediction, AdamW, gradient clipping and a
moving average, in one process, in alternating blocks of steps whose order changes from round to round. A side's loop
is the whole of it: loader, step, average, logging. Apart from that, gnunet's own share of a step and the speed of its
loader are measured, in the small case. `_compiled` is a side with its network compiled by torch.compile: that is done
before the rounds, its seconds are reported apart, and a side whose gradients are then not the eager ones is not timed.
The other sides are timed by themselves first, at every batch size, and then with the compiled ones; the record is
rewritten after each side. Reported are the medians over the rounds, the median of the rounds' ratios (of gnunet's
sides to each of diffusers'), the bytes autograd saves for backward (each storage once, parameters left out) and the
peak of the memory a step allocates.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from common.loops import COMPILED, GRADIENT_TOLERANCE, SIDES, Loop, compile_loop, make_loop
from common.overhead import framework_overhead
from common.program import run
from common.record import ROOT, failure, origin, record_path, rounded, target, verdict, write
from common.timing import alternate_repeats
from gnunet.config import Config, parse_args
from gnunet.environment import activation_bytes
from gnunet.errors import GnunetError

CASES = {
    "small": ["--config", str(ROOT / "configs/noto_portraits32.yaml")],
    "cifar10": [
        "--config", str(ROOT / "configs/cifar10.yaml"), "--data.source", "noto_emoji", "--model.dropout", "0",
        "--train.batch_size", "8",
    ],
}  # fmt: skip
"""What is trained, as arguments of train.py; the images are the embedded ones in every case."""
COMMON = [
    "--data.class_conditional", "false", "--data.num_workers", "0", "--diffusion.kind", "ddpm",
    "--train.total_images", "1e9", "--train.warmup_images", "0", "--train.lr_schedule", "constant",
    "--train.learning_rate", "1e-4", "--train.optimizer", "adamw",
]  # fmt: skip
OURS = tuple(side for side in SIDES if side.startswith("gnunet"))
PEERS = tuple(side for side in SIDES if side not in OURS)
TARGETS = {"diffusers": 1.3, "diffusers_compiled": 1.0}
"""The least ratios of speeds aimed at, for cifar10 in bf16 on a GPU."""
TARGET_BATCH_SIZES = (8, 128)
OWN_CASE = "small"
"""The case with the default configuration's network and images, of which gnunet's own share and loader are judged."""
LEAST_SHARE = 0.98
"""The least share of a step aimed at for forward, backward and optimizer."""
LEAST_EXAMPLES = 8000
"""The least examples a second aimed at for the loader alone, with two processes."""
WARM_UP_STEPS = 2
"""Steps after those whose memory is measured and before timing starts; a CUDA graph is captured in them."""


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The most memory that one step holds beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def prepare(side: str, config: Config, folder: Path) -> tuple[Loop | None, dict[str, Any]]:
    """A side warmed up, or None where it fails or its gradients are wrong; and what is known before it is timed."""
    result: dict[str, Any] = {"status": "right"}
    try:
        loop = make_loop(side, config, folder)
        result["parameters"] = sum(p.numel() for p in loop.network.parameters())
        if side.endswith(COMPILED):
            seconds, error = compile_loop(loop)
            result |= {"compile_seconds": rounded(seconds), "gradient_error": rounded(error)}
            if not error <= GRADIENT_TOLERANCE[config.train.mixed_precision]:
                return None, result | {"status": "wrong"}
        loop.step()
        with torch.compiler.set_stance("fail_on_recompile"):
            result["saved_for_backward_mib"] = rounded(activation_bytes(loop.step, loop.network.parameters()) / 2**20)
            result["peak_of_a_step_mib"] = rounded(peak_bytes(loop.step, loop.device) / 2**20)
            loop.seconds(WARM_UP_STEPS)
    except Exception as error:  # one failure does not stop the others
        return None, result | {"status": failure(error)}
    return loop, result


def compare(config: Config, sides: Sequence[str], rounds: int, block: int) -> Iterator[dict[str, Any]]:
    """Prepare and time sides of one case; yield its record after each side and after the rounds.

    Args:
        sides: names in SIDES.
        rounds: at least 2.
        block: steps of a side in a round.
    """
    torch.compiler.reset()  # every case is compiled for its own shapes
    record: dict[str, Any] = {}
    loops: dict[str, Loop] = {}
    with tempfile.TemporaryDirectory() as root:
        for side in sides:
            folder = Path(root) / side
            folder.mkdir()
            loop, record[side] = prepare(side, config, folder)
            if loop:
                loops[side] = loop
            yield record
        with torch.compiler.set_stance("fail_on_recompile"):
            times = alternate_repeats(loops, dict.fromkeys(loops, block), rounds)
    for side, seconds in times.items():
        rates = [config.train.batch_size / one for one in seconds]
        record[side]["images_per_second"] = rounded(statistics.median(rates))
        record[side]["images_per_second_quartiles"] = quartiles(rates)

    def speeds(ours: str, peer: str) -> list[float]:
        return [theirs / mine for mine, theirs in zip(times[ours], times[peer], strict=True)]

    record["speed_ratio"] = each_pair(times, lambda ours, peer: rounded(statistics.median(speeds(ours, peer))))
    record["speed_ratio_quartiles"] = each_pair(times, lambda ours, peer: quartiles(speeds(ours, peer)))
    for key in ("saved_for_backward", "peak_of_a_step"):
        sizes = {side: record[side][f"{key}_mib"] for side in times}
        record[f"{key}_ratio"] = each_pair(sizes, lambda ours, peer, of=sizes: rounded(of[ours] / of[peer]))
    yield record


def measure(name: str, config: Config, sides: Sequence[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what is known of a case while its sides are compared, and gnunet's own work in OWN_CASE."""
    try:
        yield from compare(config, sides, arguments.rounds, arguments.block)
        if name == OWN_CASE and "gnunet" in sides and not any(side.endswith(COMPILED) for side in sides):
            with tempfile.TemporaryDirectory() as folder:
                yield framework_overhead(config, Path(folder), arguments.rounds)
    except Exception as error:  # one failure does not stop the others
        yield {"failed": failure(error)}


def merge(into: dict[str, Any], found: dict[str, Any]) -> None:
    """Update a record, and dictionaries in it likewise, so that what is not measured again stays."""
    for key, value in found.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def each_pair(sides: Container[str], value: Callable[[str, str], Any]) -> dict[str, dict[str, Any]]:
    """A value for each of gnunet's sides and each of diffusers'."""
    return {ours: {peer: value(ours, peer) for peer in PEERS if peer in sides} for ours in OURS if ours in sides}


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third."""
    return [rounded(value) for value in statistics.quantiles(values, n=4)[::2]]


def targets(cases: Sequence[dict[str, Any]], sides: Sequence[str]) -> list[dict[str, Any]]:
    """What is aimed at for the cases that are planned, which are taken to be in bf16 and on a GPU."""
    return [
        target(f"{mine} over {peer}, batch {case['batch_size']}", speed_ratio(case, mine, peer), least)
        for case in cases
        if case["case"] == "cifar10" and case["batch_size"] in TARGET_BATCH_SIZES
        for mine in OURS
        for peer, least in TARGETS.items()
        if mine in sides and peer in sides
    ]


def speed_ratio(case: dict[str, Any], ours: str, peer: str) -> float | None:
    return case.get("speed_ratio", {}).get(ours, {}).get(peer)


def own_targets(cases: Sequence[dict[str, Any]], sides: Sequence[str]) -> list[dict[str, Any]]:
    """What is aimed at for gnunet's own share of a step and its loader, on any device."""
    aims = []
    for case in cases:
        if case["case"] == OWN_CASE and "gnunet" in sides:
            share, speed = case.get("overhead_share"), case.get("loader_examples_per_second")
            share, batch = None if share is None else rounded(1 - share), f"batch {case['batch_size']}"
            aims += [
                target(f"share of a step in forward, backward and optimizer, {batch}", share, LEAST_SHARE),
                target(f"examples/s of the loader alone, {batch}", speed, LEAST_EXAMPLES),
            ]
    return aims


def print_case(case: dict[str, Any]) -> None:
    """A line for each side."""
    sides = [side for side in SIDES if side in case]
    ratios, quartiles = case.get("speed_ratio", {}), case.get("speed_ratio_quartiles", {})
    table = Table(f"{case['case']}, batch {case['batch_size']}", box=None, pad_edge=False, header_style="none")
    columns = ["images/s (quartiles)", *(f"over {peer} (quartiles)" for peer in PEERS if peer in sides)]
    for column in (*columns, "saved MiB", "peak MiB", "compile s", "gradient error"):
        table.add_column(column, justify="right")
    for side in sides:
        result = case[side]
        cells = [_spread(result.get("images_per_second"), result.get("images_per_second_quartiles"))]
        for peer in PEERS:
            if peer in sides:
                cells.append(_spread(ratios.get(side, {}).get(peer), quartiles.get(side, {}).get(peer)))
        for key in ("saved_for_backward_mib", "peak_of_a_step_mib", "compile_seconds", "gradient_error"):
            cells.append(f"{result[key]:g}" if key in result else "-")
        table.add_row(side, *cells)
    console = Console(width=140, highlight=False, markup=False)
    console.print(table)
    if "overhead_share" in case:
        share, speed = case["overhead_share"], case["loader_examples_per_second"]
        console.print(f"gnunet's own work: {share:.2%} of a step; its loader alone: {speed:g} examples/s")
    for side in sides:
        if case[side]["status"] != "right":
            console.print(f"{side}: {case[side]['status']}")
    if "failed" in case:
        console.print(case["failed"])


def _spread(value: float | None, quartiles: list[float] | None) -> str:
    return "-" if value is None else f"{value:g} ({quartiles[0]:g} to {quartiles[1]:g})"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the defaults that depend on the device, and the `configs` it asks for, by case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch_sizes", nargs="+", type=int, help="each in turn, instead of the cases' own")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="default all; on a CPU those not compiled")
    parser.add_argument("--rounds", type=int, default=30, help="of a block of every side, at least 2 (default 30)")
    parser.add_argument("--block", type=int, default=4, help="steps in a block (default 4)")
    parser.add_argument("--precision", choices=tuple(GRADIENT_TOLERANCE), default="no")
    parser.add_argument("--out", type=Path, help="folder to write DATE-DEVICE-RECORD.json to")
    parser.add_argument("--record", default="training", help="what the record is called (default training)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2 or arguments.block < 1:
        parser.error(f"--rounds {arguments.rounds} --block {arguments.block}: valid: at least 2 and at least 1")
    eager = [side for side in SIDES if not side.endswith(COMPILED)]
    arguments.sides = arguments.sides or (list(SIDES) if torch.cuda.is_available() else eager)
    try:
        arguments.configs = [
            (case, config)
            for case in arguments.cases
            for config in configs_of(case, arguments.precision, arguments.batch_sizes)
        ]
    except GnunetError as error:
        parser.error(str(error))
    return arguments


def configs_of(case: str, precision: str, batch_sizes: Sequence[int] | None) -> Iterator[Config]:
    """A case's configuration at each batch size, or at its own.

    Raises:
        ConfigError: a batch size that is not valid.
    """
    flags = [*CASES[case], *COMMON, "--train.mixed_precision", precision]
    for size in batch_sizes or (None,):
        sized = flags if size is None else [*flags, "--train.batch_size", str(size)]
        yield parse_args(sized, default_config=ROOT / "configs/noto_portraits32.yaml")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases, print tables, write the record. Fails where a side of gnunet's does."""
    arguments = parse_arguments(argv)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    cases = [{"case": case, "batch_size": config.train.batch_size} for case, config in arguments.configs]
    path = None if arguments.out is None else record_path(arguments.out, device, arguments.record)
    head = {
        **origin(device, "triton", "diffusers", "accelerate"), "precision": arguments.precision,
        "rounds": arguments.rounds, "block": arguments.block,
    }  # fmt: skip
    aims: list[dict[str, Any]] = []

    def update() -> None:
        aims[:] = own_targets(cases, arguments.sides)
        if device.type == "cuda" and arguments.precision == "bf16":
            aims.extend(targets(cases, arguments.sides))
        if path is not None:
            write(path, {**head, "targets": aims, "cases": cases})

    update()
    eager = [side for side in arguments.sides if not side.endswith(COMPILED)]
    for sides in [arguments.sides] if eager in ([], arguments.sides) else [eager, arguments.sides]:
        for (name, config), case in zip(arguments.configs, cases, strict=True):
            case.pop("failed", None)
            for found in measure(name, config, sides, arguments):
                merge(case, found)
                update()
            print_case(case)
    for aim in aims:
        print(verdict(aim))
    if path is not None:
        print(f"record: {path}")
    ours = [case[side]["status"] for case in cases for side in OURS if side in case]
    if any("failed" in case for case in cases) or set(ours) - {"right"}:
        sys.exit("a side of gnunet's failed or is wrong: see above")


if __name__ == "__main__":
    run(main)
