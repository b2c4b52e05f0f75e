"""A study's records as its report reads them: by variant, setting on the axes, and seed."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gnunet.ablation.analysis.metrics import errors_in, metric_info
from gnunet.ablation.analysis.statistics import (
    Bank,
    Difference,
    Expectation,
    Score,
    Verdict,
    judge,
    judge_all,
    paired_difference,
)
from gnunet.ablation.plan import Plan, Setting, settings_of
from gnunet.ablation.records import LOSSES, metric_value, rank
from gnunet.ablation.study import Hypothesis, Study
from gnunet.norms import NORMS

State = Literal["complete", "diverged", "missing"]


@dataclass(frozen=True)
class Condition:
    """What is repeated over the seeds: a variant, at a setting of the axes that it crosses."""

    variant: str
    setting: Setting


@dataclass(frozen=True)
class Contrast:
    """A variant against the baseline at a setting of the axes that either crosses."""

    setting: Setting
    left: Condition
    right: Condition


@dataclass(frozen=True)
class ComparisonResult:
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
        plan: its trials; a trial without a record is missing.
        records: by the trials' names.
        folder: where `samples/NAME.png` are.
    """

    def __init__(self, study: Study, plan: Plan, records: Mapping[str, Mapping[str, Any]], folder: Path):
        self.study, self.plan, self.folder = study, plan, folder
        self._records = records
        self._names = {(Condition(trial.variant, trial.setting), trial.seed): trial.name for trial in plan.trials}
        self._scores: dict[tuple[str, str, int | None], Score | None] = {}
        self._banks: dict[tuple[int, ...], Bank] = {}

    @cached_property
    def conditions(self) -> list[Condition]:
        """Every variant at every setting of the axes that it crosses, in the study's order."""
        return [
            Condition(variant, setting)
            for variant in self.study.variants
            for setting in settings_of(self.study, variant)
        ]

    @cached_property
    def settings(self) -> list[Setting]:
        """The settings that conditions are at, those left out that are a part of another."""
        every = list(dict.fromkeys(condition.setting for condition in self.conditions))
        return [setting for setting in every if not any(set(setting) < set(other) for other in every)]

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """Every variant but the base against the base, at every setting of the axes that one of the two crosses."""
        base = self.study.baseline
        return [
            Contrast(setting, self.at(variant, setting), self.at(base, setting))
            for variant in self.study.variants
            if variant != base
            for setting in self._settings([*self.study.axes_of(variant), *self.study.axes_of(base)])
        ]

    @cached_property
    def found(self) -> list[Mapping[str, Any]]:
        """The records of the plan's trials that have one, each once; those of tuning are not among them."""
        names = dict.fromkeys(self._names.values())
        return [self._records[name] for name in names if name in self._records]

    def tuning_scores(self) -> dict[Condition, dict[str, float | None]]:
        """What tuning found for each condition and value: the mean of its metric over the tuning seeds, lower better;
        infinite where a trial diverged, None where one is missing."""
        found: dict[Condition, dict[str, list[float]]] = {}
        for trial in self.plan.tuning_trials:
            ranks = found.setdefault(Condition(trial.variant, trial.setting), {}).setdefault(trial.tuned, [])
            if (record := self._records.get(trial.name)) is not None:
                ranks.append(rank(record, self.study.tuning.metric))
        seeds = len(self.study.tuning.seeds) if self.study.tuning else 0
        return {
            condition: {
                value: math.fsum(ranks) / seeds if len(ranks) == seeds else None for value, ranks in row.items()
            }
            for condition, row in found.items()
        }

    def at(self, variant: str, setting: Sequence[tuple[str, str]]) -> Condition:
        """A variant at a setting, of which the axes that it does not cross are left out."""
        where = dict(setting)
        return Condition(variant, tuple((axis, where[axis]) for axis in self.study.axes_of(variant) if axis in where))

    def label(self, condition: Condition) -> str:
        """A condition in words: `batch: 2`, or `batch: batch 2, conditioning additive` where there are more axes."""
        if not condition.setting:
            return condition.variant
        only = len(self.study.axes) == 1
        return f"{condition.variant}: " + ", ".join(
            value if only else f"{axis} {value}" for axis, value in condition.setting
        )

    def place(self, setting: Setting) -> str:
        """A setting in words, by the axes' titles; empty for none."""
        return "; ".join(f"{self.study.axes[axis].label}: {value}" for axis, value in setting)

    def name(self, condition: Condition, seed: int) -> str | None:
        """The name of a trial; None where it waits for its tuning."""
        return self._names.get((condition, seed))

    def record(self, condition: Condition, seed: int) -> Mapping[str, Any] | None:
        """The record of a trial, if there is one."""
        return self._records.get(self.name(condition, seed))

    def records(self, condition: Condition) -> list[Mapping[str, Any]]:
        """The records of a condition, by seed."""
        found = (self.record(condition, seed) for seed in self.study.seeds)
        return [record for record in found if record]

    def state(self, condition: Condition, seed: int) -> State:
        """Whether a trial is there, and trained to its end."""
        record = self.record(condition, seed)
        return record["outcome"] if record else "missing"

    def states(self, condition: Condition) -> list[State]:
        """The state of each of a condition's trials."""
        return [self.state(condition, seed) for seed in self.study.seeds]

    def scores(self, condition: Condition, metric: str, bin_: int | None = None) -> dict[int, Score]:
        """What a condition's trials have of a metric, by seed; missing trials and values are left out.

        Args:
            condition: which trials.
            metric: its name.
            bin_: of a loss only the examples in this bin.
        """
        found = {}
        for seed in self.study.seeds:
            record = self.record(condition, seed)
            score = self._score(record, metric, bin_) if record else None
            if score is not None:
                found[seed] = score
        return found

    def mean(self, condition: Condition, metric: str) -> float:
        """The mean of a metric over the seeds that have a finite one; NaN where none has."""
        values = [score.value for score in self.scores(condition, metric).values()]
        finite = [value for value in values if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.nan

    def diverged(self, condition: Condition) -> int:
        """How many of a condition's trials diverged."""
        return self.states(condition).count("diverged")

    def is_batch_dependent(self, condition: Condition) -> bool:
        """Whether norms of a condition depend on the batch: as its records say, or without one its configuration."""
        if records := self.records(condition):
            return any(record["batch_dependent"] for record in records)
        trials = [*self.plan.trials, *self.plan.tuning_trials]
        norms = [trial.config.model.norm for trial in trials if Condition(trial.variant, trial.setting) == condition]
        kinds = {part.get("kind", norm.kind) for norm in norms for part in ({}, *norm.overrides.values())}
        return any(NORMS[kind].batch_dependent for kind in kinds)

    def compare(
        self, left: Condition, right: Condition, metric: str, bin_: int | None = None, *, to: str | None = None
    ) -> Difference:
        """The paired difference of two conditions; arguments as in `scores`.

        Args:
            to: right's metric where it is another than left's.
        """
        return paired_difference(self.scores(left, metric, bin_), self.scores(right, to or metric, bin_))

    def judge(self, hypothesis: Hypothesis) -> tuple[Verdict, list[ComparisonResult]]:
        """The verdict on a hypothesis, and on each of its comparisons."""
        judged = []
        for comparison in hypothesis.comparisons:
            sides = (comparison.left, comparison.right)
            left, right = (self.at(side["variant"], list(side.items())) for side in sides)
            difference = self.compare(left, right, hypothesis.metric)
            verdict = judge(difference, comparison.expect, hypothesis.margin)
            judged.append(ComparisonResult(left, comparison.expect, right, difference, verdict))
        return judge_all(one.verdict for one in judged), judged

    def _settings(self, axes: Sequence[str]) -> list[Setting]:
        """Every combination of the axes' values, in the study's order."""
        crossed = [axis for axis in self.study.axes if axis in axes]
        values = [[(axis, value) for value in self.study.axes[axis].values] for axis in crossed]
        return list(itertools.product(*values))

    def _score(self, record: Mapping[str, Any], metric: str, bin_: int | None) -> Score | None:
        key = (record["cell"], metric, bin_)
        if key not in self._scores:
            self._scores[key] = self._read(record, metric, bin_)
        return self._scores[key]

    def _read(self, record: Mapping[str, Any], metric: str, bin_: int | None) -> Score | None:
        worst = metric_info(metric).worst
        if record["outcome"] == "diverged":
            return None if worst is None else Score(worst)
        if metric not in LOSSES:
            value = metric_value(record, metric)
            return None if value is None else Score(float(value))
        errors = errors_in(record, metric)
        if errors is None:
            return None
        bins = np.asarray(record["bank"]["bins"])
        if bin_ is not None:
            errors, bins = errors[bins == bin_], bins[bins == bin_]
        if len(errors) == 0:
            return None
        if not np.isfinite(errors).all():
            return Score(worst)
        bank = self._banks.setdefault(tuple(bins.tolist()), Bank(bins))
        return Score(bank.loss(errors), bank.resampled(errors), record["bank"]["fingerprint"])
