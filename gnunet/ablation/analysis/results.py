"""The records of a study as its report reads them: by variant, setting on the axes, and seed."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gnunet.ablation.analysis.formatting import metric_info
from gnunet.ablation.analysis.statistics import (
    RESAMPLES,
    Difference,
    Expectation,
    Score,
    Verdict,
    judge,
    judge_all,
    paired_difference,
    resample_losses,
)
from gnunet.ablation.plan import Condition, Plan, Records, Setting, settings_of
from gnunet.ablation.records import LOSSES, errors_in, metric_value
from gnunet.ablation.study import STABILITY_EDGE, Hypothesis, Study
from gnunet.norms import NORMS

State = Literal["complete", "diverged", "missing"]


@dataclass(frozen=True)
class Contrast:
    """A variant against the baseline in a setting of the axes that either crosses."""

    setting: Setting
    left: Condition
    right: Condition


@dataclass(frozen=True)
class ContrastRow:
    """A contrast and its difference, or a heading over the rows that follow."""

    label: str
    contrast: Contrast | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class ComparisonResult:
    """A comparison of a hypothesis, with its difference and verdict."""

    left: Condition
    expect: Expectation
    right: Condition
    difference: Difference
    verdict: Verdict


class Results:
    """The records of a study by the conditions of its plan; `samples/NAME.png` are in `folder`."""

    def __init__(self, study: Study, plan: Plan, records: Records, folder: Path):
        self.study, self.plan, self.folder = study, plan, folder
        self._records = records
        self._names = {(trial.condition, trial.seed): trial.name for trial in plan.trials}
        self._cached_score = cache(self._score)

    @cached_property
    def conditions(self) -> list[Condition]:
        """Every variant in every setting of the axes that it crosses, in the study's order."""
        study = self.study
        return [Condition(v, at) for v in study.variants for at in settings_of(study, study.axes_of(v))]

    @cached_property
    def settings(self) -> list[Setting]:
        """The settings of the conditions, without those that are a part of another."""
        every = list(dict.fromkeys(condition.setting for condition in self.conditions))
        return [setting for setting in every if not any(set(setting) < set(other) for other in every)]

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """Every other variant against the baseline, in every setting of the axes that one of the two crosses."""
        study, base = self.study, self.study.baseline
        found = []
        for variant in study.variants:
            if variant != base:
                settings = settings_of(study, {*study.axes_of(variant), *study.axes_of(base)})
                found += [Contrast(at, self.at(variant, at), self.at(base, at)) for at in settings]
        return found

    def contrast_rows(self, metric: str) -> list[ContrastRow]:
        """Every contrast with its difference in a metric, in groups with a heading.

        The contrasts in one setting are a group, from the lowest difference to the highest. Where a variant is alone
        on its axes, its settings are a group, in the order of the axes.
        """

        def row(label: str, contrast: Contrast) -> ContrastRow:
            return ContrastRow(label, contrast, self.compare(contrast.left, contrast.right, metric))

        def by_difference(row: ContrastRow) -> tuple[bool, float]:
            relative = row.difference.relative
            return (True, 0.0) if relative is None or math.isnan(relative) else (False, relative)

        by_axes: dict[tuple[str, ...], list[Contrast]] = {}
        bare = ((Condition(c.left.variant, ()), Condition(c.right.variant, ())) for c in self.contrasts)
        of_edges = [Contrast((), left, right) for left, right in dict.fromkeys(bare)]
        for contrast in of_edges if metric == STABILITY_EDGE else self.contrasts:
            by_axes.setdefault(tuple(axis for axis, _ in contrast.setting), []).append(contrast)
        rows: list[ContrastRow] = []
        for axes, contrasts in sorted(by_axes.items(), key=lambda item: len(item[0]) > 0):  # first without a heading
            variants = list(dict.fromkeys(contrast.left.variant for contrast in contrasts))
            if len(variants) == 1 and axes:
                rows.append(ContrastRow(f"{variants[0]}: {', '.join(self.study.axes[axis].label for axis in axes)}"))
                rows += [row(", ".join(value for _, value in contrast.setting), contrast) for contrast in contrasts]
                continue
            for setting in dict.fromkeys(contrast.setting for contrast in contrasts):
                if setting:
                    rows.append(ContrastRow(self.describe_setting(setting)))
                group = [row(contrast.left.variant, contrast) for contrast in contrasts if contrast.setting == setting]
                rows += sorted(group, key=by_difference)
        return rows

    @cached_property
    def found(self) -> list[Mapping[str, Any]]:
        """The existing records of the plan's trials, each once, without those of tuning."""
        names = dict.fromkeys(self._names.values())
        return [self._records[name] for name in names if name in self._records]

    def at(self, variant: str, setting: Sequence[tuple[str, str]]) -> Condition:
        """A variant in a setting, without the axes that it does not cross."""
        values = dict(setting)
        return Condition(variant, tuple((axis, values[axis]) for axis in self.study.axes_of(variant) if axis in values))

    def label(self, condition: Condition) -> str:
        """`batch: 2`, or `batch: size 2, conditioning additive` in a study with more axes."""
        if not condition.setting:
            return condition.variant
        only = len(self.study.axes) == 1
        values = ", ".join(value if only else f"{axis} {value}" for axis, value in condition.setting)
        return f"{condition.variant}: {values}"

    def describe_setting(self, setting: Setting) -> str:
        """A setting by the labels of its axes; empty for none."""
        return "; ".join(f"{self.study.axes[axis].label}: {value}" for axis, value in setting)

    def name(self, condition: Condition, seed: int) -> str | None:
        """The name of a trial; None while its tuning is pending."""
        return self._names.get((condition, seed))

    def record(self, condition: Condition, seed: int) -> Mapping[str, Any] | None:
        """The record of a trial, if there is one."""
        return self._records.get(self.name(condition, seed))

    def records(self, condition: Condition) -> list[Mapping[str, Any]]:
        """The records of a condition, by seed."""
        return [record for seed in self.study.seeds if (record := self.record(condition, seed))]

    def state(self, condition: Condition, seed: int) -> State:
        """Whether a trial trained to its end, diverged, or has no record."""
        record = self.record(condition, seed)
        return record["outcome"] if record else "missing"

    def states(self, condition: Condition) -> list[State]:
        """The state of each trial of a condition."""
        return [self.state(condition, seed) for seed in self.study.seeds]

    def failures(self, condition: Condition) -> tuple[int, int]:
        """How many trials of a condition did not train, and how many have a record."""
        found = [state for state in self.states(condition) if state != "missing"]
        return len(found) - found.count("complete"), len(found)

    def is_batch_dependent(self, condition: Condition) -> bool:
        """Whether norms of a condition depend on the batch, by its records or, without one, by its configuration."""
        if records := self.records(condition):
            return any(record["batch_dependent"] for record in records)
        trials = [*self.plan.trials, *self.plan.tuning_trials]
        norms = [trial.config.model.norm for trial in trials if trial.condition == condition]
        kinds = {part.get("kind", norm.kind) for norm in norms for part in ({}, *norm.overrides.values())}
        return any(NORMS[kind].batch_dependent for kind in kinds)

    def scores(self, condition: Condition, metric: str, bin_: int | None = None) -> dict[int, Score]:
        """The scores of a condition's trials by seed, without missing trials and values.

        For a loss, `bin_` restricts them to the examples in one bin. The stability edge is that of the variant,
        whatever the setting.
        """
        if metric == STABILITY_EDGE:
            edges = {seed: self._stability_edge(condition.variant, seed) for seed in self.study.seeds}
            return {seed: score for seed, score in edges.items() if score is not None}
        names = {seed: self.name(condition, seed) for seed in self.study.seeds}
        found = {seed: self._cached_score(name, metric, bin_) for seed, name in names.items() if name in self._records}
        return {seed: score for seed, score in found.items() if score is not None}

    def _score(self, name: str, metric: str, bin_: int | None) -> Score | None:
        record, worst = self._records[name], metric_info(metric).worst
        if record["outcome"] == "diverged":
            return None if worst is None else Score(worst)
        if metric not in LOSSES:
            value = metric_value(record, metric)
            return None if value is None else Score(float(value))
        if (errors := errors_in(record, metric)) is None:
            return None
        bins = np.asarray(record["bank"]["bins"])
        if bin_ is not None:
            errors, bins = errors[bins == bin_], bins[bins == bin_]
        if len(errors) == 0:
            return None
        if not np.isfinite(errors).all():
            return Score(worst)
        loss = float(np.mean([errors[bins == b].mean() for b in np.unique(bins)]))
        return Score(loss, resample_losses(errors, bins), record["bank"]["fingerprint"])

    def _stability_edge(self, variant: str, seed: int) -> Score | None:
        """The largest value of the axis up to which every trial trains; minus infinity where none does; None where it
        depends on a missing trial.

        An edge is known to a step of the axis. Its resamples are log-uniform in this step, so that intervals include
        the rounding. An edge at the last value may lie beyond it.
        """
        ((axis, found),) = self.study.axes.items()
        names = sorted(found.values, key=float)
        states = [self.state(self.at(variant, [(axis, name)]), seed) for name in names]
        trained = next((i for i, state in enumerate(states) if state != "complete"), len(states))
        if "missing" in states[: trained + 1]:
            return None
        if trained == 0:
            return Score(-math.inf)
        values = np.array(names, np.float64)
        steps = np.append(values[1:] / values[:-1], values[-1] / values[-2:][0])  # beyond the last as before it
        place = np.random.default_rng([seed, zlib.crc32(variant.encode())]).random(RESAMPLES)
        return Score(values[trained - 1].item(), values[trained - 1] * steps[trained - 1] ** place)

    def mean(self, condition: Condition, metric: str) -> float:
        """The mean of a metric over the seeds that have a finite one; NaN where none has."""
        values = [score.value for score in self.scores(condition, metric).values()]
        finite = [value for value in values if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.nan

    def compare(
        self, left: Condition, right: Condition, metric: str, bin_: int | None = None, right_metric: str | None = None
    ) -> Difference:
        """The paired difference of two conditions in a metric; `right_metric` where the right has another."""
        return paired_difference(self.scores(left, metric, bin_), self.scores(right, right_metric or metric, bin_))

    def judge(self, hypothesis: Hypothesis) -> tuple[Verdict, list[ComparisonResult]]:
        """The verdict on a hypothesis, and the result of each of its comparisons."""
        found = []
        for comparison in hypothesis.comparisons:
            left, right = (self.at(s["variant"], list(s.items())) for s in (comparison.left, comparison.right))
            difference = self.compare(left, right, hypothesis.metric)
            verdict = judge(difference, comparison.expect, hypothesis.margin)
            found.append(ComparisonResult(left, comparison.expect, right, difference, verdict))
        return judge_all(result.verdict for result in found), found
