"""What the runner shows: its plan, and while cells run a live view on a terminal, plain lines elsewhere."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gnunet.ablation.eta import Expected, in_words
from gnunet.ablation.history import read_lines
from gnunet.ablation.plan import Cell, Plan, Point, Records
from gnunet.ablation.records import metric_value, record_path
from gnunet.ablation.study import Study
from gnunet.ablation.trial import run_folder
from gnunet.training.progress import LiveView


class Display(LiveView):
    """Progress of a round of cells.

    Args:
        cells: what is to run.
        folder: the study's.
        expected: what cells cost; it learns from those that end.
        at_a_time: cells that run side by side.
        enabled: whether this process shows anything.
    """

    def __init__(
        self, cells: Sequence[Cell], folder: Path, expected: Expected, *, at_a_time: int, enabled: bool = True
    ):
        super().__init__(enabled=enabled)
        self._folder, self._expected, self._at_a_time = folder, expected, at_a_time
        self._left, self._total = {cell.name: cell for cell in cells}, len(cells)
        self._running: list[Cell] = []
        self._bar = Progress(
            TextColumn("cells"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=self._console, expand=True,
        )  # fmt: skip
        self._task = self._bar.add_task("cells", total=self._total, left="")
        self._live = self._open(refresh_per_second=2)

    def started(self, cell: Cell) -> None:
        """A cell has been started."""
        if not self._live:
            self.message(f"{cell.title}: started in {run_folder(self._folder, cell.name)}")

    def finished(self, cell: Cell, seconds: float) -> None:
        """A cell has its record; it took so long since it was started."""
        record = json.loads(record_path(self._folder, cell.name).read_text())
        self._expected.note(cell, record)
        del self._left[cell.name]
        loss = metric_value(record, "validation_loss")
        result = "diverged" if loss is None else f"validation loss {loss:.5f}"
        done = self._total - len(self._left)
        self._bar.update(self._task, completed=done, left=self._time_left())
        self.message(f"{cell.title}: {result}, {in_words(seconds)}; {done}/{self._total} cells{self._time_left(', ')}")

    def update(self, running: Sequence[Cell]) -> None:
        """Look at how far the cells at work have come."""
        self._running = list(running)
        self._refresh()

    def _time_left(self, before: str = "") -> str:
        seconds = self._expected.seconds(list(self._left.values()), self._at_a_time)
        return f"{before}about {in_words(seconds)} left" if self._left and seconds is not None else ""

    def _view(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for cell in self._running:
            lines = read_lines(run_folder(self._folder, cell.name) / "metrics.jsonl")
            images = lines[-1]["images"] if lines else 0
            losses = [line["loss"] for line in lines if line.get("loss") is not None]
            loss = f"loss {losses[-1]:.5f}" if losses else ""
            table.add_row(cell.title, f"{images}/{cell.config.train.images} images", loss)
        return Group(self._bar, table)


def show_plan(study: Study, plan: Plan, records: Records) -> None:
    """Print what tuning chose and how many cells are done for each arm at each point, and sums."""
    groups: dict[tuple[str, Point], list[Cell]] = {}
    for cell in [*plan.tuning_cells, *plan.cells]:
        groups.setdefault((cell.arm, cell.point), []).append(cell)
    axes = [axis for axis in study.axes if any(axis in dict(point) for _, point in groups)]
    table = Table()
    for column in ("arm", *axes, *([study.tuning.key] if study.tuning else [])):
        table.add_column(column, no_wrap=True)
    for column in ("cells", "done", "diverged"):
        table.add_column(column, justify="right", no_wrap=True)
    for (arm, point), cells in groups.items():
        chosen = [plan.chosen.get((arm, point), "to be tuned")] if study.tuning else []
        found = [records[cell.name] for cell in cells if cell.name in records]
        diverged = sum(record["outcome"] == "diverged" for record in found)
        numbers = (len(cells), len(found), diverged or "")
        table.add_row(arm, *(dict(point).get(axis, "") for axis in axes), *chosen, *map(str, numbers))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(sums(study, plan, records), markup=False)


def sums(study: Study, plan: Plan, records: Records) -> str:
    """How many cells there are, how many of them are one run with others, done, and to run."""
    cells = [*plan.tuning_cells, *plan.cells]
    names = {cell.name for cell in cells}
    arms, points = {cell.arm for cell in cells}, {(cell.arm, cell.point) for cell in cells}
    parts = [f"{_count(arms, 'arm')}, {len(points)} with their points, {_count(study.seeds, 'seed')}"]
    if study.tuning is not None:
        tries = _count(study.tuning.values, "value")
        parts.append(f"tuning of {tries} on {_count(study.tuning.seeds, 'seed')}: {len(plan.tuning_cells)} cells")
    if plan.waiting:
        parts.append(f"cells to report at {len(plan.waiting)} points wait for it")
    shared = f", {len(cells) - len(names)} of them shared" if len(names) < len(cells) else ""
    done = len(names & records.keys())
    return f"{'; '.join(parts)}\n{len(cells)} cells{shared}: {done} done, {len(names) - done} to run"


def _count(things: Sequence | set, name: str) -> str:
    return f"{len(things)} {name}" + ("" if len(things) == 1 else "s")
