"""A study: which configurations are compared, on which seeds, and what is claimed of them.

A study file is YAML. `load_study` reads it and refuses what is wrong in it by itself; what its overrides do to a
configuration is judged by `gnunet.ablation.plan`.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from gnunet.config import Config, Text
from gnunet.config.merge import Layer, Tree, inline, lines_of, load_yaml, refuse, resolve
from gnunet.config.schema import InvalidConfig, Problem, Section, ValidValues, find, one_of
from gnunet.errors import ConfigError


def label(value: Any) -> str:
    """The name of an arm, an axis value or a budget: text, or what YAML reads as a number or a word."""
    return value if isinstance(value, str) else inline(value)


def _labelled(value: Any) -> Any:
    return {label(key): below for key, below in value.items()} if isinstance(value, Mapping) else value


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _empty(value: Any) -> Any:
    return {} if value is None else value


Overrides = Annotated[
    dict[str, Any], BeforeValidator(_empty), ValidValues("a mapping from keys of the configuration to values")
]
Selector = Annotated[
    dict[str, str],
    BeforeValidator(lambda value: {k: label(v) for k, v in value.items()} if isinstance(value, Mapping) else value),
    Field(min_length=1),
    ValidValues("cells by arm and axis values, such as {arm: batch, batch: 2}"),
]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _by_label(what: str, inner: Any) -> Any:
    return Annotated[dict[str, inner], BeforeValidator(_labelled), Field(min_length=1), ValidValues(what)]


class Arm(Section):
    """One of the things compared."""

    set: Overrides = {}
    """What it changes in the base configuration."""
    axes: list[Text] | None = None
    """The axes that it crosses; null is all of them, an empty list makes one cell for each seed."""


class Axis(Section):
    """What is varied within arms."""

    label: Text
    """The axis' title in figures."""
    scale: Literal["linear", "log", "category"] = "category"
    """How figures place the values; linear and log need numbers."""
    values: _by_label("a mapping from values' names to overrides, such as {2: {train.batch_size: 2}}", Overrides)
    """The values by name, in order, and what each changes in the configuration."""

    @model_validator(mode="after")
    def _has_numbers(self) -> "Axis":
        least = {"linear": -math.inf, "log": 0.0}.get(self.scale)
        wrong = [name for name in self.values if least is not None and not _number(name) > least]
        if wrong:
            words = "numbers above 0" if self.scale == "log" else "numbers"
            raise InvalidConfig([Problem.of("values", ", ".join(wrong), f"{words} with scale {self.scale}")])
        return self


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class Tuning(Section):
    """The same search of one key's value for every arm at every point, before the cells that are reported."""

    key: Text
    """The key, for instance train.learning_rate."""
    values: list[Any] = Field(min_length=1)
    """What is tried."""
    set: Overrides = {}
    """What only the tuning cells change, for instance evaluate.every, which they may not need."""
    seeds: Seeds
    """Seeds of the tuning cells; none of the study's, so that what is chosen is not what is reported."""
    metric: Text = "validation_loss"
    """The value with the best mean of this over the tuning seeds is chosen, of equal ones the first; a cell that
    diverged is worse than any that did not."""


class Comparison(Section):
    """What is expected of two sets of cells."""

    left: Selector
    """Cells by arm and axis values."""
    expect: Literal["higher", "lower", "same"]
    """What the left is, compared with the right."""
    right: Selector
    """Cells by arm and axis values."""


class Hypothesis(Section):
    """A claim that the study tests; all its comparisons must hold."""

    claim: Text
    """In words."""
    source: Text | None = None
    """Where the claim is from."""
    metric: Text = "validation_loss"
    """What is compared."""
    margin: float = Field(0.0, ge=0)
    """Relative to the right side: differences up to it do not count; `same` means within it."""
    comparisons: list[Comparison] = Field(min_length=1)
    """What is expected."""

    @model_validator(mode="after")
    def _has_margin(self) -> "Hypothesis":
        if self.margin == 0 and any(comparison.expect == "same" for comparison in self.comparisons):
            raise InvalidConfig([Problem.of("margin", "0", "a number above 0 with expect: same")])
        return self


class Study(Section):
    """A study file."""

    title: Text
    """What the report is called."""
    question: Text
    """What the study asks, in a sentence or two."""
    config: Annotated[list[Text], BeforeValidator(_one_or_more), ValidValues("a file or a list of files")] = []
    """Configuration files that every cell starts from, relative to the study file; later ones win."""
    base: Overrides = {}
    """What every cell changes in them; nested or dotted keys."""
    budgets: _by_label("a mapping from names to overrides or files", Overrides | Text) | None = None
    """Sizes that the study can be run at, each what it changes in the base, or a file of that, relative to the study
    file; the first is the default."""
    seeds: Seeds = [0]
    """Seeds of every arm at every point."""
    baseline: Text
    """The arm that the others are compared with."""
    arms: _by_label("a mapping from names to overrides, or to {set: overrides, axes: [axis, ...]}", Arm)
    """What is compared."""
    axes: Annotated[dict[str, Axis], BeforeValidator(_labelled), ValidValues("a mapping from names to axes")] = {}
    """What is varied."""
    tuning: Tuning | None = None
    """A search of one key's value for every arm at every point; null is none."""
    hypotheses: list[Hypothesis] = []
    """What is claimed."""

    def axes_of(self, arm: str) -> list[str]:
        """The axes that an arm crosses, in the study's order."""
        own = self.arms[arm].axes
        return [axis for axis in self.axes if own is None or axis in own]

    @model_validator(mode="after")
    def _fits(self) -> "Study":
        if problems := [*self._problems_of_names(), *self._problems_of_seeds(), *self._problems_of_hypotheses()]:
            raise InvalidConfig(problems)
        return self

    def _problems_of_names(self) -> Iterator[Problem]:
        if self.baseline not in self.arms:
            yield Problem.of("baseline", self.baseline, one_of(list(self.arms)))
        if "arm" in self.axes:
            yield Problem.of("axes", "an axis called arm", "any other name, since comparisons name arms by it")
        for name, arm in self.arms.items():
            for axis in arm.axes or []:
                if axis not in self.axes:
                    valid = one_of(list(self.axes)) if self.axes else "none, since the study has no axes"
                    yield Problem.of("arms", f"axis {axis} in arm {name!r}", valid)

    def _problems_of_seeds(self) -> Iterator[Problem]:
        if len(set(self.seeds)) < len(self.seeds):
            yield Problem.of("seeds", inline(self.seeds), "each seed once")
        if self.tuning is None:
            return
        if set(self.tuning.seeds) & set(self.seeds) or len(set(self.tuning.seeds)) < len(self.tuning.seeds):
            valid = f"each seed once, none of the study's seeds {inline(self.seeds)}"
            yield Problem.of("tuning.seeds", inline(self.tuning.seeds), valid)
        if find(Config, tuple(self.tuning.key.split("."))) is None:
            yield Problem.of("tuning.key", self.tuning.key, "a key of the configuration, such as train.learning_rate")

    def _problems_of_hypotheses(self) -> Iterator[Problem]:
        for hypothesis in self.hypotheses:
            for comparison in hypothesis.comparisons:
                for side in ("left", "right"):
                    what, valid = self._problem_of_selector(getattr(comparison, side)) or (None, None)
                    if what is not None:
                        yield Problem.of("hypotheses", f"{what} on the {side} of {hypothesis.claim!r}", valid)

    def _problem_of_selector(self, selector: Mapping[str, str]) -> tuple[str, str] | None:
        """What is wrong with a selector and what would be valid."""
        arm = selector.get("arm")
        if arm not in self.arms:
            return "no arm" if arm is None else f"arm {arm}", f"arm: {one_of(list(self.arms))}"
        axes = self.axes_of(arm)
        for axis, value in selector.items():
            if axis == "arm":
                continue
            if axis not in axes:
                crossed = one_of(axes) if axes else "none"
                return f"{axis}: {value}", f"axes that arm {arm!r} crosses: {crossed}"
            if value not in self.axes[axis].values:
                return f"{axis}: {value}", f"{axis}: {one_of(list(self.axes[axis].values))}"
        if missing := [axis for axis in axes if axis not in selector]:
            return f"no {missing[0]}", f"{missing[0]}: {one_of(list(self.axes[missing[0]].values))}"
        return None


def load_study(path: Path) -> Study:
    """Read and check a study file.

    Raises:
        ConfigError: the file cannot be read, or something in it is not valid; one line for each problem.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: {reason}; valid: a study file, such as configs/ablations/smoke.yaml") from None
    values = load_yaml(text, path.name)
    # Each part by itself first, so that a message names the arm, axis or hypothesis that it is about.
    parts = _Parts()
    for key, section in (("arms", Arm), ("axes", Axis)):
        if isinstance(given := values.get(key), dict):
            if section is Arm:
                given = {name: _arm_keys(arm) for name, arm in given.items()}
            what = section.__name__.lower()
            values[key] = {
                label(name): parts.resolve(section, part, f"{what} {label(name)!r} of {path.name}")
                for name, part in given.items()
            }
    if isinstance(given := values.get("hypotheses"), list):
        where = f"of {path.name}"
        values["hypotheses"] = [
            parts.hypothesis(part, f"hypothesis {number} {where}") for number, part in enumerate(given, start=1)
        ]
    refuse(parts.problems, path.name)
    return resolve(Study, [Layer(path.name, values)])


def _arm_keys(value: Any) -> Any:
    """An arm's keys: an arm may be given by its overrides alone."""
    return value if isinstance(value, dict) and value.keys() & {"set", "axes"} else {"set": value}


class _Parts:
    """Resolves parts of a study and collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def resolve(self, section: type[Tree], values: Any, where: str) -> Tree | None:
        """The part, None where it is refused."""
        try:
            if not isinstance(values, dict):
                keys = ", ".join(section.model_fields)
                raise ConfigError(f"{where}: given {inline(values)}; valid: a mapping with {keys}")
            return resolve(section, [Layer(where, values)])
        except ConfigError as error:
            # What is missing is from no layer; the part is named all the same.
            self.problems += [line.replace("(default)", f"({where})") for line in lines_of(error)]
            return None

    def hypothesis(self, values: Any, where: str) -> Hypothesis | None:
        """A hypothesis with its comparisons, None where some of it is refused."""
        if isinstance(values, dict) and isinstance(given := values.get("comparisons"), list):
            comparisons = [
                self.resolve(Comparison, part, f"comparison {number} of {where}")
                for number, part in enumerate(given, start=1)
            ]
            if None in comparisons:
                return None
            values = {**values, "comparisons": comparisons}
        return self.resolve(Hypothesis, values, where)
