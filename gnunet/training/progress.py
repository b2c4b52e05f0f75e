"""Progress on the main rank: log lines and, on a terminal, a bar below them."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_DECODING_INTERVAL = 5  # seconds
_WORKING_INTERVAL = 30  # seconds


def decode_progress() -> Callable[[int, int], None]:
    """For `load_images`: prints how many images are decoded, now and then; nothing if that is soon done."""
    console, last = Console(highlight=False, soft_wrap=True), time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _DECODING_INTERVAL:
            last = now
            console.print(f"decoding images {done}/{total}; later runs read them from the cache", markup=False)

    return show


class Display:
    """Progress of one run from `images` to `total` images seen; prints nothing unless `enabled`."""

    def __init__(self, *, images: int, total: int, enabled: bool) -> None:
        self._console = Console(highlight=False, soft_wrap=True, quiet=not enabled)
        self._total, self._last_line = total, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TextColumn("images"),
            TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self._console, speed_estimate_period=300, expand=True,
            disable=not (enabled and self._console.is_terminal),
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=total, completed=images, loss="?")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        self._console.print(text, markup=False)

    def log(self, images: int, values: dict[str, str]) -> None:
        """Print values at `images` images seen as one line, with the time left."""
        text = "  ".join(f"{name} {value}" for name, value in values.items())
        remaining = self._bar.tasks[0].time_remaining
        left = "" if remaining is None else f"  left {remaining:.0f} s"
        self.message(f"images {images}/{self._total}  {text}{left}")

    def step(self, images: int, loss: float) -> None:
        self._bar.update(self._task, completed=min(images, self._total), loss=f"{loss:.5f}")

    def set_status(self, text: str) -> None:
        """Name in front of the bar what the run does: "training", "validating", "sampling"."""
        self._bar.update(self._task, description=text)

    def progress(self, what: str, done: int, total: int) -> None:
        """Show the progress of something long: in front of the bar, without one by a line every 30 seconds."""
        self.set_status(text := f"{what} {done}/{total}")
        if self._bar.disable and time.monotonic() - self._last_line >= _WORKING_INTERVAL:
            self._last_line = time.monotonic()
            self.message(text)
