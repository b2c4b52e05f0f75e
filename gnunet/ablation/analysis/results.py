"""The records of a study as its report reads them: by variant, setting on the axes, and seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gnunet.ablation.analysis.formatting import metric_info
from gnunet.ablation.analysis.statistics import (
    LEVEL,
    Difference,
    Expectation,
    Score,
    Verdict,
    Word,
    holm,
    judge,
    judge_all,
    p_of_verdict,
    paired_difference,
    resample_losses,
    word_for,
)
from gnunet.ablation.plan import Condition, Plan, Records, Setting, settings_of
from gnunet.ablation.records import (
    HIGHER_IS_BETTER,
    LOSSES,
    Outcome,
    errors_in,
    example_weights,
    metric_value,
    outcome_of,
)
from gnunet.ablation.study import STABILITY_EDGE, Comparison, Hypothesis, Study
from gnunet.norms import NORMS

MAX_ROWS = 32  # conditions that figures have a row each for
State = Outcome | Literal["missing"]


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
    expect: Literal[Expectation, "better", "worse"]  # as in the study
    right: Condition
    difference: Difference
    verdict: Verdict
    p: float | None  # of the seeds alone: see `p_of_verdict`
    direction: Expectation  # `expect` with better and worse as higher or lower
    adjusted_p: float | None = None  # by Holm's method, for all comparisons of the study's hypotheses

    @property
    def survives(self) -> bool:
        """Whether the verdict holds for the number of comparisons: False for a supported or refuted one whose adjusted
        p-value is not below 0.05."""
        is_verdict = self.verdict in ("supported", "refuted")
        return not is_verdict or (self.adjusted_p is not None and self.adjusted_p < 1 - LEVEL)


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
    def contrasts(self) -> list[Contrast]:
        """Every other variant against the baseline, in every setting of the axes that one of the two crosses."""
        study, base = self.study, self.study.baseline
        found = []
        for variant in study.variants:
            if variant != base:
                settings = settings_of(study, {*study.axes_of(variant), *study.axes_of(base)})
                found += [Contrast(at, self.at(variant, at), self.at(base, at)) for at in settings]
        return found

    @cached_property
    def by_base_setting(self) -> dict[Setting, list[Condition]]:
        """The conditions by the setting of the baseline that they can be compared with."""

        def agree(setting: Setting, other: Setting) -> bool:
            return all(dict(other).get(axis, value) == value for axis, value in setting)

        settings = settings_of(self.study, self.study.axes_of(self.study.baseline))
        return {setting: [c for c in self.conditions if agree(setting, c.setting)] for setting in settings}

    @cached_property
    def main_setting(self) -> Setting:
        """The setting of the baseline in which it trained at most seeds, the last of equal ones."""

        def trained(setting: Setting) -> int:
            return self.states(self.at(self.study.baseline, setting)).count("complete")

        return max(reversed(self.by_base_setting), key=trained)

    @property
    def main_conditions(self) -> list[Condition]:
        """The conditions or, where they are more than figures have rows for, those in the main setting."""
        return self.conditions if len(self.conditions) <= MAX_ROWS else self.by_base_setting[self.main_setting]

    def main_contrast_rows(self, metric: str) -> list[ContrastRow]:
        """As `contrast_rows`, of the main conditions."""
        return self.contrast_rows(metric, () if self.main_conditions == self.conditions else self.main_setting)

    def contrast_rows(self, metric: str, setting: Setting = ()) -> list[ContrastRow]:
        """Every contrast in a setting with its difference in a metric, in groups with a heading.

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
            if set(setting) <= set(contrast.setting):
                by_axes.setdefault(tuple(axis for axis, _ in contrast.setting), []).append(contrast)
        rows: list[ContrastRow] = []
        for axes, contrasts in sorted(by_axes.items(), key=lambda item: len(item[0]) > 0):  # first without a heading
            variants = list(dict.fromkeys(contrast.left.variant for contrast in contrasts))
            if len(variants) == 1 and axes:
                labels = [self.study.axes[axis].label if len(axes) == 1 else axis for axis in axes]
                rows.append(ContrastRow(f"{variants[0]}: {', '.join(labels)}"))
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
        """How a trial ended, or that it has no record."""
        record = self.record(condition, seed)
        return outcome_of(record) if record else "missing"

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
        if outcome_of(record) != "complete":
            return None if worst is None else Score(worst)
        if metric not in LOSSES:
            value = metric_value(record, metric)
            return None if value is None else Score(float(value))
        errors, weights, bank = errors_in(record, metric), _weights(record, metric, bin_), record["bank"]
        if errors is None or weights is None:
            return None
        if not np.isfinite(errors[weights > 0]).all():
            return Score(worst)
        errors = np.where(weights > 0, errors, 0)
        rows = bank.get("rows", range(len(errors)))  # until 0.1.0 unknown
        return Score(float(weights @ errors), resample_losses(errors, weights, rows, bank["bins"]), bank["fingerprint"])

    def _stability_edge(self, variant: str, seed: int) -> Score | None:
        """The largest value of the axis up to which every trial trains; minus infinity where none does; None where it
        depends on a missing trial.

        An edge at the last value may lie beyond it.
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
        return Score(values[trained - 1].item(), rounding=math.log(steps[trained - 1]))

    def mean(self, condition: Condition, metric: str, bin_: int | None = None) -> float:
        """The mean of a metric over the seeds that have a finite one; NaN where none has."""
        values = [score.value for score in self.scores(condition, metric, bin_).values()]
        finite = [value for value in values if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.nan

    def compare(
        self, left: Condition, right: Condition, metric: str, bin_: int | None = None, right_metric: str | None = None
    ) -> Difference:
        """The paired difference of two conditions in a metric; `right_metric` where the right has another."""
        return paired_difference(self.scores(left, metric, bin_), self.scores(right, right_metric or metric, bin_))

    def word(self, difference: Difference, metric: str) -> Word:
        """A difference in a metric in a word; `same` is within the study's margin."""
        return word_for(difference, self.study.margin, higher_is_better=metric.startswith(HIGHER_IS_BETTER))

    def judge(self, hypothesis: Hypothesis) -> tuple[Verdict, list[ComparisonResult]]:
        """The verdict on a hypothesis, and the result of each of its comparisons."""
        found = self._judged[self.study.hypotheses.index(hypothesis)]
        return judge_all(result.verdict for result in found), found

    def survives(self, hypothesis: Hypothesis) -> bool:
        """Whether the verdict on a hypothesis holds for the number of comparisons."""
        verdict, found = self.judge(hypothesis)
        decisive = [result.survives for result in found if result.verdict == verdict]
        return any(decisive) if verdict == "refuted" else all(decisive)

    @cached_property
    def _judged(self) -> list[list[ComparisonResult]]:
        """The results of the comparisons of each hypothesis."""
        found = [[self._compared(h, c) for c in h.comparisons] for h in self.study.hypotheses]
        adjusted = iter(holm([result.p for results in found for result in results]))
        return [[replace(result, adjusted_p=next(adjusted)) for result in results] for results in found]

    def _compared(self, hypothesis: Hypothesis, comparison: Comparison) -> ComparisonResult:
        left, right = (self.at(s["variant"], list(s.items())) for s in (comparison.left, comparison.right))
        difference = self.compare(left, right, hypothesis.metric)
        expect, margin = comparison.expect, hypothesis.margin
        if expect in ("better", "worse"):
            is_high = (expect == "better") == hypothesis.metric.startswith(HIGHER_IS_BETTER)
            expect = "higher" if is_high else "lower"
        verdict, p = judge(difference, expect, margin), p_of_verdict(difference, expect, margin)
        return ComparisonResult(left, comparison.expect, right, difference, verdict, p, expect)

    def predictors(self, metric: str, bin_: int | None = None) -> dict[str, float]:
        """The loss of each trivial predictor by name, on the first validation set of which the records have it; empty
        where none has. `bin_` restricts it to the examples in one bin."""
        for record in self.found:
            weights = _weights(record, metric, bin_) if "predictors" in record["bank"] else None
            if weights is not None:
                return {name: float(weights @ errors) for name, errors in record["bank"]["predictors"].items()}
        return {}

    @cached_property
    def outside_seeds(self) -> list[str]:
        """The names of the records of the plan's conditions at seeds outside of the study file, which are not used."""
        planned = {trial.name for trial in (*self.plan.trials, *self.plan.tuning_trials)}
        others = {record["config"]["seed"] for name, record in self._records.items() if name not in planned}
        conditions = {trial.condition: trial for trial in self.plan.trials}.values()
        moved = ((trial, trial.config.model_copy(update={"seed": seed})) for trial in conditions for seed in others)
        names = {replace(trial, config=config).name for trial, config in moved}
        return sorted((names & self._records.keys()) - planned)


def _weights(record: Mapping[str, Any], loss: str, bin_: int | None) -> np.ndarray | None:
    """The weights of the examples in a loss, or in its mean over a bin; None where it has none."""
    weights = example_weights(record, loss)
    if weights is None or bin_ is None:
        return weights
    weights = np.where(np.equal(record["bank"]["bins"], bin_), weights, 0)
    return weights / weights.sum() if weights.any() else None
