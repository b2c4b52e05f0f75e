"""Progress of a study: its plan as a table, the expected time, and a live view of the running trials."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from gnunet.ablation.plan import Condition, Plan, Records, Trial
from gnunet.ablation.records import metric_value, outcome_of, read_record
from gnunet.ablation.study import Study
from gnunet.checkpoint.jsonl import read_jsonl
from gnunet.config import Config
from gnunet.evaluation.report import print_all
from gnunet.training.progress import format_duration

MEASURED = 5
"""Forward passes over the validation set that measuring a trial takes: errors, and magnitudes with their gradients."""


def trial_work(config: Config) -> float:
    """The training images that take as long as a trial, of which a forward pass is a third each.

    Counts training, validation, sampling, and what is measured at the end, not the extraction of features.
    """
    train, sampling, evaluate = config.train, config.sampling, config.evaluate
    total = train.total_images
    validated = config.validation.num_examples * (_times(total, train.validate_every) + MEASURED)
    sampled = sampling.num_images * _times(total, train.sample_every)
    if evaluate.every is not None:  # the last samples are drawn again, for their nearest training images
        sampled += evaluate.num_images * (_times(total, evaluate.every) + 1)
    passes = sampling.num_inference_steps * (1 if sampling.guidance_scale == 1 else 2)
    return total + (validated + sampled * passes) / 3


def _times(total: int, every: int) -> int:
    """How often something happens that is due every so many images, and at the end; 0 is only at the end."""
    return math.ceil(total / every) if every else 1


class TimeEstimate:
    """The expected time of trials, by the median seconds per image of finished ones: of the same variant in the same
    setting, else of the variant, else of any, else of a probe. An image is one of `trial_work`."""

    def __init__(self, plan: Plan, records: Records):
        self.probed: tuple[float, float] | None = None
        """Where there are no records: the seconds that a trial takes to start and to be timed, and those per image."""
        self._known: dict[tuple, list[float]] = {}
        for trial in [*plan.tuning_trials, *plan.trials]:
            if record := records.get(trial.name):
                self.update(trial, record)

    def update(self, trial: Trial, record: dict) -> None:
        """Add the time of a finished trial."""
        times, config = record["times"], trial.config
        # cell_seconds are of the last process alone, wall_seconds those of training over all interruptions.
        seconds = max(times["cell_seconds"], times["wall_seconds"] or 0.0)
        share = record["images"] / config.train.total_images  # of a diverged trial
        for key in self._keys(trial):
            self._known.setdefault(key, []).append(seconds / (share * trial_work(config)))

    @property
    def source(self) -> str | None:
        """Where the estimate is from; None where nothing is known."""
        if self._known:
            return "by the trials that are done"
        return None if self.probed is None else "by a probe of a training step"

    def seconds(self, trials: Iterable[Trial], at_a_time: int) -> float | None:
        """The expected seconds of trials, `at_a_time` of them in parallel; None where nothing is known."""
        total, count = 0.0, 0
        for trial in trials:
            known = next((self._known[key] for key in self._keys(trial) if key in self._known), None)
            if known is None and self.probed is None:
                return None
            start, rate = (0.0, statistics.median(known)) if known else self.probed
            total, count = total + start + rate * trial_work(trial.config), count + 1
        return total / max(min(at_a_time, count), 1)

    @staticmethod
    def _keys(trial: Trial) -> list[tuple]:
        return [trial.condition, (trial.variant,), ()]


class Display(Progress):
    """Progress of a round of trials, `at_a_time` in parallel: bars on a terminal, plain lines elsewhere.

    Adds the finished trials to `estimate`.
    """

    def __init__(
        self, trials: Sequence[Trial], folder: Path, estimate: TimeEstimate, *, at_a_time: int, enabled: bool = True
    ):
        self._folder, self._estimate, self._at_a_time = folder, estimate, at_a_time
        self._left, self._total = {trial.name: trial for trial in trials}, len(trials)
        console = Console(highlight=False, soft_wrap=True, quiet=not enabled)
        self._is_live = enabled and console.is_terminal
        super().__init__(
            TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"), console=console, expand=True, disable=not self._is_live,
        )  # fmt: skip
        self._all = self.add_task("trials", total=self._total, note="")
        self._bars: dict[str, TaskID] = {}

    def message(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False)

    def started(self, trial: Trial) -> None:
        """Show that a trial has been started."""
        total = trial.config.train.total_images
        self._bars[trial.name] = self.add_task(trial.title, total=total, note="")
        if not self._is_live:
            self.message(f"{trial.title}: started in {trial.run_dir(self._folder)}")

    def ended(self, trial: Trial, seconds: float) -> None:
        """Show the result of a trial whose record is written, `seconds` after its start."""
        record = read_record(self._folder, trial.name)
        self._estimate.update(trial, record)
        del self._left[trial.name]
        loss, outcome = metric_value(record, "validation_loss"), outcome_of(record)
        result = outcome if outcome != "complete" else f"validation loss {loss:.5f}"
        done, left = self._total - len(self._left), self._estimate.seconds(self._left.values(), self._at_a_time)
        note = f"about {format_duration(left)} left" if self._left and left is not None else ""
        self.update(self._all, completed=done, note=note)
        text = f"{trial.title}: {result}, {format_duration(seconds)}; {done}/{self._total} trials"
        self.message(f"{text}, {note}" if note else text)

    def show(self, running: Sequence[Trial]) -> None:
        """Show how far the running trials are."""
        names = {trial.name for trial in running}
        for name in [name for name in self._bars if name not in names]:
            self.remove_task(self._bars.pop(name))
        for trial in running if self._is_live else ():
            lines = read_jsonl(trial.run_dir(self._folder) / "metrics.jsonl")
            losses = [line["loss"] for line in lines if line.get("loss") is not None]
            note = f"loss {losses[-1]:.5f}" if losses else ""
            images = lines[-1]["images"] if lines else 0
            self.update(self._bars[trial.name], completed=images, note=note)


def print_plan(study: Study, plan: Plan, records: Records) -> None:
    """Print the chosen values and, of each variant in each setting, how many trials are finished and how many of these
    diverged or collapsed, and the totals."""
    groups: dict[Condition, list[Trial]] = {}
    for trial in [*plan.tuning_trials, *plan.trials]:
        groups.setdefault(trial.condition, []).append(trial)
    axes = [axis for axis in study.axes if any(axis in dict(setting) for _, setting in groups)]
    tuned = [study.tuning.key.rpartition(".")[2]] if study.tuning else []
    rows = []
    for condition, trials in groups.items():
        chosen = [plan.chosen.get(condition, "to be tuned")] if study.tuning else []
        found = [records[trial.name] for trial in trials if trial.name in records]
        failed = sum(outcome_of(record) != "complete" for record in found)
        values = (dict(condition.setting).get(axis, "") for axis in axes)
        rows.append([condition.variant, *values, *chosen, str(len(trials)), str(len(found)), str(failed or "")])
    print_table(["variant", *axes, *tuned, "trials", "done", "failed"], rows)
    print_all(plan_summary(study, plan, records))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose first column has names and the others numbers."""
    table = Table()
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i > 1)
    for row in rows:
        table.add_row(*row)
    print_all(table)


def plan_summary(study: Study, plan: Plan, records: Records) -> str:
    """The number of trials: in all, shared, done, and to run."""
    trials = [*plan.tuning_trials, *plan.trials]
    names = {trial.name for trial in trials}
    variants, conditions = {trial.variant for trial in trials}, {trial.condition for trial in trials}
    parts = [f"{_count(variants, 'variant')}, {len(conditions)} with their settings, {_count(study.seeds, 'seed')}"]
    if study.tuning is not None:
        values, seeds = _count(study.tuning.values, "value"), _count(study.tuning.seeds, "seed")
        parts.append(f"tuning of {values} on {seeds}: {len(plan.tuning_trials)} trials")
    if plan.pending_tuning:
        parts.append(f"the reported trials of {len(plan.pending_tuning)} settings wait for it")
    shared = f", {len(trials) - len(names)} of them shared" if len(names) < len(trials) else ""
    done = len(names & records.keys())
    return f"{'; '.join(parts)}\n{len(trials)} trials{shared}: {done} done, {len(names) - done} to run"


def _count(things: Sequence | set, name: str) -> str:
    return f"{len(things)} {name}" + ("" if len(things) == 1 else "s")
