"""Train for an hour at a tiny size and see whether memory, file descriptors, files or the time of a step grow.

python scripts/benchmarks/soak.py [--minutes 60] [--section.key VALUE ...]
python scripts/benchmarks/soak.py --minutes 600 --config configs/cifar10.yaml      # another run, as train.py takes it

train.py runs as a separate process on the embedded images and is watched from outside. By default it is so small and
busy (soak.yaml) that an hour repeats logs, validation, grids, evaluation and checkpoints hundreds of times. The
table has the medians of the second quarter of the time, the first being warm-up, and of the last one.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.table import Table

from common.record import ROOT
from gnunet.checkpoint.jsonl import read_jsonl
from gnunet.config import Config, parse_args, to_yaml
from gnunet.errors import TrainingError, run_cli

ENDLESS = "1e12"
"""Images that no run reaches."""
SAMPLES = 360
SECONDS_TO_STOP = 300
"""How long the run has to write its last checkpoint."""
GROWS = ("metrics.jsonl", "timing.jsonl", "samples")
"""What of a run's folder grows with its images."""


def sample(process: psutil.Process, run: Path) -> dict[str, float]:
    """What the run and its children take at this moment."""
    found = dict.fromkeys(("resident memory, MiB", "file descriptors", "threads", "CPU seconds"), 0.0)
    for one in (process, *process.children(recursive=True)):
        try:
            with one.oneshot():
                numbers = one.memory_info().rss / 2**20, one.num_fds(), one.num_threads(), sum(one.cpu_times()[:2])
        except psutil.Error:  # a child that ends
            if one == process:
                raise
            continue
        found = {name: value + number for (name, value), number in zip(found.items(), numbers, strict=True)}
    sizes = []
    for parent, folders, files in os.walk(run):  # which passes over folders that are gone
        if parent == str(run):
            folders[:] = [name for name in folders if name not in GROWS]
            files = [name for name in files if name not in GROWS]
        for name in files:
            with suppress(OSError):
                sizes.append(os.path.getsize(os.path.join(parent, name)))
    images = read_jsonl(run / "timing.jsonl")[-1]["images"]
    return {**found, "run folder, MiB": sum(sizes) / 2**20, "files in it": len(sizes), "images": images}


def watch(process: subprocess.Popen, run: Path, seconds: float) -> list[dict[str, float]]:
    """Samples from the first line of the log on; fewer where the run ends early."""
    watched, samples = psutil.Process(process.pid), []
    while process.poll() is None and not read_jsonl(run / "timing.jsonl"):
        time.sleep(0.1)
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        with suppress(psutil.Error):  # it ends
            samples.append(sample(watched, run))
        time.sleep(min(max(seconds / SAMPLES, 0.1), max(0.0, end - time.monotonic())))
    return samples


def soak(config: Config, seconds: float, folder: Path) -> list[dict[str, float]]:
    """Train, watch and stop.

    Raises:
        TrainingError: the run has ended early, or with another status than SIGTERM's.
    """
    file, log = folder / "soak.yaml", folder / "train.log"
    file.write_text(to_yaml(config))
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--config", str(file)], stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,  # Ctrl-C is for this process alone
        )  # fmt: skip
    try:
        samples = watch(process, Path(config.run_dir), seconds)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_STOP)
        process.kill()
        process.wait()
    if process.returncode != 128 + signal.SIGTERM:
        last = "\n".join(log.read_text().splitlines()[-20:])
        raise TrainingError(f"train.py has ended with status {process.returncode}; it said:\n{last}")
    return samples


def table(samples: Sequence[dict[str, float]]) -> Table:
    """Each quantity early and late."""
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter + 1], samples[-quarter - 1 :]
    found = Table("", "second quarter", "last quarter", box=None)
    for name in samples[0]:
        if name not in ("CPU seconds", "images"):
            found.add_row(name, *(f"{median(one[name] for one in part):.1f}" for part in (early, late)))
    spent = [[part[-1][name] - part[0][name] for name in ("CPU seconds", "images")] for part in (early, late)]
    found.add_row(
        "CPU time of an image, ms", *(f"{1e3 * cpu / images:.2f}" if images else "-" for cpu, images in spent)
    )
    return found


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=60, help="how long to watch the run (default 60)")
    arguments, flags = parser.parse_known_args(argv)
    if not 0 < arguments.minutes < float("inf"):
        parser.error(f"--minutes {arguments.minutes}: valid: above 0")

    def run() -> int:
        with tempfile.TemporaryDirectory(prefix="gnunet-soak-") as folder:
            own = ["--run_dir", os.path.join(folder, "run"), "--train.total_images", ENDLESS]
            config = parse_args([*flags, *own], default_config=Path(__file__).with_suffix(".yaml"))
            samples = soak(config, 60 * arguments.minutes, Path(folder))
        console = Console(width=100, highlight=False, markup=False)
        console.print(f"{samples[-1]['images']:.0f} images in {arguments.minutes:g} minutes, {len(samples)} samples")
        console.print(table(samples))
        return 0

    return run_cli(run)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without ending the run
    sys.exit(main(sys.argv[1:]))
