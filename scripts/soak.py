"""Train for an hour at a tiny size and see whether memory, file descriptors, files or the time of a step grow.

python scripts/soak.py --out assets/benchmarks/DATE-DEVICE-soak.json    # an hour
python scripts/soak.py --minutes 2 --evaluate.every null                # to see that it works
python scripts/soak.py --minutes 600 --config configs/cifar10.yaml      # another run, as train.py takes it

train.py runs as a process of its own, on the embedded images, and is watched from outside; by default it is so small
and so busy (scripts/soaking/tiny.yaml) that an hour repeats logs, validation, grids, evaluation and checkpoints
hundreds of times. `--section.key VALUE` changes it; its folder and its end are decided here. The first quarter of the
time is warm-up. The rest is cut into windows, and through their medians a line is laid (Theil-Sen, with its 95%
interval). A quantity `grows` where the whole interval is above the quantity's limit, and is `flat` where none of it is;
`open` is an interval too wide to tell, as on a busy machine; a run of a few minutes sees little but what grows until
every part of the loop has run. Of a step the CPU time decides, since other work may share the cores; the time on the
clock and the machine's load are in the record beside it.

Exit status: 0, or 1 where something grows, or 2 where the run ends before its time.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarking.record import ROOT, origin, rounded, write
from gnunet.ablation.history import read_lines
from gnunet.checkpoint.jsonl import without_nan
from gnunet.config import Config, to_yaml
from gnunet.config.cli import parse
from gnunet.errors import TrainingError, run_program
from soaking.trend import judge
from soaking.watch import LOG, QUANTITIES, Sample, Watcher, windows

TINY = Path(__file__).parent / "soaking" / "tiny.yaml"
ENDLESS = "1e12"
"""Images that no soak reaches."""
WINDOWS = 40
WARM_UP = 10
"""Windows that are left out of the trends."""
SAMPLES = 360
"""How many are taken, unless they would be closer than INTERVAL."""
INTERVAL = 0.1
"""The least seconds between samples."""
SECONDS_TO_STOP = 300
"""How long the run has to write its last checkpoint."""


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what it says of the configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=60, help="how long to watch the run (default 60)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON record to write")
    arguments, flags = parser.parse_known_args(argv)
    if not 0 < arguments.minutes < float("inf"):
        parser.error(f"--minutes {arguments.minutes}: valid: above 0")
    return arguments, flags


@contextmanager
def training(config: Config, log: Path) -> Iterator[subprocess.Popen]:
    """train.py as a process, which does not outlive the context."""
    file = log.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--config", str(file)], stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,  # Ctrl-C is for this process alone
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_STOP)
        finally:
            process.kill()
            process.wait()


def watch(process: subprocess.Popen, run: Path, seconds: float) -> list[Sample]:
    """Samples of a run from its first line of the log on, for so many seconds; fewer where it ends before."""
    watched = psutil.Process(process.pid)
    while not read_lines(run / LOG):
        if process.poll() is not None:
            return []
        time.sleep(INTERVAL)
    watcher = Watcher(watched, run)
    interval = max(seconds / SAMPLES, INTERVAL)
    samples: list[Sample] = []
    while process.poll() is None:
        try:
            samples.append(watcher.sample())
        except psutil.Error:  # it ends
            process.wait(SECONDS_TO_STOP)
            break
        done = samples[-1].seconds / seconds
        if done >= 1:
            break
        if int(done * WINDOWS) > int(samples[-2].seconds / seconds * WINDOWS if len(samples) > 1 else -1):
            print(_line(samples[-1]), flush=True)
        time.sleep(interval)
    return samples


def _line(sample: Sample) -> str:
    levels = sample.levels
    return (
        f"{sample.seconds / 60:.1f} min  {sample.images} images  {levels['rss_mib']:.0f} MiB  "
        f"{levels['descriptors']:.0f} descriptors  {levels['folder_mib']:.1f} MiB of files"
    )


def soak(config: Config, seconds: float, log: Path) -> dict[str, Any]:
    """Train and watch; gives what the record says of it.

    Raises:
        TrainingError: the run has ended before its time, or not in good order at its end.
    """
    run = Path(config.run_dir)
    with training(config, log) as process:
        samples = watch(process, run, seconds)
        early = process.poll() is not None
    if early or process.returncode != 128 + signal.SIGTERM:
        when = "before its time" if early else "after SIGTERM"
        last = "\n".join(log.read_text().splitlines()[-20:])
        raise TrainingError(f"train.py has ended {when} with status {process.returncode}; it said:\n{last}")
    seen = windows(samples, read_lines(run / LOG), seconds, WINDOWS)
    watched = [window for window in seen if window["minutes"] * 60 > seconds * WARM_UP / WINDOWS]
    hours = [window["minutes"] / 60 for window in watched]
    trends = [
        {"quantity": name, **judge(quantity, hours, [window[name] for window in watched])}
        for name, quantity in QUANTITIES.items()
    ]
    return {
        "samples": len(samples), "done": done(config, run, samples[-1].images), "trends": trends, "windows": seen
    }  # fmt: skip


def done(config: Config, run: Path, images: int) -> dict[str, int]:
    """How often each part of the loop was run."""
    train, metrics = config.train, (run / "metrics.jsonl").read_text()
    return {
        "images": images,
        "steps": images // train.batch_size,
        "log_lines": metrics.count('"grad_norm"'),
        "validations": metrics.count('"validation_bank"'),
        "evaluations": metrics.count('"evaluation_num_images"'),
        "grids": len(list((run / "samples").glob("*.png"))),
        "checkpoints": images // every if (every := train.checkpoint_every) else 0,  # not counting new best ones
    }


def report(record: Mapping[str, Any]) -> Table:
    """A line for each quantity."""
    table = Table(box=None, pad_edge=False, header_style="none")
    table.add_column(f"{record['minutes']:g} min, {record['done']['steps']} steps")
    for column in ("median", "growth in an hour (95%)", "limit", ""):
        table.add_column(column, justify="right")
    for trend in record["trends"]:
        if trend["slope"] is None:
            growth = "-"
        else:
            growth = "{slope:+.3g} ({low:+.3g} to {high:+.3g}) {slope_unit}".format(**trend)
        median = "-" if trend["median"] is None else f"{trend['median']:.4g} {trend['unit']}"
        limit = "-" if trend["limit"] is None else f"{trend['limit']:g}"
        table.add_row(QUANTITIES[trend["quantity"]].title, median, growth, limit, trend["verdict"] or "not judged")
    return table


def figures(value: Any) -> Any:
    """The same with four significant digits."""
    if isinstance(value, dict):
        return {key: figures(item) for key, item in value.items()}
    if isinstance(value, list):
        return [figures(item) for item in value]
    return rounded(value) if isinstance(value, float) else value


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    arguments, flags = parse_arguments(argv)

    def run() -> int:
        with tempfile.TemporaryDirectory(prefix="gnunet-soak-") as folder:
            own = ["--run_dir", str(Path(folder) / "run"), "--train.images", ENDLESS]
            config = parse([*flags, *own], default_config=TINY)
            found = soak(config, 60 * arguments.minutes, Path(folder) / "train.log")
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        record = figures(
            {
                **origin(device, "diffusers", "accelerate", "numpy", "psutil"), "flags": " ".join(flags),
                "minutes": arguments.minutes, "warm_up_share": WARM_UP / WINDOWS, **found,
            }
        )  # fmt: skip
        Console(width=120, highlight=False, markup=False).print(report(record))
        if arguments.out:
            write(arguments.out, without_nan(record))
            print(f"record: {arguments.out}")
        return int(any(trend["verdict"] == "grows" for trend in record["trends"]))

    return run_program(run)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without ending the run
    sys.exit(main(sys.argv[1:]))
