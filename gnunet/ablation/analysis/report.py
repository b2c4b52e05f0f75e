"""The report of a study, made from its records alone: report.html in one file, and report.md with figures/.

The same records give the same bytes.
"""

import base64
import re
from collections import Counter
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from gnunet.ablation.analysis.conclusion import conclusion
from gnunet.ablation.analysis.formatting import counted
from gnunet.ablation.analysis.results import Results
from gnunet.ablation.analysis.statistics import RESAMPLES
from gnunet.ablation.analysis.tables import (
    comparison_table,
    configuration_table,
    environment_table,
    environment_values,
    main_table,
    means_table,
    trial_table,
    tuning_table,
)
from gnunet.ablation.figures import draw_all
from gnunet.ablation.plan import Plan, Records
from gnunet.ablation.study import Study
from gnunet.errors import ConfigError
from gnunet.files import atomic_directory, atomic_write

TEMPLATES = Path(__file__).parents[1] / "templates"


def write_report(study: Study, plan: Plan, records: Records, folder: Path, *, command: str) -> Path:
    """Write report.html, report.md and figures/ into `folder`, replacing earlier ones; returns the first's path.

    `command` runs the study. The grids of samples are read from `folder`/samples/NAME.png. Raises ConfigError if no
    trial has a record.
    """
    results = Results(study, plan, records, folder)
    if not results.found:
        raise ConfigError(f"{folder / 'records'}: has no record of a reported trial; valid: after {command}")
    states = Counter(state for condition in results.conditions for state in results.states(condition))
    pictures = {picture.name: picture for picture in draw_all(results)}
    claims = [
        (hypothesis, results.judge(hypothesis)[0], results.survives(hypothesis), pictures.pop(f"claim_{number}", None))
        for number, hypothesis in enumerate(study.hypotheses, start=1)
    ]
    content = {
        "study": study,
        "command": command,
        "conclusion": conclusion(results),
        "states": {state: states[state] for state in ("complete", "collapsed", "diverged", "missing")},
        "planned": states.total(),
        "warnings": _warnings(results),
        "main": main_table(results),
        "claims": claims,
        "comparisons": comparison_table(results),
        "means": means_table(results),
        "pictures": pictures.values(),
        "trials": trial_table(results),
        "tuning": tuning_table(results),
        "resamples": RESAMPLES,
        "contrasts": len(results.contrasts),
        "compared": sum(len(hypothesis.comparisons) for hypothesis in study.hypotheses),
        "configuration": configuration_table(results),
        "environment": environment_table(results),
    }
    with atomic_directory(folder / "figures") as figures:
        for picture in [*(picture for *_, picture in claims if picture), *pictures.values()]:
            (figures / f"{picture.name}.png").write_bytes(picture.png)
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=select_autoescape(["html.j2"]), keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters |= {
        "inline_svg": inline_svg,
        "inline_png": inline_png,
        "escape_markdown": escape_markdown,
        "counted": counted,
    }
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


def _warnings(results: Results) -> list[str]:
    """What a reader must know before the numbers."""
    warnings = []
    for key, values in environment_values(results).items():
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
        warnings.append(f"{counted(skipped, 'complete trial')} skipped steps whose loss or gradient was not finite.")
    if len(results.study.seeds) == 1:
        warnings.append("One seed contains no information on the variance of retraining: there is no verdict.")
    if extreme := results.plan.tuned_at_edge:
        labels = ", ".join(map(results.label, extreme))
        warnings.append(f"Tuning chose at the edge of its values, so a better one may lie beyond: {labels}.")
    if outside := len(results.outside_seeds):
        warnings.append(f"Not used, of seeds outside of the study file: {counted(outside, 'record')}.")
    return warnings
