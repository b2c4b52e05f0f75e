"""What the runner shows: its plan, and while trials run a live view on a terminal, plain lines elsewhere."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gnunet.ablation.eta import TimeEstimate, format_duration
from gnunet.ablation.history import read_lines
from gnunet.ablation.plan import Plan, Records, Setting, Trial
from gnunet.ablation.records import metric_value, record_path
from gnunet.ablation.study import Study
from gnunet.ablation.trial import run_folder


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
    """Progress of a round of trials.

    Args:
        trials: what is to run.
        folder: the study's.
        expected: what trials cost; it learns from those that end.
        at_a_time: trials that run side by side.
        enabled: whether this process shows anything.
    """

    def __init__(
        self, trials: Sequence[Trial], folder: Path, expected: TimeEstimate, *, at_a_time: int, enabled: bool = True
    ):
        super().__init__(enabled=enabled)
        self._folder, self._expected, self._at_a_time = folder, expected, at_a_time
        self._left, self._total = {trial.name: trial for trial in trials}, len(trials)
        self._running: list[Trial] = []
        self._bar = Progress(
            TextColumn("trials"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=self._console, expand=True,
        )  # fmt: skip
        self._task = self._bar.add_task("trials", total=self._total, left="")
        self._live = self._open(refresh_per_second=2)

    def started(self, trial: Trial) -> None:
        """A trial has been started."""
        if not self._live:
            self.message(f"{trial.title}: started in {run_folder(self._folder, trial.name)}")

    def finished(self, trial: Trial, seconds: float) -> None:
        """A trial has its record; it took so long since it was started."""
        record = json.loads(record_path(self._folder, trial.name).read_text())
        self._expected.update(trial, record)
        del self._left[trial.name]
        loss = metric_value(record, "validation_loss")
        result = "diverged" if loss is None else f"validation loss {loss:.5f}"
        done = self._total - len(self._left)
        self._bar.update(self._task, completed=done, left=self._time_left())
        self.message(
            f"{trial.title}: {result}, {format_duration(seconds)}; {done}/{self._total} trials{self._time_left(', ')}"
        )

    def update(self, running: Sequence[Trial]) -> None:
        """Look at how far the trials at work have come."""
        self._running = list(running)
        self._refresh()

    def _time_left(self, before: str = "") -> str:
        seconds = self._expected.seconds(list(self._left.values()), self._at_a_time)
        return f"{before}about {format_duration(seconds)} left" if self._left and seconds is not None else ""

    def _view(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for trial in self._running:
            lines = read_lines(run_folder(self._folder, trial.name) / "metrics.jsonl")
            images = lines[-1]["images"] if lines else 0
            losses = [line["loss"] for line in lines if line.get("loss") is not None]
            loss = f"loss {losses[-1]:.5f}" if losses else ""
            table.add_row(trial.title, f"{images}/{trial.config.train.total_images} images", loss)
        return Group(self._bar, table)


def print_plan(study: Study, plan: Plan, records: Records) -> None:
    """Print what tuning chose and how many trials are done for each variant at each setting, and plan_summary."""
    groups: dict[tuple[str, Setting], list[Trial]] = {}
    for trial in [*plan.tuning_trials, *plan.trials]:
        groups.setdefault((trial.variant, trial.setting), []).append(trial)
    axes = [axis for axis in study.axes if any(axis in dict(setting) for _, setting in groups)]
    table = Table()
    for column in ("variant", *axes, *([study.tuning.key] if study.tuning else [])):
        table.add_column(column, no_wrap=True)
    for column in ("trials", "done", "diverged"):
        table.add_column(column, justify="right", no_wrap=True)
    for (variant, setting), trials in groups.items():
        chosen = [plan.chosen.get((variant, setting), "to be tuned")] if study.tuning else []
        found = [records[trial.name] for trial in trials if trial.name in records]
        diverged = sum(record["outcome"] == "diverged" for record in found)
        numbers = (len(trials), len(found), diverged or "")
        table.add_row(variant, *(dict(setting).get(axis, "") for axis in axes), *chosen, *map(str, numbers))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(plan_summary(study, plan, records), markup=False)


def plan_summary(study: Study, plan: Plan, records: Records) -> str:
    """How many trials there are, how many of them are one run with others, done, and to run."""
    trials = [*plan.tuning_trials, *plan.trials]
    names = {trial.name for trial in trials}
    variants, settings = {trial.variant for trial in trials}, {(trial.variant, trial.setting) for trial in trials}
    parts = [f"{_count(variants, 'variant')}, {len(settings)} with their settings, {_count(study.seeds, 'seed')}"]
    if study.tuning is not None:
        tries = _count(study.tuning.values, "value")
        parts.append(f"tuning of {tries} on {_count(study.tuning.seeds, 'seed')}: {len(plan.tuning_trials)} trials")
    if plan.pending_tuning:
        parts.append(f"cells to report at {len(plan.pending_tuning)} settings wait for it")
    shared = f", {len(trials) - len(names)} of them shared" if len(names) < len(trials) else ""
    done = len(names & records.keys())
    return f"{'; '.join(parts)}\n{len(trials)} trials{shared}: {done} done, {len(names) - done} to run"


def _count(things: Sequence | set, name: str) -> str:
    return f"{len(things)} {name}" + ("" if len(things) == 1 else "s")
