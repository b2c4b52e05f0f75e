"""From a study to its cells: one training run each, with a resolved configuration and a name made from it."""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gnunet.ablation.overrides import StudyLayers
from gnunet.ablation.records import metric_names, rank, record_path
from gnunet.ablation.study import Study
from gnunet.config import Config
from gnunet.config.merge import inline, lines_of, refuse
from gnunet.config.schema import Section, one_of
from gnunet.errors import CheckpointError, ConfigError

Point = tuple[tuple[str, str], ...]
"""(axis, value) pairs, in the study's order of axes; empty where an arm crosses none."""
Records = Mapping[str, Mapping[str, Any]]
"""Records by the names of their cells."""

UNNAMED = ("run_dir", "data.cache_dir", "data.num_workers", "train.trackers")
"""Keys that say where and how fast a cell runs; cells that differ in nothing else are one."""


@dataclass(frozen=True)
class Cell:
    """One training run of a study."""

    arm: str
    point: Point
    seed: int
    config: Config
    """Resolved; the runner sets run_dir."""
    tuned: str | None = None
    """In a tuning cell the value that it tries, as a study file has it."""

    @property
    def name(self) -> str:
        """12 hex digits of the SHA-256 of the configuration: of all keys but UNNAMED that are not at their
        default, so that a key which gnunet gets later changes no name."""
        text = json.dumps(_deviations(self.config), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """The cell in words."""
        tuned = [] if self.tuned is None else [f"trying {self.tuned}"]
        return ", ".join([self.arm, *(f"{axis} {value}" for axis, value in self.point), f"seed {self.seed}", *tuned])


def _deviations(section: Section, above: str = "") -> dict[str, Any]:
    """The keys of a tree that are not at their default, and every `kind`, as nested mappings."""
    found: dict[str, Any] = {}
    for name, key in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            if below := _deviations(value, f"{above}{name}."):
                found[name] = below
        elif f"{above}{name}" not in UNNAMED and (name == "kind" or value != key.get_default()):
            found[name] = value
    return found


@dataclass(frozen=True)
class Plan:
    """The cells of a study, as far as they are known."""

    cells: list[Cell] = field(default_factory=list)
    """What is reported, by arm, point and seed. Cells with the same configuration share a name and a run."""
    tuning_cells: list[Cell] = field(default_factory=list)
    waiting: list[tuple[str, Point]] = field(default_factory=list)
    """Arms and points that have no cells to report yet, since their tuning is not finished."""
    chosen: dict[tuple[str, Point], str] = field(default_factory=dict)
    """What tuning has chosen for an arm at a point, as a study file has it."""


def make_plan(
    study: Study,
    path: Path,
    *,
    budget: str | None = None,
    only: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    records: Records | None = None,
) -> Plan:
    """Resolve the configuration of every cell.

    Layers, each over the ones before: the study's configuration files, its base, the budget, the arm, the point's
    axis values, the value that tuning tries or has chosen, the flags.

    Args:
        study: as `load_study` gives it.
        path: its file, which configuration files are relative to.
        budget: one of the study's budgets; None is the first of them.
        only: plan these arms alone; empty is all.
        flags: what the command line says of the configuration, as a nested mapping.
        records: what there is so far; it decides what tuning chooses.

    Raises:
        ConfigError: an arm, a budget, a metric or a file that does not exist; an override that is not valid, with
            the arm or the axis value that it is from. One line for each problem.
    """
    if unknown := [arm for arm in only if arm not in study.arms]:
        raise ConfigError(f"--only: given {', '.join(unknown)}; valid: {', '.join(study.arms)}")
    layers = StudyLayers(study, path, budget_of(study, budget), flags or {})
    plan = Plan()
    problems: dict[str, list[str]] = {}  # with the arms that have them
    arms = list(only or study.arms)
    for arm in arms:
        for point in points_of(study, arm):
            try:
                _add(plan, study, layers, arm, point, records or {})
            except ConfigError as error:
                for line in lines_of(error):
                    problems.setdefault(line, []).append(arm)
    refuse((_with_arms(line, list(dict.fromkeys(found)), arms) for line, found in problems.items()), path.name)
    refuse(_unknown_metrics(study, layers, arms[0]), path.name)
    return plan


def budget_of(study: Study, given: str | None) -> str | None:
    """The budget to use: the one given, or the study's first; None where it has none.

    Raises:
        ConfigError: the study has no such budget.
    """
    budgets = list(study.budgets or {})
    if given is not None and given not in budgets:
        raise ConfigError(f"--budget: given {given}; valid: {', '.join(budgets) or 'none, the study has no budgets'}")
    return given if given is not None else next(iter(budgets), None)


def points_of(study: Study, arm: str) -> list[Point]:
    """The points of the axes that an arm crosses, those of the last axis together."""
    axes = study.axes_of(arm)
    values = (study.axes[axis].values for axis in axes)
    return [tuple(zip(axes, chosen, strict=True)) for chosen in itertools.product(*values)]


def _add(plan: Plan, study: Study, layers: StudyLayers, arm: str, point: Point, records: Records) -> None:
    """Add the cells of an arm at a point to a plan."""

    def cells(seeds: Sequence[int], *value: Any, tuned: str | None = None) -> list[Cell]:
        config = layers.resolve(arm, point, list(value), tries=tuned is not None)
        return [Cell(arm, point, seed, config.model_copy(update={"seed": seed}), tuned) for seed in seeds]

    if (tuning := study.tuning) is None:
        plan.cells.extend(cells(study.seeds))
        return
    tried = [cells(tuning.seeds, value, tuned=inline(value)) for value in tuning.values]
    plan.tuning_cells.extend(itertools.chain(*tried))
    if any(cell.name not in records for group in tried for cell in group):
        plan.waiting.append((arm, point))
        return
    means = [math.fsum(rank(records[cell.name], tuning.metric) for cell in group) / len(group) for group in tried]
    best = tuning.values[means.index(min(means))]  # of equal ones the first
    plan.chosen[arm, point] = inline(best)
    plan.cells.extend(cells(study.seeds, best))


def _with_arms(line: str, found: list[str], arms: list[str]) -> str:
    """A problem, with the arms that have it where they are neither all of them nor in its words."""
    if len(found) == len(arms) or f"arm {found[0]!r}" in line:
        return line
    return f"{line} [with {', '.join(f'arm {arm!r}' for arm in found)}]"


def _unknown_metrics(study: Study, layers: StudyLayers, arm: str) -> list[str]:
    """What is wrong with the metrics that a study names, one line each, by what cells of an arm measure."""
    tuned = [] if study.tuning is None else study.tuning.values[:1]
    reported = metric_names(layers.resolve(arm, points_of(study, arm)[0], tuned))
    names = [(hypothesis.metric, f"hypothesis {hypothesis.claim!r}", reported) for hypothesis in study.hypotheses]
    if study.tuning is not None:
        known = metric_names(layers.resolve(arm, points_of(study, arm)[0], tuned, tries=True))
        names.append((study.tuning.metric, "tuning", known))
    return [
        f"metric: given {name} ({where}); valid: {one_of(known)}" for name, where, known in names if name not in known
    ]


def check_records(cells: Sequence[Cell], records: Records, folder: Path, *, processes: int | None = None) -> None:
    """Refuse records of cells that would now come out otherwise, which their names do not tell.

    Args:
        cells, records: of a study.
        folder: where the records are.
        processes: what cells will run on; None where none will.

    Raises:
        CheckpointError: a default was another when a record was made, or the number of processes was, where norms
            depend on the batch.
    """
    for cell in cells:
        if (record := records.get(cell.name)) is None:
            continue
        path, then = record_path(folder, cell.name), record["environment"]["processes"]
        old, new = _flat(record["config"]), _flat(cell.config.model_dump())
        keys = [key for key in old if key in new and old[key] != new[key] and key not in UNNAMED]
        if keys:
            changed = ", ".join(f"{key} {inline(old[key])}, now {inline(new[key])}" for key in keys)
            raise CheckpointError(f"{path}: made with other defaults: {changed}; remove it to run the cell again")
        if record["batch_dependent"] and processes not in (None, then):
            raise CheckpointError(
                f"{path}: made on {then} processes, now {processes}, and its norms depend on the batch of each; run "
                "the study as before, or in another --folder"
            )


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found
