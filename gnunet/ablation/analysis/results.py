"""A study's records as its report reads them: by arm, point on the axes, and seed."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gnunet.ablation.analysis.metrics import errors_in, metric_named
from gnunet.ablation.analysis.statistics import (
    Bank,
    Difference,
    Expectation,
    Outcome,
    Verdict,
    judge,
    judge_all,
    paired_difference,
)
from gnunet.ablation.plan import Plan, Point, points_of
from gnunet.ablation.records import LOSSES, metric_value, rank
from gnunet.ablation.study import Hypothesis, Study
from gnunet.norms import NORMS

State = Literal["complete", "diverged", "missing"]


@dataclass(frozen=True)
class Condition:
    """What is repeated over the seeds: an arm, at a point of the axes that it crosses."""

    arm: str
    point: Point


@dataclass(frozen=True)
class Contrast:
    """An arm against the base arm at a point of the axes that either crosses."""

    point: Point
    left: Condition
    right: Condition


@dataclass(frozen=True)
class Judged:
    """A comparison of a hypothesis, with what the records say of it."""

    left: Condition
    expect: Expectation
    right: Condition
    difference: Difference
    verdict: Verdict


class Results:
    """The records of a study in its plan's places.

    Args:
        study: the study.
        plan: its cells; a cell without a record is missing.
        records: by the cells' names.
        folder: where `samples/NAME.png` are.
    """

    def __init__(self, study: Study, plan: Plan, records: Mapping[str, Mapping[str, Any]], folder: Path):
        self.study, self.plan, self.folder = study, plan, folder
        self._records = records
        self._names = {(Condition(cell.arm, cell.point), cell.seed): cell.name for cell in plan.cells}
        self._outcomes: dict[tuple[str, str, int | None], Outcome | None] = {}
        self._banks: dict[tuple[int, ...], Bank] = {}

    @cached_property
    def conditions(self) -> list[Condition]:
        """Every arm at every point of the axes that it crosses, in the study's order."""
        return [Condition(arm, point) for arm in self.study.arms for point in points_of(self.study, arm)]

    @cached_property
    def points(self) -> list[Point]:
        """The points that conditions are at, those left out that are a part of another."""
        every = list(dict.fromkeys(condition.point for condition in self.conditions))
        return [point for point in every if not any(set(point) < set(other) for other in every)]

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """Every arm but the base against the base, at every point of the axes that one of the two crosses."""
        base = self.study.baseline
        return [
            Contrast(point, self.at(arm, point), self.at(base, point))
            for arm in self.study.arms
            if arm != base
            for point in self._points([*self.study.axes_of(arm), *self.study.axes_of(base)])
        ]

    @cached_property
    def found(self) -> list[Mapping[str, Any]]:
        """The records of the plan's cells that have one, each once; those of tuning are not among them."""
        names = dict.fromkeys(self._names.values())
        return [self._records[name] for name in names if name in self._records]

    def tried(self) -> dict[Condition, dict[str, float | None]]:
        """What tuning found for each condition and value: the mean of its metric over the tuning seeds, lower better;
        infinite where a cell diverged, None where one is missing."""
        found: dict[Condition, dict[str, list[float]]] = {}
        for cell in self.plan.tuning_cells:
            ranks = found.setdefault(Condition(cell.arm, cell.point), {}).setdefault(cell.tuned, [])
            if (record := self._records.get(cell.name)) is not None:
                ranks.append(rank(record, self.study.tuning.metric))
        seeds = len(self.study.tuning.seeds) if self.study.tuning else 0
        return {
            condition: {
                value: math.fsum(ranks) / seeds if len(ranks) == seeds else None for value, ranks in row.items()
            }
            for condition, row in found.items()
        }

    def at(self, arm: str, point: Sequence[tuple[str, str]]) -> Condition:
        """An arm at a point, of which the axes that it does not cross are left out."""
        where = dict(point)
        return Condition(arm, tuple((axis, where[axis]) for axis in self.study.axes_of(arm) if axis in where))

    def label(self, condition: Condition) -> str:
        """A condition in words: `batch: 2`, or `batch: batch 2, conditioning additive` where there are more axes."""
        if not condition.point:
            return condition.arm
        only = len(self.study.axes) == 1
        return f"{condition.arm}: " + ", ".join(value if only else f"{axis} {value}" for axis, value in condition.point)

    def place(self, point: Point) -> str:
        """A point in words, by the axes' titles; empty for none."""
        return "; ".join(f"{self.study.axes[axis].label}: {value}" for axis, value in point)

    def name(self, condition: Condition, seed: int) -> str | None:
        """The name of a cell; None where it waits for its tuning."""
        return self._names.get((condition, seed))

    def record(self, condition: Condition, seed: int) -> Mapping[str, Any] | None:
        """The record of a cell, if there is one."""
        return self._records.get(self.name(condition, seed))

    def records(self, condition: Condition) -> list[Mapping[str, Any]]:
        """The records of a condition, by seed."""
        found = (self.record(condition, seed) for seed in self.study.seeds)
        return [record for record in found if record]

    def state(self, condition: Condition, seed: int) -> State:
        """Whether a cell is there, and trained to its end."""
        record = self.record(condition, seed)
        return record["outcome"] if record else "missing"

    def states(self, condition: Condition) -> list[State]:
        """The state of each of a condition's cells."""
        return [self.state(condition, seed) for seed in self.study.seeds]

    def outcomes(self, condition: Condition, metric: str, bin_: int | None = None) -> dict[int, Outcome]:
        """What a condition's cells have of a metric, by seed; missing cells and values are left out.

        Args:
            condition: which cells.
            metric: its name.
            bin_: of a loss only the examples in this bin.
        """
        found = {}
        for seed in self.study.seeds:
            record = self.record(condition, seed)
            outcome = self._outcome(record, metric, bin_) if record else None
            if outcome is not None:
                found[seed] = outcome
        return found

    def mean(self, condition: Condition, metric: str) -> float:
        """The mean of a metric over the seeds that have a finite one; NaN where none has."""
        values = [outcome.value for outcome in self.outcomes(condition, metric).values()]
        finite = [value for value in values if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.nan

    def diverged(self, condition: Condition) -> int:
        """How many of a condition's cells diverged."""
        return self.states(condition).count("diverged")

    def is_batch_dependent(self, condition: Condition) -> bool:
        """Whether norms of a condition depend on the batch: as its records say, or without one its configuration."""
        if records := self.records(condition):
            return any(record["batch_dependent"] for record in records)
        cells = [*self.plan.cells, *self.plan.tuning_cells]
        norms = [cell.config.model.norm for cell in cells if Condition(cell.arm, cell.point) == condition]
        kinds = {part.get("kind", norm.kind) for norm in norms for part in ({}, *norm.overrides.values())}
        return any(NORMS[kind].batch_dependent for kind in kinds)

    def compare(
        self, left: Condition, right: Condition, metric: str, bin_: int | None = None, *, to: str | None = None
    ) -> Difference:
        """The paired difference of two conditions; arguments as in `outcomes`.

        Args:
            to: right's metric where it is another than left's.
        """
        return paired_difference(self.outcomes(left, metric, bin_), self.outcomes(right, to or metric, bin_))

    def judge(self, hypothesis: Hypothesis) -> tuple[Verdict, list[Judged]]:
        """The verdict on a hypothesis, and on each of its comparisons."""
        judged = []
        for comparison in hypothesis.comparisons:
            sides = (comparison.left, comparison.right)
            left, right = (self.at(side["arm"], list(side.items())) for side in sides)
            difference = self.compare(left, right, hypothesis.metric)
            verdict = judge(difference, comparison.expect, hypothesis.margin)
            judged.append(Judged(left, comparison.expect, right, difference, verdict))
        return judge_all(one.verdict for one in judged), judged

    def _points(self, axes: Sequence[str]) -> list[Point]:
        """Every combination of the axes' values, in the study's order."""
        crossed = [axis for axis in self.study.axes if axis in axes]
        values = [[(axis, value) for value in self.study.axes[axis].values] for axis in crossed]
        return list(itertools.product(*values))

    def _outcome(self, record: Mapping[str, Any], metric: str, bin_: int | None) -> Outcome | None:
        key = (record["cell"], metric, bin_)
        if key not in self._outcomes:
            self._outcomes[key] = self._read(record, metric, bin_)
        return self._outcomes[key]

    def _read(self, record: Mapping[str, Any], metric: str, bin_: int | None) -> Outcome | None:
        worst = metric_named(metric).worst
        if record["outcome"] == "diverged":
            return None if worst is None else Outcome(worst)
        if metric not in LOSSES:
            value = metric_value(record, metric)
            return None if value is None else Outcome(float(value))
        errors = errors_in(record, metric)
        if errors is None:
            return None
        bins = np.asarray(record["bank"]["bins"])
        if bin_ is not None:
            errors, bins = errors[bins == bin_], bins[bins == bin_]
        if len(errors) == 0:
            return None
        if not np.isfinite(errors).all():
            return Outcome(worst)
        bank = self._banks.setdefault(tuple(bins.tolist()), Bank(bins))
        return Outcome(bank.loss(errors), bank.resampled(errors), record["bank"]["fingerprint"])
