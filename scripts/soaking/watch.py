"""A training run as it is seen from outside: the memory, descriptors and time that it takes, sample by sample."""

import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from gnunet.ablation.history import read_lines
from soaking.trend import Quantity

QUANTITIES = {
    "rss_mib": Quantity("resident memory", "MiB", 8),
    "uss_mib": Quantity("memory of its own", "MiB", 8),
    "logged_mib": Quantity("memory in timing.jsonl", "MiB", 8),
    "descriptors": Quantity("file descriptors", "", 2),
    "threads": Quantity("threads", "", 2),
    "processes": Quantity("processes", "", 2),
    "folder_mib": Quantity("run folder", "MiB", 1),
    "folder_files": Quantity("files in it", "", 2),
    "cpu_ms": Quantity("CPU time of an image", "ms", 5, relative=True),
    "wall_ms": Quantity("time of an image", "ms", None, relative=True),
}
"""What is judged. Memory, descriptors and threads are of all the run's processes together; the run folder is without
its logs and grids, which grow; CPU time is of all that the run does, and `wall_ms` of its steps alone."""
LOG = "timing.jsonl"
"""The log, in a run's folder, of images seen, speed and memory."""
GROWS = ("metrics.jsonl", LOG, "samples")
"""What of a run's folder grows with its images."""


@dataclass(frozen=True)
class Sample:
    """A run at one moment."""

    seconds: float
    """Since the first sample."""
    images: int
    """Images seen, by the last line of the log."""
    cpu_seconds: float
    """User and system time of all processes so far."""
    load: float
    """The machine's load average over a minute."""
    levels: dict[str, float]
    """What of QUANTITIES can be read at a moment."""


class Watcher:
    """Takes samples of a run.

    Args:
        process: the one that trains.
        run: its folder, whose timing.jsonl has a line.
    """

    def __init__(self, process: psutil.Process, run: Path) -> None:
        self.process, self.run = process, run
        self._start = time.monotonic()

    def sample(self) -> Sample:
        """Raises psutil.Error where the process has ended."""
        totals: Counter[str] = Counter()
        for process in (self.process, *self.process.children(recursive=True)):
            try:
                totals.update(_of_process(process))
            except psutil.Error:  # a child that ends
                if process == self.process:
                    raise
        cpu_seconds = totals.pop("cpu_seconds")
        return Sample(
            seconds=time.monotonic() - self._start, images=read_lines(self.run / LOG)[-1]["images"],
            cpu_seconds=cpu_seconds, load=os.getloadavg()[0], levels={**totals, **of_folder(self.run)},
        )  # fmt: skip


def _of_process(process: psutil.Process) -> dict[str, float]:
    with process.oneshot():
        memory, times = process.memory_full_info(), process.cpu_times()
        return {
            "rss_mib": memory.rss / 2**20, "uss_mib": memory.uss / 2**20, "descriptors": process.num_fds(),
            "threads": process.num_threads(), "processes": 1, "cpu_seconds": times.user + times.system,
        }  # fmt: skip


def of_folder(run: Path) -> dict[str, float]:
    """Size and number of a run's files, without what grows and what is removed meanwhile."""
    sizes = []
    for parent, folders, files in os.walk(run):  # which passes over folders that are gone
        if parent == str(run):
            folders[:] = [name for name in folders if name not in GROWS]
            files = [name for name in files if name not in GROWS]
        for name in files:
            with suppress(OSError):
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
    return {"folder_mib": sum(sizes) / 2**20, "folder_files": len(sizes)}


def windows(
    samples: Sequence[Sample], lines: Sequence[dict[str, Any]], seconds: float, count: int
) -> list[dict[str, Any]]:
    """What was seen in each of `count` equal parts of `seconds`; those in which no sample was taken are left out.

    Samples fall on any part of the loop, so that a window has the medians of its levels. Its times are means over the
    images that the log has come to know in it, NaN where there are none: the next window then has them.

    Args:
        samples: in order.
        lines: of the run's timing.jsonl.
    """
    found = []
    before = samples[0]  # the last sample that the times were counted up to
    grouped = itertools.groupby(samples, lambda sample: min(int(sample.seconds / seconds * count), count - 1))
    for number, group in ((number, list(group)) for number, group in grouped):
        last = group[-1]
        images = last.images - before.images
        logged = [line for line in lines if before.images < line["images"] <= last.images]
        speeds = [line["images_per_second"] for line in logged if line["images_per_second"]]
        found.append(
            {
                "minutes": (number + 0.5) * seconds / count / 60,
                "images": last.images,
                **{name: median(sample.levels[name] for sample in group) for name in last.levels},
                "logged_mib": median(line["memory_mib"] for line in logged) if logged else math.nan,
                "cpu_ms": 1e3 * (last.cpu_seconds - before.cpu_seconds) / images if images else math.nan,
                "wall_ms": 1e3 / median(speeds) if speeds else math.nan,
                "load": median(sample.load for sample in group),
            }
        )
        if images:
            before = last
    return found
