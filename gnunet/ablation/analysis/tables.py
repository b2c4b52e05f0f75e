"""The tables of a report, made from records alone; the templates and the terminal render them."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gnunet.ablation.analysis.formatting import describe, metric_info, percent, sample_metrics
from gnunet.ablation.analysis.results import ComparisonResult, Condition, Results
from gnunet.ablation.analysis.statistics import Difference
from gnunet.ablation.records import LOSSES, NEAREST
from gnunet.ablation.study import STABILITY_EDGE, Hypothesis

_CONFIGURATION = (
    "data.source", "data.resolution", "train.total_images", "train.batch_size", "train.learning_rate",
    "validation.num_examples", "evaluate.num_images",
)  # fmt: skip
"""Keys of the configuration that the report shows."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table. Markdown emphasizes `verdict` and `absent`."""

    text: str
    style: str = ""  # CSS classes
    title: str = ""  # shown when the pointer is over the cell


@dataclass(frozen=True)
class Table:
    """A table of the report; the templates render it as HTML and as Markdown."""

    headings: list[str]
    rows: list[list[Cell]]


def _numbers(texts: Iterable[str]) -> list[Cell]:
    return [Cell(text, "number") for text in texts]


def _difference(difference: Difference) -> list[Cell]:
    return [Cell(*pair) for pair in zip(describe(difference), ("number", "interval", "number"), strict=True)]


def _four_digits(value: float) -> str:
    """Four significant digits; empty for NaN."""
    return f"{value:#.4g}".rstrip(".") if math.isfinite(value) else ""


def comparison_table(results: Results) -> Table:
    """A row for each comparison of the hypotheses, which are numbered."""
    rows = []
    for number, hypothesis in enumerate(results.study.hypotheses, start=1):
        for result in results.judge(hypothesis)[1]:
            p, power = result.adjusted_p, result.difference.power_margin
            row = [Cell(str(number)), Cell(expectation(results, hypothesis, result))]
            row += [Cell(metric_info(hypothesis.metric).title), *_difference(result.difference)]
            row += _numbers(["" if p is None else f"{p:.2g}", "" if power is None else percent(power).lstrip("+")])
            rows.append([*row, Cell(result.verdict, f"verdict {result.verdict.replace(' ', '-')}")])
    columns = ["claim", "expected", "metric", "difference", "95% interval", "n", "p (Holm)", "power", "verdict"]
    return Table(columns, rows)


def expectation(results: Results, hypothesis: Hypothesis, result: ComparisonResult) -> str:
    """What is expected of a comparison, as text."""
    shared = {*result.left.setting} & {*result.right.setting}
    left, right = (
        results.label(side._replace(setting=tuple(pair for pair in side.setting if pair not in shared)))
        for side in (result.left, result.right)
    )
    margin = f"{100 * hypothesis.margin:g}%"
    if result.expect == "same":
        text = f"{left} the same as {right} within {margin}"
    else:
        text = f"{left} {result.expect} than {right}" + (f" by over {margin}" if hypothesis.margin else "")
    return f"{text}, {results.describe_setting(tuple(shared))}" if shared else text


def primary_metric(results: Results) -> str:
    """The metric of most comparisons of the study's hypotheses, the first of equal ones; else the loss."""
    counts = Counter(h.metric for h in results.study.hypotheses for _ in h.comparisons)
    return counts.most_common(1)[0][0] if counts else loss_metric(results)


def loss_metric(results: Results) -> str:
    """The loss weighted as in training, or the validation loss where records of an earlier version have none."""
    return "training_loss" if results.predictors("training_loss") else "validation_loss"


def main_metrics(results: Results) -> list[str]:
    """The metrics that figures are drawn of: the primary one, a loss, and those of samples."""
    metrics = dict.fromkeys([primary_metric(results), loss_metric(results), *sample_metrics(results.found)])
    return [metric for metric in metrics if metric != STABILITY_EDGE]


def main_table(results: Results) -> Table:
    """The primary metric of each condition and its difference to the baseline's, from the lowest to the highest."""
    metric = primary_metric(results)
    rows: list[list[Cell]] = []
    shown: set[Condition] = set()
    for row in results.contrast_rows(metric):
        if row.contrast is None:
            rows.append([Cell(row.label, "heading"), *[Cell("")] * 5])
            continue
        left, right = row.contrast.left, row.contrast.right
        if right not in shown:
            mean = _numbers([_four_digits(results.mean(right, metric)), "baseline"])
            at = len(rows) if right.setting else len(shown)  # at the top where it crosses no axis
            rows.insert(at, [Cell(results.label(right), "base"), *mean, *[Cell("")] * 3])
            shown.add(right)
        mean = _numbers([_four_digits(results.mean(left, metric))])
        verdict = results.word(row.difference, metric) if row.difference.pairs else ""
        verdict = Cell(verdict, f"verdict {verdict}" if verdict else "")
        rows.append([Cell(row.label), *mean, *_difference(row.difference), verdict])
    columns = ["variant", metric_info(metric).title, "difference", "95% interval", "n", "verdict"]
    return Table(columns, rows)


def means_table(results: Results) -> Table:
    """The means of every metric of each condition over the seeds that trained to their end."""
    nearest = NEAREST if any(record["nearest"] for record in results.found) else ()
    costs = ("images_per_second", "saved_mib", "peak_memory_mib")
    metrics = ["validation_loss", *sample_metrics(results.found), *nearest, *costs]
    rows = []
    for condition in results.conditions:
        complete = f"{results.states(condition).count('complete')} of {len(results.study.seeds)}"
        means = (_four_digits(results.mean(condition, metric)) for metric in metrics)
        rows.append([Cell(results.label(condition)), *_numbers([complete, *means])])
    titles = [metric_info(metric).title if metric in LOSSES else metric_info(metric).label for metric in metrics]
    return Table(["variant", "complete", *titles], rows)


def trial_table(results: Results) -> Table:
    """The loss of every trial, where it diverged, or why there is neither."""
    rows = []
    for condition in results.conditions:
        row = [Cell(results.label(condition))]
        for seed in results.study.seeds:
            record, state = results.record(condition, seed), results.state(condition, seed)
            name = results.name(condition, seed)
            if record is None:
                text = "missing" if name else "waits for tuning"
            elif state in ("collapsed", "diverged"):
                text = f"{state} at {record['diverged_at'] or record['images']:,}"
            else:
                score = results.scores(condition, "validation_loss").get(seed)
                text = _four_digits(score.value) if score else "no loss"
            row.append(Cell(text, "number" if state == "complete" else f"number absent {state}", name or ""))
        rows.append(row)
    return Table(["variant", *(f"seed {seed}" for seed in results.study.seeds)], rows)


def tuning_table(results: Results) -> Table | None:
    """The chosen value of each condition; None where the study has no tuning or nothing is chosen yet."""
    plan = results.plan
    if not plan.chosen:
        return None
    rows = [[Cell(results.label(condition)), Cell(value, "number")] for condition, value in plan.chosen.items()]
    for condition in plan.pending_tuning:
        rows.append([Cell(results.label(condition)), Cell("not finished", "number absent missing")])
    return Table(["variant", results.study.tuning.key], rows)


def configuration_table(results: Results) -> Table:
    """How the networks were trained and scored."""
    paths = [key.split(".") for key in _CONFIGURATION]
    values = {f"{section}.{key}": [r["config"][section][key] for r in results.found] for section, key in paths}
    return _counts(values | {"parameters": [record["parameters"] for record in results.found]})


def environment_table(results: Results) -> Table:
    """The software and hardware of the records."""
    return _counts(environment_values(results))


def environment_values(results: Results) -> dict[str, list[Any]]:
    """The software and hardware: the value of each record."""
    keys = dict.fromkeys(key for record in results.found for key in record["environment"])
    return {key: [record["environment"].get(key) for record in results.found] for key in keys}


def _counts(values: Mapping[str, Sequence[Any]]) -> Table:
    """The values of each key, the most frequent first, and the number of records that have each."""
    rows = []
    for key, found in values.items():
        counts = Counter("none" if value is None else str(value) for value in found)
        ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        texts = [f"{value} ({count})" if len(ordered) > 1 else value for value, count in ordered]
        rows.append([Cell(key), Cell(", ".join(texts))])
    return Table(["", ""], rows)
