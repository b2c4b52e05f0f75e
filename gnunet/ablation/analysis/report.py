"""The report of a study, made from its records alone: report.html, in one file, and report.md with figures/.

The same records give the same bytes.
"""

import base64
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from gnunet.ablation.analysis.formatting import describe
from gnunet.ablation.analysis.metrics import metric_info, sample_metrics
from gnunet.ablation.analysis.results import ComparisonResult, Condition, Results
from gnunet.ablation.analysis.statistics import RESAMPLES
from gnunet.ablation.plan import Plan
from gnunet.ablation.records import LOSSES, NEAREST
from gnunet.ablation.study import Hypothesis, Study
from gnunet.errors import ConfigError
from gnunet.files import atomic_directory, atomic_write

if TYPE_CHECKING:
    from gnunet.ablation.figures import Picture

TEMPLATES = Path(__file__).parents[1] / "templates"
_SETTING = (
    "data.source", "data.resolution", "train.total_images", "train.batch_size", "train.learning_rate",
    "validation.num_examples", "evaluate.num_images",
)  # fmt: skip
Counted = tuple[str, list[tuple[str, int]]]
"""A key, its values in the records, and the number of records that have each; the most frequent first."""


def write_report(
    study: Study,
    plan: Plan,
    records: Mapping[str, Mapping[str, Any]],
    folder: Path,
    *,
    name: str,
    budget: str | None,
) -> Path:
    """Write report.html, report.md and figures/ into `folder`, replacing what is there.

    Args:
        study: the study.
        plan: its trials; those without a record are shown as missing.
        records: by the trials' names.
        folder: the study's, with samples/NAME.png of the trials.
        name: the study's name.
        budget: the budget that its trials were run at, if it has any.

    Returns:
        The path of report.html.

    Raises:
        ConfigError: there is no record of any of the trials; or matplotlib or scipy is missing.
    """
    if absent := [package for package in ("matplotlib", "scipy") if importlib.util.find_spec(package) is None]:
        raise ConfigError(f'a report needs {" and ".join(absent)}; valid: after pip install -e ".[ablation]"')
    from gnunet.ablation.figures import draw_all  # needs these packages

    results = Results(study, plan, records, folder)
    if not results.found:
        raise ConfigError(f"{folder / 'records'}: has no record of a trial of {name}; valid: after a run of the study")
    pictures = draw_all(results)
    content = _content(results, name, budget, pictures)
    with atomic_directory(folder / "figures") as figures:
        for picture in pictures:
            (figures / f"{picture.name}.png").write_bytes(picture.png)
            if picture.svg is not None:
                (figures / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=select_autoescape(["html.j2"]), keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters |= {"inline_svg": inline_svg, "inline_png": inline_png, "cell": markdown_cell}
    for file in ("report.md", "report.html"):
        atomic_write(folder / file, templates.get_template(f"{file}.j2").render(content))
    return folder / "report.html"


def inline_svg(svg: str) -> str:
    """An SVG as a part of an HTML page: without prologue, and without ids that nothing refers to and figures share."""
    return re.sub(r' id="(?:[\w.]+_\d+|image\w+)"', "", svg[svg.index("<svg") :])


def inline_png(png: bytes) -> str:
    """A PNG as the source of an HTML image."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def markdown_cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _content(results: Results, name: str, budget: str | None, pictures: "list[Picture]") -> dict[str, Any]:
    """What the templates fill in."""
    study = results.study
    hypotheses = [_hypothesis(results, hypothesis) for hypothesis in study.hypotheses]
    states = Counter(state for condition in results.conditions for state in results.states(condition))
    return {
        "name": name,
        "budget": budget,
        "study": study,
        "states": {state: states[state] for state in ("complete", "diverged", "missing")},
        "planned": states.total(),
        "hypotheses": hypotheses,
        "summary": _summary(results),
        "trials": [_trials(results, condition) for condition in results.conditions],
        "pending": [results.label(Condition(variant, setting)) for variant, setting in results.plan.pending_tuning],
        "chosen": [(results.label(Condition(*where)), value) for where, value in results.plan.chosen.items()],
        "pictures": pictures,
        "setting": _setting(results),
        "environment": _environment(results),
        "warnings": _warnings(results),
        "resamples": RESAMPLES,
        "contrasts": len(results.contrasts),
        "compared": sum(len(hypothesis.comparisons) for hypothesis in study.hypotheses),
    }


def _hypothesis(results: Results, hypothesis: Hypothesis) -> dict[str, Any]:
    """A row for each comparison, with the claim and the verdict on it."""
    verdict, judged = results.judge(hypothesis)
    return {
        "claim": hypothesis.claim,
        "source": hypothesis.source or "",
        "verdict": verdict,
        "comparisons": [
            {
                "expected": _expected(results, hypothesis, one),
                "found": describe(one.difference),
                "verdict": one.verdict,
            }
            for one in judged
        ],
    }


def _expected(results: Results, hypothesis: Hypothesis, judged: ComparisonResult) -> str:
    """A comparison in words; its metric is named where it is not the validation loss."""
    left, right = results.label(judged.left), results.label(judged.right)
    margin = f"{100 * hypothesis.margin:g}%"
    if judged.expect == "same":
        words = f"{left} the same as {right} within {margin}"
    else:
        words = f"{left} {judged.expect} than {right}" + (f" by over {margin}" if hypothesis.margin else "")
    is_loss = hypothesis.metric == "validation_loss"
    return words if is_loss else f"{metric_info(hypothesis.metric).title}: {words}"


def _summary(results: Results) -> dict[str, Any]:
    """A table of the conditions' means: of variants without axes from the lowest loss on, else in the study's order."""
    nearest = NEAREST if any(record["nearest"] for record in results.found) else ()
    costs = ("images_per_second", "saved_mib", "peak_memory_mib")
    metrics = ["validation_loss", *sample_metrics(results.found), *nearest, *costs]
    conditions = results.conditions
    if not results.study.axes:
        losses = {condition: results.mean(condition, "validation_loss") for condition in conditions}
        conditions = sorted(conditions, key=lambda c: (math.isnan(losses[c]), losses[c]))
    rows = []
    for condition in conditions:
        against = [contrast.right for contrast in results.contrasts if contrast.left == condition]
        rows.append(
            {
                "label": results.label(condition),
                "is_base": condition.variant == results.study.baseline,
                # Where the baseline alone crosses an axis there are several, for the forest plot to show.
                "found": describe(results.compare(condition, *against, "validation_loss"))
                if len(against) == 1
                else None,
                "complete": f"{results.states(condition).count('complete')} of {len(results.study.seeds)}",
                "means": [_number(results.mean(condition, metric)) for metric in metrics],
            }
        )
    titles = [metric_info(metric).title if metric in LOSSES else metric_info(metric).label for metric in metrics]
    return {"metrics": titles, "rows": rows}


def _trials(results: Results, condition: Condition) -> dict[str, Any]:
    """Every trial of a condition: its state, and the loss, where it diverged, or why there is neither."""
    trials = []
    for seed in results.study.seeds:
        record, state = results.record(condition, seed), results.state(condition, seed)
        if record is None:
            text = "missing" if results.name(condition, seed) else "waits for tuning"
        elif state == "diverged":
            text = f"diverged at {record['diverged_at'] or record['images']:,}"
        else:
            score = results.scores(condition, "validation_loss").get(seed)
            text = _number(score.value) if score else "no loss"
        trials.append({"state": state, "text": text, "name": results.name(condition, seed)})
    return {"label": results.label(condition), "trials": trials}


def _setting(results: Results) -> list[Counted]:
    """How the networks were trained and scored."""

    def value(record: Mapping[str, Any], key: str) -> Any:
        section, _, name = key.partition(".")
        return record["config"][section][name] if name else record[key]

    return [_counted(key, [value(record, key) for record in results.found]) for key in (*_SETTING, "parameters")]


def _environment(results: Results) -> list[Counted]:
    """What the records were made with."""
    keys = dict.fromkeys(key for record in results.found for key in record["environment"])
    return [_counted(key, [record["environment"].get(key) for record in results.found]) for key in keys]


def _counted(key: str, values: Sequence[Any]) -> Counted:
    counts = Counter("none" if value is None else str(value) for value in values)
    return key, sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _warnings(results: Results) -> list[str]:
    """What a reader must know before the numbers."""
    warnings = []
    for key, values in _environment(results):
        if len(values) > 1:
            consequence = "times cannot be compared between them" if key in ("device", "threads", "processes") else (
                "differences may come from that"
            )  # fmt: skip
            warnings.append(f"The records come from more than one {key}: {consequence}.")
    if any("dirty" in (record["environment"].get("commit") or "") for record in results.found):
        warnings.append("Records were made with files that differ from their commit.")
    banks = {record["bank"]["fingerprint"] for record in results.found if record["bank"]}
    if len(banks) > 1:
        warnings.append(
            f"There are {len(banks)} validation banks: losses on different ones are paired by seed alone, and differ "
            "by their examples too."
        )
    skipped = sum(record["nonfinite_steps"] > 0 and record["outcome"] == "complete" for record in results.found)
    if skipped:
        warnings.append(f"{skipped} complete trials skipped steps whose loss or gradient was not finite.")
    if len(results.study.seeds) == 1:
        warnings.append("One seed says nothing of how far retraining moves a result: there is no verdict.")
    tried = results.tuning_scores()
    values = list(next(iter(tried.values()), {}))
    chosen = [c for c in tried if results.plan.chosen.get((c.variant, c.setting)) in (values[0], values[-1])]
    if chosen and len(values) > 1:
        labels = ", ".join(results.label(condition) for condition in chosen)
        warnings.append(
            f"Tuning chose the first or last of the values tried, so a better one may lie beyond: {labels}."
        )
    return warnings


def _number(value: float) -> str:
    """Four significant digits; empty where there is none."""
    return f"{value:#.4g}".rstrip(".") if math.isfinite(value) else ""
