"""The report of a study, made from its records alone: report.html in one file, and report.md with figures/.

The same records give the same bytes.
"""

import base64
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from gnunet.ablation.analysis.formatting import describe, metric_info, sample_metrics
from gnunet.ablation.analysis.results import ComparisonResult, Results
from gnunet.ablation.analysis.statistics import RESAMPLES, Difference
from gnunet.ablation.figures import draw_all
from gnunet.ablation.plan import Plan, Records
from gnunet.ablation.records import LOSSES, NEAREST
from gnunet.ablation.study import Hypothesis, Study
from gnunet.errors import ConfigError
from gnunet.files import atomic_directory, atomic_write

TEMPLATES = Path(__file__).parents[1] / "templates"
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


def write_report(study: Study, plan: Plan, records: Records, folder: Path, *, name: str, budget: str | None) -> Path:
    """Write report.html, report.md and figures/ into `folder`, replacing earlier ones; returns the first's path.

    The grids of samples are read from `folder`/samples/NAME.png. Raises ConfigError if no trial has a record.
    """
    results = Results(study, plan, records, folder)
    if not results.found:
        raise ConfigError(f"{folder / 'records'}: has no record of a trial of {name}; valid: after a run of the study")
    states = Counter(state for condition in results.conditions for state in results.states(condition))
    content = {
        "name": name,
        "budget": budget,
        "study": study,
        "states": {state: states[state] for state in ("complete", "diverged", "missing")},
        "planned": states.total(),
        "warnings": _warnings(results),
        "verdicts": _verdicts(results),
        "means": _means(results),
        "pictures": draw_all(results),
        "trials": _trials(results),
        "tuning": _tuning(results),
        "resamples": RESAMPLES,
        "contrasts": len(results.contrasts),
        "compared": sum(len(hypothesis.comparisons) for hypothesis in study.hypotheses),
        "configuration": _counts(_configuration_values(results)),
        "environment": _counts(_environment_values(results)),
    }
    with atomic_directory(folder / "figures") as figures:
        for picture in content["pictures"]:
            (figures / f"{picture.name}.png").write_bytes(picture.png)
            if picture.svg is not None:
                (figures / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=select_autoescape(["html.j2"]), keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters |= {"inline_svg": inline_svg, "inline_png": inline_png, "escape_markdown": escape_markdown}
    for file in ("report.md", "report.html"):
        atomic_write(folder / file, templates.get_template(f"{file}.j2").render(content))
    return folder / "report.html"


def inline_svg(svg: str) -> str:
    """An SVG as a part of an HTML page: without prologue, and without unused ids that several figures have."""
    return re.sub(r' id="(?:[\w.]+_\d+|image\w+)"', "", svg[svg.index("<svg") :])


def inline_png(png: bytes) -> str:
    """A PNG as the source of an HTML image."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def escape_markdown(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _numbers(texts: Iterable[str]) -> list[Cell]:
    return [Cell(text, "number") for text in texts]


def _difference(difference: Difference) -> list[Cell]:
    return [Cell(*pair) for pair in zip(describe(difference), ("number", "interval", "number"), strict=True)]


def _four_digits(value: float) -> str:
    """Four significant digits; empty for NaN."""
    return f"{value:#.4g}".rstrip(".") if math.isfinite(value) else ""


def _verdicts(results: Results) -> Table:
    """A row for each comparison; the first of a hypothesis has the claim and its verdict."""
    rows = []
    for hypothesis in results.study.hypotheses:
        verdict, comparisons = results.judge(hypothesis)
        claim = [Cell(hypothesis.claim), Cell(hypothesis.source or ""), Cell(verdict, f"verdict {_css(verdict)}")]
        for result in comparisons:
            row = [*(claim if result is comparisons[0] else [Cell("")] * 3)]
            row += [Cell(_expectation(results, hypothesis, result)), *_difference(result.difference)]
            row.append(Cell(result.verdict if len(comparisons) > 1 else "", _css(result.verdict)))
            rows.append(row)
    columns = ["claim", "source", "verdict", "expected", "difference", "95% interval", "n", "of the comparison"]
    return Table(columns, rows)


def _css(verdict: str) -> str:
    return verdict.replace(" ", "-")


def _expectation(results: Results, hypothesis: Hypothesis, result: ComparisonResult) -> str:
    """A comparison as text; its metric is named where it is not the validation loss."""
    left, right = results.label(result.left), results.label(result.right)
    margin = f"{100 * hypothesis.margin:g}%"
    if result.expect == "same":
        text = f"{left} the same as {right} within {margin}"
    else:
        text = f"{left} {result.expect} than {right}" + (f" by over {margin}" if hypothesis.margin else "")
    is_loss = hypothesis.metric == "validation_loss"
    return text if is_loss else f"{metric_info(hypothesis.metric).title}: {text}"


def _means(results: Results) -> Table:
    """The means of each condition: variants without axes from the lowest loss, else in the study's order."""
    study, conditions = results.study, results.conditions
    nearest = NEAREST if any(record["nearest"] for record in results.found) else ()
    costs = ("images_per_second", "saved_mib", "peak_memory_mib")
    metrics = ["validation_loss", *sample_metrics(results.found), *nearest, *costs]
    if not study.axes:
        losses = {condition: results.mean(condition, "validation_loss") for condition in conditions}
        conditions = sorted(conditions, key=lambda c: (math.isnan(losses[c]), losses[c]))
    rows = []
    for condition in conditions:
        baselines = [contrast.right for contrast in results.contrasts if contrast.left == condition]
        is_base = condition.variant == study.baseline
        if len(baselines) == 1:
            difference = _difference(results.compare(condition, baselines[0], "validation_loss"))
        else:  # several where the baseline alone crosses an axis: the forest plot shows them
            difference = [*_numbers(["base" if is_base else "see figures"]), Cell(""), Cell("")]
        complete = f"{results.states(condition).count('complete')} of {len(study.seeds)}"
        means = (_four_digits(results.mean(condition, metric)) for metric in metrics)
        label = Cell(results.label(condition), "base" if is_base else "")
        rows.append([label, *difference, *_numbers([complete, *means])])
    titles = [metric_info(metric).title if metric in LOSSES else metric_info(metric).label for metric in metrics]
    columns = ["variant", f"difference to {study.baseline}", "95% interval", "n", "complete", *titles]
    return Table(columns, rows)


def _trials(results: Results) -> Table:
    """The loss of every trial, where it diverged, or why there is neither."""
    rows = []
    for condition in results.conditions:
        row = [Cell(results.label(condition))]
        for seed in results.study.seeds:
            record, state = results.record(condition, seed), results.state(condition, seed)
            name = results.name(condition, seed)
            if record is None:
                text = "missing" if name else "waits for tuning"
            elif state == "diverged":
                text = f"diverged at {record['diverged_at'] or record['images']:,}"
            else:
                score = results.scores(condition, "validation_loss").get(seed)
                text = _four_digits(score.value) if score else "no loss"
            row.append(Cell(text, "number" if state == "complete" else f"number absent {state}", name or ""))
        rows.append(row)
    return Table(["variant", *(f"seed {seed}" for seed in results.study.seeds)], rows)


def _tuning(results: Results) -> Table | None:
    """The chosen value of each condition; None where the study has no tuning or nothing is chosen yet."""
    plan = results.plan
    if not plan.chosen:
        return None
    rows = [[Cell(results.label(condition)), Cell(value, "number")] for condition, value in plan.chosen.items()]
    for condition in plan.pending_tuning:
        rows.append([Cell(results.label(condition)), Cell("not finished", "number absent missing")])
    return Table(["variant", results.study.tuning.key], rows)


def _configuration_values(results: Results) -> dict[str, list[Any]]:
    """How the networks were trained and scored: the value of each record."""
    paths = [key.split(".") for key in _CONFIGURATION]
    values = {f"{section}.{key}": [r["config"][section][key] for r in results.found] for section, key in paths}
    return values | {"parameters": [record["parameters"] for record in results.found]}


def _environment_values(results: Results) -> dict[str, list[Any]]:
    """The software and hardware of the records."""
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


def _warnings(results: Results) -> list[str]:
    """What a reader must know before the numbers."""
    warnings = []
    for key, values in _environment_values(results).items():
        if len(set(values)) > 1:
            is_speed = key in ("device", "threads", "processes")
            consequence = "times cannot be compared between them" if is_speed else "differences may come from that"
            warnings.append(f"The records come from more than one {key}: {consequence}.")
    if any("dirty" in (record["environment"].get("commit") or "") for record in results.found):
        warnings.append("Records were made with files that differ from their commit.")
    fingerprints = {record["bank"]["fingerprint"] for record in results.found}
    if len(fingerprints) > 1:
        warnings.append(
            f"There are {len(fingerprints)} validation sets: losses on different ones are paired by seed alone, and "
            "differ by their examples too."
        )
    skipped = sum(record["nonfinite_steps"] > 0 and record["outcome"] == "complete" for record in results.found)
    if skipped:
        warnings.append(f"{skipped} complete trials skipped steps whose loss or gradient was not finite.")
    if len(results.study.seeds) == 1:
        warnings.append("One seed contains no information on the variance of retraining: there is no verdict.")
    scores = results.plan.tuning_scores
    values = list(next(iter(scores.values()), {}))
    extreme = [c for c in scores if results.plan.chosen.get(c) in (values[0], values[-1])]
    if extreme and len(values) > 1:
        labels = ", ".join(results.label(condition) for condition in extreme)
        warnings.append(f"Tuning chose the first or last of its values, so a better one may lie beyond: {labels}.")
    return warnings
