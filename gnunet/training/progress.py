"""What a run shows: a live view on a terminal, plain lines elsewhere, nothing on other ranks."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_DECODING_INTERVAL = 5  # seconds
_WORKING_INTERVAL = 30  # seconds


def decode_progress() -> Callable[[int, int], None]:
    """For `load_images`: a line now and then, from the one process that decodes; none if that is soon done."""
    console, last = Console(highlight=False, soft_wrap=True), time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _DECODING_INTERVAL:
            last = now
            console.print(f"decoding images {done}/{total}; later runs read them from the cache", markup=False)

    return show


class LiveView(ABC):
    """A view that stands below the lines on a terminal, and is not there elsewhere; `_view` says what it shows.

    Subclasses set `_live` to what `_open` gives once all that `_view` shows is there.

    Args:
        enabled: whether this process shows anything.
    """

    _live: Live | None

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._console = Console(highlight=False, soft_wrap=True)

    def _open(self, refresh_per_second: float) -> Live | None:
        if not (self._enabled and self._console.is_terminal):
            return None
        return Live(self._view(), console=self._console, refresh_per_second=refresh_per_second)

    def __enter__(self) -> "LiveView":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    @abstractmethod
    def _view(self) -> Group: ...

    def _refresh(self) -> None:
        if self._live:
            self._live.update(self._view())

    def message(self, text: str) -> None:
        """Print a line that stays."""
        if self._enabled:
            self._console.print(text, markup=False)


class Display(LiveView):
    """Progress of one run.

    Args:
        images: images seen at the start.
        total: images at which the run ends.
        run_dir: where its files are.
        enabled: whether this process shows anything.
    """

    def __init__(self, *, images: int, total: int, run_dir: str, enabled: bool) -> None:
        super().__init__(enabled=enabled)
        self._total = total
        self._last = (time.monotonic(), images)
        self._told = time.monotonic()
        self._rows = {"run folder": run_dir}
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TextColumn("images"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self._console, expand=True,
        )  # fmt: skip
        self._task = self._bar.add_task("training", total=total, completed=images)
        self._live = self._open(refresh_per_second=4)

    def _view(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for name, value in self._rows.items():
            table.add_row(name, value)
        return Group(self._bar, table)

    def doing(self, what: str) -> None:
        """Say what the run does now ("training", "validating", "sampling")."""
        self._bar.update(self._task, description=what)
        self._refresh()

    def progress(self, what: str, done: int, total: int) -> None:
        """Say how far something long has come: on a terminal always, elsewhere by a line now and then."""
        self.doing(text := f"{what} {done}/{total}")
        if not self._live and time.monotonic() - self._told >= _WORKING_INTERVAL:
            self._told = time.monotonic()
            self.message(text)

    def step(self, images: int, loss: float) -> None:
        """Show a step: the bar moves, the loss is smoothed over about 50 steps."""
        self._bar.update(self._task, completed=min(images, self._total))
        if self._live:
            before = float(self._rows.get("loss", loss))
            self._rows["loss"] = f"{before + 0.02 * (loss - before):.5f}" if loss == loss else f"{before:.5f}"
            self._refresh()

    def report(self, images: int, values: dict[str, str]) -> None:
        """Show values: table rows on a terminal, one line elsewhere."""
        self._rows.update(values)
        self._refresh()
        if self._enabled and not self._live:
            text = "  ".join(f"{name} {value}" for name, value in values.items())
            now, (before, done) = time.monotonic(), self._last
            if images > done:
                self._last = (now, images)
                text += f"  left {(self._total - images) * (now - before) / (images - done):.0f} s"
            self._console.print(f"images {images}/{self._total}  {text}", markup=False)
