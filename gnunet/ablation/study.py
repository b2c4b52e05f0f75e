"""A study file: the configurations that are compared, on which seeds, and the claims that are tested.

This checks the file alone; `gnunet.ablation.plan` checks what its overrides do to a configuration.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gnunet.config import Config, Text
from gnunet.config.merge import ConfigSource, issue_lines, merge_and_validate, raise_all
from gnunet.config.schema import ConfigIssue, Section, ValidValues, find, join_or
from gnunet.config.yaml_io import format_value, load_yaml_file
from gnunet.errors import ConfigError

STABILITY_EDGE = "stability_edge"
"""The metric of a variant on all values of the study's axis: the largest up to which every trial of a seed trains."""


def label(value: Any) -> str:
    """The name of a variant, an axis value or a budget as text; YAML may read it as a number or a boolean."""
    return value if isinstance(value, str) else format_value(value)


def _with_text_keys(value: Any) -> Any:
    return {label(key): item for key, item in value.items()} if isinstance(value, Mapping) else value


def _selector(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {"variant" if key == "arm" else key: label(item) for key, item in value.items()}  # arm: until 0.1.0


def _by_name(valid: str, item: Any) -> Any:
    return Annotated[dict[str, item], BeforeValidator(_with_text_keys), Field(min_length=1), ValidValues(valid)]


Overrides = Annotated[
    dict[str, Any],
    BeforeValidator(lambda value: {} if value is None else value),
    ValidValues("a mapping from keys of the configuration to values"),
]
Selector = Annotated[
    dict[str, str],
    BeforeValidator(_selector),
    Field(min_length=1),
    ValidValues("trials by variant and axis values, such as {variant: batch, size: 2}"),
]
Task = Literal["diffusion", "classification"]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Variant(Section):
    """One of the things that are compared."""

    set: Overrides = {}  # what it changes in the base configuration
    axes: list[Text] | None = None
    """The axes that it crosses: null is all of them, an empty list is none (one trial for each seed)."""


class Axis(Section):
    """What is varied within variants."""

    label: Text  # the axis title in figures
    scale: Literal["linear", "log", "category"] = "category"
    """How figures place the values; linear and log need numbers."""
    values: _by_name("a mapping from names of values to overrides, such as {2: {train.batch_size: 2}}", Overrides)
    """The values by name, in order, and what each changes in the configuration."""

    def issues(self) -> Iterator[ConfigIssue]:
        lowest, valid = (0.0, "numbers above 0") if self.scale == "log" else (-math.inf, "numbers")
        wrong = [name for name in self.values if not _to_float(name) > lowest]
        if wrong and self.scale != "category":
            yield ConfigIssue.of("values", ", ".join(wrong), f"{valid} with scale {self.scale}")


def _to_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class Tuning(Section):
    """A search over the values of one key, the same for every variant in every setting, before the reported trials."""

    key: Text  # the key, for instance train.learning_rate
    values: list[Any] = Field(min_length=1)  # the values that are tried
    set: Overrides = {}  # overrides of the tuning trials alone, for instance evaluate.every, which they may not need
    seeds: Seeds
    """Seeds of the tuning trials. They must differ from the study's: what is chosen on a seed is not reported on it."""
    metric: Text = "training_loss"
    """The value with the best mean of this metric over the tuning seeds is chosen, the first of equal ones. A trial
    that diverged or collapsed is worse than any that did not."""
    steps_below: int = Field(1, ge=0)
    """How far the choice stays from values that fail: the next so many values train at all tuning seeds, too. 0 chooses
    the best of all, and the values need not be ascending numbers."""


class Comparison(Section):
    """The expected order of two sets of trials."""

    left: Selector  # trials by variant and axis values
    expect: Literal["higher", "lower", "better", "worse", "same"]
    """What the left is, compared with the right; better and worse are by the direction of the metric."""
    right: Selector  # trials by variant and axis values


class Hypothesis(Section):
    """A claim that the study tests; all its comparisons must hold."""

    claim: Text  # the claim as a sentence
    source: Text | None = None  # where the claim is from
    metric: Text = "validation_loss"
    """The metric that is compared. `stability_edge`, in a study whose only axis has scale log, is the largest value of
    the axis at which, as at all lower ones, a seed's trial trains; its comparisons name variants alone."""
    margin: float = Field(0.0, ge=0)
    """Smallest difference that counts, as a factor 1 + margin between the sides; `same` means within it."""
    comparisons: list[Comparison] = Field(min_length=1)  # what is expected

    def issues(self) -> Iterator[ConfigIssue]:
        if self.margin == 0 and any(comparison.expect == "same" for comparison in self.comparisons):
            yield ConfigIssue.of("margin", "0", "a number above 0 with expect: same")


class Study(Section):
    """A study file."""

    title: Text  # the title of the report
    question: Text  # the question that the study asks, in a sentence or two
    task: Task = "diffusion"
    """What trials train: a diffusion U-Net, or a classifier of the labels (see gnunet.ablation.classifier)."""
    config: Annotated[
        list[Text],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        ValidValues("a file or a list of files"),
    ] = []
    """Configuration files that every trial starts from, relative to the study file; later ones win."""
    base: Overrides = {}  # what every trial changes in them, with nested or dotted keys
    budgets: _by_name("a mapping from names to overrides or files", Overrides | Text) | None = None
    """Sizes that the study can be run at: what each changes in the base, or a file of that, relative to the study
    file. The first is the default."""
    seeds: Seeds = [0]  # seeds of every variant in every setting
    baseline: Text  # the variant that the others are compared with
    margin: float = Field(0.01, ge=0)  # a relative difference to the baseline within it is called the same
    variants: _by_name("a mapping from names to overrides, or to {set: overrides, axes: [axis, ...]}", Variant)
    """What is compared."""
    axes: Annotated[dict[str, Axis], BeforeValidator(_with_text_keys), ValidValues("a mapping from names to axes")] = {}
    """What is varied."""
    tuning: Tuning | None = None  # a search over one key's values for every variant in every setting; null is none
    hypotheses: list[Hypothesis] = []  # the claims that are tested

    def axes_of(self, variant: str) -> list[str]:
        """The axes that a variant crosses, in the study's order."""
        crossed = self.variants[variant].axes
        return [axis for axis in self.axes if crossed is None or axis in crossed]

    def check_variants(self, names: Collection[str]) -> None:
        """Raise ConfigError for names given with --only that no variant has."""
        if unknown := [name for name in names if name not in self.variants]:
            raise ConfigError(f"--only: given {', '.join(unknown)}; valid: {', '.join(self.variants)}")

    def restricted_to(self, variants: Collection[str]) -> "Study":
        """The study of some variants and the baseline, with the hypotheses about them alone; empty is all of it."""
        if not variants:
            return self
        self.check_variants(variants)
        kept = {name: variant for name, variant in self.variants.items() if name in {*variants, self.baseline}}
        sides = [{side["variant"] for c in h.comparisons for side in (c.left, c.right)} for h in self.hypotheses]
        hypotheses = [h for h, names in zip(self.hypotheses, sides, strict=True) if names <= kept.keys()]
        return self.model_copy(update={"variants": kept, "hypotheses": hypotheses})

    def issues(self) -> Iterator[ConfigIssue]:
        if self.baseline not in self.variants:
            yield ConfigIssue.of("baseline", self.baseline, join_or(list(self.variants)))
        for name in {"variant", "arm"} & set(self.axes):
            yield ConfigIssue.of(
                "axes", f"an axis called {name}", "any other name, since comparisons name variants by it"
            )
        for name, variant in self.variants.items():
            for axis in variant.axes or []:
                if axis not in self.axes:
                    valid = join_or(list(self.axes)) if self.axes else "none, since the study has no axes"
                    yield ConfigIssue.of("variants", f"axis {axis} in variant {name!r}", valid)
        if len(set(self.seeds)) < len(self.seeds):
            yield ConfigIssue.of("seeds", format_value(self.seeds), "each seed once")
        if self.tuning is not None:
            seeds, key = self.tuning.seeds, self.tuning.key
            if set(seeds) & set(self.seeds) or len(set(seeds)) < len(seeds):
                valid = f"each seed once, none of the study's seeds {format_value(self.seeds)}"
                yield ConfigIssue.of("tuning.seeds", format_value(seeds), valid)
            values = self.tuning.values
            ascend = all(isinstance(value, int | float) for value in values) and values == sorted(set(values))
            if self.tuning.steps_below and not ascend:
                yield ConfigIssue.of("tuning.values", format_value(values), "ascending numbers, or steps_below: 0")
            if find(Config, key) is None:
                yield ConfigIssue.of("tuning.key", key, "a key of the configuration, such as train.learning_rate")
        for hypothesis in self.hypotheses:
            of_edge = hypothesis.metric == STABILITY_EDGE
            if of_edge and [axis.scale for axis in self.axes.values()] != ["log"]:
                given = f"metric {STABILITY_EDGE} in {hypothesis.claim!r}"
                yield ConfigIssue.of("hypotheses", given, "it in a study with one axis, of scale log")
            for comparison in hypothesis.comparisons:
                for side in ("left", "right"):
                    if found := self._selector_problem(getattr(comparison, side), of_edge):
                        given, valid = found
                        yield ConfigIssue.of("hypotheses", f"{given} on the {side} of {hypothesis.claim!r}", valid)

    def _selector_problem(self, selector: Mapping[str, str], of_edge: bool) -> tuple[str, str] | None:
        """What is wrong with a selector, and what would be valid; `of_edge`: for a comparison of stability edges."""
        variant = selector.get("variant")
        if variant not in self.variants:
            given = "no variant" if variant is None else f"variant {variant}"
            return given, f"variant: {join_or(list(self.variants))}"
        axes = self.axes_of(variant)
        if of_edge:
            valid = f"a variant alone, which crosses {join_or([*self.axes]) or 'an axis'}"
            return None if len(selector) == 1 and axes else (format_value(selector), valid)
        for axis, value in selector.items():
            if axis == "variant":
                continue
            if axis not in axes:
                return f"{axis}: {value}", f"axes that variant {variant!r} crosses: {join_or(axes) if axes else 'none'}"
            if value not in self.axes[axis].values:
                return f"{axis}: {value}", f"{axis}: {join_or(list(self.axes[axis].values))}"
        if missing := [axis for axis in axes if axis not in selector]:
            return f"no {missing[0]}", f"{missing[0]}: {join_or(list(self.axes[missing[0]].values))}"
        return None


_PARTS: dict[type[Section], list[tuple[str, type, type[Section]]]] = {
    Study: [("variants", dict, Variant), ("axes", dict, Axis), ("hypotheses", list, Hypothesis)],
    Hypothesis: [("comparisons", list, Comparison)],
}
"""The keys whose items are sections, as a mapping or a list."""


def load_study(path: Path) -> Study:
    """Read and check a study file; raises ConfigError with one line for each problem."""
    values = load_yaml_file(path, str(path), "valid: a study file, such as configs/ablations/smoke.yaml")
    if "arms" in values:  # the name of `variants` until 0.1.0
        values = {"variants" if key == "arms" else key: value for key, value in values.items()}
    problems: list[str] = []

    def check(section: type[Section], given: Any, where: str) -> Section | None:
        """A section from its checked parts, so that messages name the part; None with its problems added."""
        known = len(problems)
        if section is Variant and not (isinstance(given, dict) and given.keys() & {"set", "axes"}):
            given = {"set": given}
        if not isinstance(given, dict):
            valid = f"a mapping with {', '.join(section.model_fields)}"
            problems.append(f"{where}: given {format_value(given)}; valid: {valid}")
            return None
        for key, container, part in _PARTS.get(section, ()):
            items, noun = given.get(key), part.__name__.lower()
            if isinstance(items, dict) and container is dict:
                parts = {name: check(part, item, f"{noun} {label(name)!r} of {where}") for name, item in items.items()}
                given = {**given, key: parts}
            elif isinstance(items, list) and container is list:
                parts = [check(part, item, f"{noun} {i} of {where}") for i, item in enumerate(items, start=1)]
                given = {**given, key: parts}
        if len(problems) > known:
            return None
        try:
            return merge_and_validate(section, [ConfigSource(where, given)])
        except ConfigError as error:
            problems.extend(line.replace("(default)", f"({where})") for line in issue_lines(error))  # for a missing key
            return None

    study = check(Study, values, path.name)
    raise_all(problems, path.name)
    return study
