"""The cost of each variant: training speed, the norms' share of it, and memory."""

import math

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gnunet.ablation.analysis.metrics import metric_info
from gnunet.ablation.analysis.results import Results
from gnunet.ablation.figures.style import GREY, Picture, VariantStyle, hatch_row, render, row_panels

_METRICS = ("images_per_second", "norm_share", "saved_mib", "peak_memory_mib")


def draw(results: Results, styles: dict[str, VariantStyle]) -> Picture | None:
    """Bars of each condition's costs; None where no record has any."""
    conditions = results.conditions
    metrics = [name for name in _METRICS if any(math.isfinite(results.mean(c, name)) for c in conditions)]
    if not metrics:
        return None
    figure, panels = row_panels([results.label(condition) for condition in conditions], len(metrics), extra=0.7)
    for panel, name in zip(panels, metrics, strict=True):
        _draw_panel(panel, results, styles, name)
        panel.set_xlabel(metric_info(name).label)
    caption = (
        "Means over the seeds that trained to their end; dots: each seed. Speed and peak memory are of the whole "
        "training step; saved for backward are the bytes that one micro-batch's forward pass saves. Hatched: no number."
    )
    return render(figure, "costs", "Speed and memory", caption)


def _draw_panel(panel: Axes, results: Results, styles: dict[str, VariantStyle], metric: str) -> None:
    is_share = metric == "norm_share"
    for y, condition in enumerate(results.conditions):
        values = [score.value for score in results.scores(condition, metric).values()]
        if not values:
            hatch_row(panel, y, diverged=False)
            continue
        mean = sum(values) / len(values)
        panel.barh(y, mean, height=0.8, color=styles[condition.variant].colour, alpha=0.4, linewidth=0)
        panel.plot(values, [y] * len(values), ".", color=GREY, markersize=3)
        text = f"{100 * mean:.1f}%" if is_share else f"{mean:.0f}" if mean >= 100 else f"{mean:.1f}"
        panel.text(0.02, y, text, transform=panel.get_yaxis_transform(), va="center", fontsize=7.5)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(4))
    if is_share:
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
