"""Finds the runs of a study that have records, where a report is asked for without the run's flags."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gnunet.ablation.plan import KEYS_NOT_HASHED, RESERVED_KEYS, Plan, flatten, make_plan
from gnunet.ablation.records import read_records
from gnunet.ablation.study import Study
from gnunet.config.merge import nest
from gnunet.errors import ConfigError


class Run(NamedTuple):
    """What a study was run with."""

    folder: Path
    budget: str | None
    flags: Mapping[str, Any]  # overrides of the configuration, nested


def find_runs(study: Study, path: Path, folders: Sequence[Path], flags: Mapping[str, Any]) -> list[Run]:
    """The runs of the study in the file `path`, at any budget, with records in any of the folders.

    Where a folder has no record of a trial with these `flags`, they are those by which its records differ from the
    trials.
    """
    plans = {budget: make_plan(study, path, budget=budget, flags=flags) for budget in study.budgets or [None]}
    found: list[Run] = []
    for folder in folders:
        names = {record.stem for record in (folder / "records").glob("*.json")}
        runs = [Run(folder, budget, flags) for budget, plan in plans.items() if names & _names(plan)]
        found += runs or _with_other_flags(study, path, folder, plans, flags)
    return found


def _names(plan: Plan) -> set[str]:
    return {trial.name for trial in [*plan.tuning_trials, *plan.trials]}


def _with_other_flags(
    study: Study, path: Path, folder: Path, plans: Mapping[str | None, Plan], flags: Mapping[str, Any]
) -> Iterator[Run]:
    """The runs in a folder by the values that no planned trial has: of each record, at the budget with the fewest."""
    records = read_records(folder)
    planned = {budget: _values(plan) for budget, plan in plans.items()}
    tried: list[Run] = []
    for record in records.values():
        config = {
            key: v for key, v in flatten(record["config"]).items() if key not in (*RESERVED_KEYS, *KEYS_NOT_HASHED)
        }
        others = {
            budget: {key: value for key, value in config.items() if str(value) not in values.get(key, {str(value)})}
            for budget, values in planned.items()
        }
        budget = min(others, key=lambda budget: len(others[budget]))
        run = Run(folder, budget, nest((flatten(flags) | others[budget]).items()))
        if run in tried:
            continue
        tried.append(run)
        try:
            if _names(make_plan(study, path, budget=budget, flags=run.flags)) & records.keys():
                yield run
        except ConfigError:  # the record is of another study
            continue


def _values(plan: Plan) -> dict[str, set[str]]:
    """The values of each key in any trial of a plan, as text."""
    values: dict[str, set[str]] = {}
    for trial in [*plan.tuning_trials, *plan.trials, *plan.pending_trials]:
        for key, value in flatten(trial.config.model_dump()).items():
            if key not in (*RESERVED_KEYS, *KEYS_NOT_HASHED):
                values.setdefault(key, set()).add(str(value))
    return values
