"""Progress on the main rank: log lines and, on a terminal, a bar below them."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gnunet.errors import Output

_DECODING_INTERVAL = 5  # seconds
_LINE_INTERVAL = 30  # seconds, without a bar
_ESTIMATE_AFTER = 5  # seconds of training
_LONG = 600  # seconds


def _console(*, quiet: bool = False) -> Console:
    return Console(file=Output(sys.stdout), highlight=False, soft_wrap=True, quiet=quiet)  # type: ignore[arg-type]


def format_duration(seconds: float) -> str:
    """A duration to about two digits: 40 s, 12 min, 1 h 20 min, 3 days 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def decode_progress(what: str = "decoding") -> Callable[[int, int], None]:
    """For `load_images`: prints how many images are decoded, now and then; nothing if that is soon done."""
    console, last = _console(), time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _DECODING_INTERVAL:
            last = now
            console.print(f"{what} images {done}/{total}; later runs read them from the cache", markup=False)

    return show


class Display:
    """Progress of one run from `images` to `total` images seen; prints nothing unless `enabled`."""

    def __init__(self, *, images: int, total: int, enabled: bool) -> None:
        self._console = _console(quiet=not enabled)
        self._total, self._last_line = total, time.monotonic()
        self._first_step: float | None = None
        self._newest_step: tuple[int, str] | None = None
        parts = (
            TextColumn("{task.completed}/{task.total} images, loss {task.fields[loss]}, left"),
            TimeRemainingColumn(),
        )
        wide = (BarColumn(20),) if self._console.width >= 80 else ()
        self._bar = Progress(
            TextColumn("{task.description}"), *wide, *parts, console=self._console, get_time=time.monotonic,
            speed_estimate_period=300, transient=True, disable=not (enabled and self._console.is_interactive),
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=total, completed=images, loss="?")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(text, markup=False)

    def announce(self, text: str) -> None:
        """Print a message at once, in a signal handler, where a buffered stream may be in use."""
        if not self._console.quiet:
            # The line of the bar is cleared, and the cursor shown that the bar hides: the process may be about to end.
            line = f"{text}\n" if self._bar.disable else f"\r\x1b[2K\x1b[?25h{text}\n"
            with contextlib.suppress(OSError, ValueError, AttributeError):  # no such stream
                os.write(sys.__stdout__.fileno(), line.encode())

    def log(self, images: int, values: dict[str, str]) -> None:
        """Print values at `images` images seen as one line, with the time left."""
        text = "  ".join(f"{name} {value}" for name, value in values.items())
        remaining = self._bar.tasks[0].time_remaining
        left = "" if remaining is None else f"  left {format_duration(remaining)}"
        self.message(f"images {images}/{self._total}  {text}{left}")

    def step(self, images: int, loss: float | None) -> None:
        """Show the images seen and the mean loss since the last log line, if it is known."""
        text, now = "?" if loss is None else f"{loss:.5f}", time.monotonic()
        self._bar.update(self._task, completed=min(images, self._total), loss=text)
        self._first_step = self._first_step or now
        # The time remaining goes over a thousand steps: it is not computed at each.
        is_due = self._first_step < now - _ESTIMATE_AFTER
        if is_due and (remaining := self._bar.tasks[0].time_remaining) is not None:
            self._first_step = math.inf
            if remaining > _LONG:
                self.message(
                    f"about {format_duration(remaining)} for {self._total - images} images; "
                    "Ctrl-C stops with a checkpoint, and the same command resumes"
                )
        self._newest_step = images, text

    def set_status(self, text: str) -> None:
        """Name in front of the bar what the run does: "training", "validating", "sampling"; without a bar, print a line
        about the newest step every 30 seconds."""
        self._bar.update(self._task, description=text)
        if self._bar.disable and self._newest_step and time.monotonic() - self._last_line >= _LINE_INTERVAL:
            images, loss = self._newest_step
            self.log(images, {"loss": loss})

    def progress(self, what: str, done: int, total: int) -> None:
        """Show the progress of something long: in front of the bar, without one by a line every 30 seconds."""
        self._bar.update(self._task, description=(text := f"{what} {done}/{total}"))
        if self._bar.disable and time.monotonic() - self._last_line >= _LINE_INTERVAL:
            self.message(text)
