"""How long cells will take, from what others took."""

import statistics
from collections.abc import Iterable

from gnunet.ablation.plan import Cell, Plan, Records


class Expected:
    """Times of a plan's cells, by seconds per image: of records of the same arm at the same point, of the same arm,
    of any; or else of a probe.

    Args:
        plan: all cells, those that have records too.
        records: what there is so far.
    """

    def __init__(self, plan: Plan, records: Records):
        self.probed: float | None = None
        """Seconds for an image where there are no records."""
        self._known: dict[tuple, list[float]] = {}
        for cell in [*plan.tuning_cells, *plan.cells]:
            if record := records.get(cell.name):
                self.note(cell, record)

    def note(self, cell: Cell, record: dict) -> None:
        """Learn from the record of a cell."""
        times = record["times"]
        seconds = max(times["cell_seconds"], times["wall_seconds"] or 0.0) / record["images"]
        for key in ((cell.arm, cell.point), (cell.arm,), ()):
            self._known.setdefault(key, []).append(seconds)

    @property
    def source(self) -> str | None:
        """What it is known from; None where nothing is known."""
        if self._known:
            return "by the cells that are done"
        return None if self.probed is None else "by a probe of training alone"

    def seconds(self, cells: Iterable[Cell], at_a_time: int) -> float | None:
        """How long cells will take, so many at a time; None where nothing is known."""
        each = [self._seconds_per_image(cell) for cell in cells]
        if None in each:
            return None
        total = sum(rate * cell.config.train.images for rate, cell in zip(each, cells, strict=True))
        return total / max(min(at_a_time, len(each)), 1)

    def _seconds_per_image(self, cell: Cell) -> float | None:
        for key in ((cell.arm, cell.point), (cell.arm,), ()):
            if key in self._known:
                return statistics.median(self._known[key])
        return self.probed


def in_words(seconds: float) -> str:
    """A duration to about two digits: 40 s, 12 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
