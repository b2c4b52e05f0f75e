"""The trials of a study: their configurations, resolved from its overrides, their names, and what tuning chooses."""

import hashlib
import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gnunet.ablation.records import LOSSES, example_weights, metric_names, rank, record_path
from gnunet.ablation.study import STABILITY_EDGE, Study, Task
from gnunet.config import Config, load_config
from gnunet.config.merge import ConfigSource, issue_lines, nest, raise_all
from gnunet.config.renamed_keys import with_former_names
from gnunet.config.schema import Section, find, join_or, sections_of
from gnunet.config.yaml_io import format_value, load_yaml_file
from gnunet.errors import CheckpointError, ConfigError

Setting = tuple[tuple[str, str], ...]
"""(axis, value) pairs, in the study's order of axes; empty where a variant crosses none."""
Records = Mapping[str, Mapping[str, Any]]  # records by the names of their trials
RESERVED_KEYS = {"seed": "seeds in the study", "run_dir": "--folder"}
"""Keys that overrides may not set, and what sets them."""
REBUILT_KINDS = {"none", "scaled_ws", "pixel", "magnitude_preserving"}
"""Kinds of norms whose networks are others than in version 0.1.0, which had no validation.draw."""
KEYS_NOT_HASHED = ("run_dir", "data.cache_dir", "data.num_workers", "train.trackers")
"""Keys that do not affect the result of a trial; trials that differ in nothing else are one run."""


class Condition(NamedTuple):
    """What is repeated over the seeds: a variant in a setting of the axes that it crosses."""

    variant: str
    setting: Setting


@dataclass(frozen=True)
class Trial:
    """One training run of a study."""

    variant: str
    setting: Setting
    seed: int
    config: Config  # resolved; the runner sets run_dir
    tuned: str | None = None  # in a tuning trial, the value that it tries, as YAML
    task: Task = "diffusion"

    @property
    def condition(self) -> Condition:
        return Condition(self.variant, self.setting)

    @property
    def name(self) -> str:
        """12 hex digits of the SHA-256 of task and configuration: of what is not at its default, under first names, so
        that adding or renaming a key changes no name."""
        keys = with_former_names(non_default_keys(self.config))
        keys |= {} if self.task == "diffusion" else {"task": self.task}
        text = json.dumps(keys, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def run_dir(self, folder: Path) -> Path:
        """Its run folder in a study's folder."""
        return folder / "trials" / self.name

    @property
    def title(self) -> str:
        """Variant, setting, seed and tuned value as text."""
        parts = [self.variant, *(f"{axis} {value}" for axis, value in self.setting), f"seed {self.seed}"]
        return ", ".join(parts if self.tuned is None else [*parts, f"trying {self.tuned}"])


def non_default_keys(section: Section, above: str = "") -> dict[str, Any]:
    """The keys that are not at their default, and every `kind`, without KEYS_NOT_HASHED, as nested mappings."""
    found: dict[str, Any] = {}
    for name, key in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            if below := non_default_keys(value, f"{above}{name}."):
                found[name] = below
        elif f"{above}{name}" not in KEYS_NOT_HASHED and (name == "kind" or value != key.get_default()):
            found[name] = value
    return found


@dataclass(frozen=True)
class Plan:
    """The trials of a study that are known so far."""

    trials: list[Trial] = field(default_factory=list)
    """The reported trials, by variant, setting and seed. Trials with the same configuration share a name and a run."""
    tuning_trials: list[Trial] = field(default_factory=list)
    pending_tuning: list[Condition] = field(default_factory=list)
    """Conditions whose reported trials are unknown until their tuning is finished."""
    pending_trials: list[Trial] = field(default_factory=list)
    """Their reported trials at the first value of tuning, which say how long those will take, not what they are."""
    tuning_scores: dict[Condition, dict[str, float | None]] = field(default_factory=dict)
    """By condition and value, as YAML: the mean of the tuning metric over the tuning seeds, lower better; infinite
    where a trial diverged, None where one has no record."""
    chosen: dict[Condition, str] = field(default_factory=dict)
    """The value that tuning has chosen for a condition, as YAML."""
    tuned_at_edge: list[Condition] = field(default_factory=list)
    """Conditions whose tuned value is the first, the last that may be chosen, or nearer to one that fails than it
    should be: a better one may lie beyond the values."""


class StudyLayers:
    """The sources that the configurations of a study are merged from."""

    def __init__(self, study: Study, path: Path, budget: str | None, flags: Mapping[str, Any]):
        self.study, self.name = study, path.name
        tuned = {} if study.tuning is None else {study.tuning.key: "tuning in the study"}
        self.reserved_above_base = RESERVED_KEYS | tuned
        self.below = [_read(path.parent / file, f"config {file} of {path.name}") for file in study.config]
        self.below.append(self._layer("base", study.base))
        if budget is not None:
            size, where = study.budgets[budget], f"budget {budget!r}"
            if isinstance(size, str):
                self.below.append(_read(path.parent / size, f"{where} of {path.name}"))
            else:
                self.below.append(self._layer(where, size))
        self.above = _checked(ConfigSource("command line", dict(flags)), self.reserved_above_base)

    def resolve(self, variant: str, setting: Setting, tuning: Mapping[str, Any]) -> Config:
        """The configuration of a variant in a setting, under the overrides of `tuning`."""
        reserved = self.reserved_above_base
        layers = [self._layer(f"variant {variant!r}", self.study.variants[variant].set, reserved)]
        for axis, value in setting:
            layers.append(self._layer(f"{axis} {value}", self.study.axes[axis].values[value], reserved))
        config = load_config(*self.below, *layers, self._layer("tuning", tuning), self.above)
        if self.study.task == "classification":
            raise_all(_unfit_for_classification(config), self.name)
        return config

    def _layer(
        self, what: str, overrides: Mapping[str, Any], reserved: Mapping[str, str] = RESERVED_KEYS
    ) -> ConfigSource:
        where = f"{what} of {self.name}"
        return _checked(ConfigSource(where, nested(overrides, where)), reserved)


def _unfit_for_classification(config: Config) -> list[str]:
    """A line for each key of a configuration that a classifier cannot be trained by."""
    data = config.data
    wrong = {
        "data.class_conditional": None if data.class_conditional else "true",
        "data.validation_images": None if data.validation_images >= 3 else "at least 3",
        "data.autoencoder": data.autoencoder and "null",
        "data.condition": data.condition and "null",
        "model.class_embed_type": config.model.class_embed_type and "null",
        "train.micro_batch_size": config.train.micro_batch_size and "null",
    }
    return [f"{key}: valid: {valid} with task: classification" for key, valid in wrong.items() if valid]


def nested(overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Nested mappings from overrides with dotted keys at any depth; raises ConfigError for a key given twice."""
    values: dict[tuple[str, ...], Any] = {}
    for path, value in _leaves(overrides):
        if any(path[: len(other)] == other or other[: len(path)] == path for other in values):
            raise ConfigError(f"{'.'.join(path)}: given twice ({where}); valid: once")
        values[path] = value
    return nest((".".join(path), value) for path, value in values.items())


def _leaves(overrides: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The path and value of every key below the sections."""
    for key, value in overrides.items():
        path = (*above, *str(key).split("."))
        field = find(Config, ".".join(path))
        if isinstance(value, Mapping) and sections_of(field):
            yield from _leaves(value, path)
        else:
            yield path, value


def _checked(layer: ConfigSource, reserved: Mapping[str, str]) -> ConfigSource:
    """The source itself; raises ConfigError if it sets a reserved key."""
    for path, value in _leaves(layer.values):
        if decides := reserved.get(key := ".".join(path)):
            raise ConfigError(f"{key}: given {format_value(value)} ({layer.name}); valid: leave it to {decides}")
    return layer


def _read(path: Path, where: str) -> ConfigSource:
    hint = "valid: a configuration file, relative to the study"
    return ConfigSource(path.name, load_yaml_file(path, f"{where}: {path}", hint))


def make_plan(
    study: Study,
    path: Path,
    *,
    budget: str | None = None,
    only: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    records: Records | None = None,
) -> Plan:
    """Resolve the configuration of every trial of the study in the file `path`; tuning chooses by the `records`.

    Later sources win: the study's configuration files, its base, the budget, the variant, the axis values of the
    setting, the tuned value, the `flags` (nested).

    Raises:
        ConfigError: one line for each problem, with the variant or axis value that it is from.
    """
    study.check_variants(only)
    layers = StudyLayers(study, path, budget_of(study, budget), flags or {})
    plan = Plan()
    problems: dict[str, list[str]] = {}  # with the variants that have them
    variants = list(only or study.variants)
    for variant in variants:
        for setting in settings_of(study, study.axes_of(variant)):
            try:
                _add(plan, study, layers, variant, setting, records or {})
            except ConfigError as error:
                for line in issue_lines(error):
                    problems.setdefault(line, []).append(variant)
    raise_all(
        (_with_variants(line, list(dict.fromkeys(found)), variants) for line, found in problems.items()), path.name
    )
    raise_all(_unknown_metrics(study, layers, variants[0]), path.name)
    return plan


def budget_of(study: Study, given: str | None) -> str | None:
    """The given budget, or the study's first; None where it has none. Raises ConfigError for an unknown one."""
    budgets = list(study.budgets or {})
    if given is not None and given not in budgets:
        raise ConfigError(f"--budget: given {given}; valid: {', '.join(budgets) or 'none, the study has no budgets'}")
    return given if given is not None else next(iter(budgets), None)


def settings_of(study: Study, axes: Collection[str]) -> list[Setting]:
    """Every setting of some of a study's axes, in its order; the last axis varies fastest."""
    values = ([(axis, value) for value in study.axes[axis].values] for axis in study.axes if axis in axes)
    return list(itertools.product(*values))


def _add(plan: Plan, study: Study, layers: StudyLayers, variant: str, setting: Setting, records: Records) -> None:
    """Add the trials of a variant in a setting to a plan."""

    def trials(seeds: Sequence[int], overrides: Mapping[str, Any], tuned: str | None = None) -> list[Trial]:
        config = layers.resolve(variant, setting, overrides)
        return [
            Trial(variant, setting, seed, config.model_copy(update={"seed": seed}), tuned, study.task) for seed in seeds
        ]

    if (tuning := study.tuning) is None:
        plan.trials.extend(trials(study.seeds, {}))
        return
    condition, means = Condition(variant, setting), []
    for value in tuning.values:
        group = trials(tuning.seeds, {tuning.key: value, **tuning.set}, format_value(value))
        plan.tuning_trials.extend(group)
        found = [records[trial.name] for trial in group if trial.name in records]
        if tuning.metric in LOSSES and any(example_weights(record, tuning.metric) is None for record in found):
            given = f"tuning.metric: given {tuning.metric}, which records of earlier versions do not have"
            raise ConfigError(f"{given}; valid: validation_loss, or another --folder")
        ranks = [rank(record, tuning.metric) for record in found]
        means.append(math.fsum(ranks) / len(group) if len(ranks) == len(group) else None)
    plan.tuning_scores[condition] = dict(zip(map(format_value, tuning.values), means, strict=True))
    if None in means:
        plan.pending_tuning.append(condition)
        plan.pending_trials.extend(trials(study.seeds, {tuning.key: tuning.values[0]}))
        return
    trains, steps = list(map(math.isfinite, means)), tuning.steps_below
    safe = [i for i in range(len(means) - steps) if all(trains[i : i + steps + 1])]
    best = min(safe or range(len(means)), key=means.__getitem__)  # of equal ones the first
    if len(means) > 1 and (best in (0, len(means) - 1 - steps) or best not in safe):
        plan.tuned_at_edge.append(condition)
    plan.chosen[condition] = format_value(tuning.values[best])
    plan.trials.extend(trials(study.seeds, {tuning.key: tuning.values[best]}))


def _with_variants(line: str, found: list[str], variants: list[str]) -> str:
    """A problem with the variants that have it, unless all have it or its text names the variant."""
    if len(found) == len(variants) or f"variant {found[0]!r}" in line:
        return line
    return f"{line} [with {', '.join(f'variant {variant!r}' for variant in found)}]"


def _unknown_metrics(study: Study, layers: StudyLayers, variant: str) -> list[str]:
    """A line for each metric in a study that the trials of a variant do not measure."""
    setting, tuning = settings_of(study, study.axes_of(variant))[0], study.tuning
    tuned = {} if tuning is None else {tuning.key: tuning.values[0]}
    reported = [*metric_names(layers.resolve(variant, setting, tuned), study.task), STABILITY_EDGE]
    names = [(hypothesis.metric, f"hypothesis {hypothesis.claim!r}", reported) for hypothesis in study.hypotheses]
    if tuning is not None:
        config = layers.resolve(variant, setting, tuned | tuning.set)
        names.append((tuning.metric, "tuning", metric_names(config, study.task)))
    return [
        f"metric: given {name} ({where}); valid: {join_or(known)}" for name, where, known in names if name not in known
    ]


def check_records(trials: Sequence[Trial], records: Records, folder: Path, *, processes: int | None = None) -> None:
    """Raise CheckpointError where a recorded trial would have another result now, though it has the same name.

    That is where a default has changed or, with norms that depend on the batch, the number of processes of a trial
    (`processes`; None where none will run).
    """
    for trial in trials:
        if (record := records.get(trial.name)) is None:
            continue
        path, then = record_path(folder, trial.name), record["environment"]["processes"]
        if "draw" not in record["config"].get("validation", {}) and REBUILT_KINDS & {*record.get("norm_kinds", ())}:
            raise CheckpointError(f"{path}: of another network of an earlier version; remove it to run the trial again")
        old, new = flatten(record["config"]), flatten(trial.config.model_dump())
        keys = [key for key in old if key in new and old[key] != new[key] and key not in KEYS_NOT_HASHED]
        if keys:
            changed = ", ".join(f"{key} {format_value(old[key])}, now {format_value(new[key])}" for key in keys)
            raise CheckpointError(f"{path}: made with other defaults: {changed}; remove it to run the trial again")
        if record["batch_dependent"] and processes not in (None, then):
            raise CheckpointError(
                f"{path}: made on {then} processes, now {processes}, and its norms depend on the batch of each; run "
                "the study as before, or in another --folder"
            )


def flatten(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flatten(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found
