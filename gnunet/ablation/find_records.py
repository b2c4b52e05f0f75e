"""Finds the runs of a study that have records, where a report is asked for without the run's flags."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gnunet.ablation.plan import KEYS_NOT_HASHED, RESERVED_KEYS, Plan, flatten, make_plan
from gnunet.ablation.records import read_records, record_path
from gnunet.ablation.study import Study
from gnunet.config.merge import nest
from gnunet.errors import ConfigError


class Run(NamedTuple):
    """What a study was run with."""

    folder: Path
    budget: str | None
    flags: Mapping[str, Any]  # overrides of the configuration, nested


def find_runs(study: Study, path: Path, folders: Iterable[Path], flags: Mapping[str, Any]) -> list[Run]:
    """The runs of the study in the file `path` with records in any of the folders.

    A record is of the budget at which the fewest of its values are in no planned trial. These values, and `flags`, are
    the flags of its run.
    """
    budgets = list(study.budgets or [None])
    planned = {budget: _values(make_plan(study, path, budget=budget, flags=flags)) for budget in budgets}
    runs: list[Run] = []
    for folder in folders:
        for record in read_records(folder).values():
            config = flatten(record["config"])
            others = {
                budget: {key: value for key, value in config.items() if str(value) not in values.get(key, {str(value)})}
                for budget, values in planned.items()
            }
            budget = min(budgets, key=lambda budget: len(others[budget]))
            for more in ({}, others[budget]):  # without them where only a default has changed since
                run = Run(folder, budget, nest((flatten(flags) | more).items()))
                runs += [] if run in runs else [run]
    return [run for run in runs if _has_records(study, path, run)]


def _values(plan: Plan) -> dict[str, set[str]]:
    """The values of each key in any trial of a plan, as text."""
    values: dict[str, set[str]] = {}
    for trial in [*plan.tuning_trials, *plan.trials, *plan.pending_trials]:
        for key, value in flatten(trial.config.model_dump()).items():
            if key not in (*RESERVED_KEYS, *KEYS_NOT_HASHED):
                values.setdefault(key, set()).add(str(value))
    return values


def _has_records(study: Study, path: Path, run: Run) -> bool:
    try:
        plan = make_plan(study, path, budget=run.budget, flags=run.flags)
    except ConfigError:  # the values are of another study
        return False
    return any(record_path(run.folder, trial.name).exists() for trial in [*plan.tuning_trials, *plan.trials])
