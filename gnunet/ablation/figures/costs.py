"""What each variant costs: training speed, the norms' share of it, and memory."""

import math

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gnunet.ablation.analysis.metrics import metric_info
from gnunet.ablation.analysis.results import Results
from gnunet.ablation.figures.style import GREY, MISSING, ROW, Picture, VariantStyle, new_figure, render, rows_axis

_PANELS = ("images_per_second", "norm_share", "saved_mib", "peak_memory_mib")


def draw(results: Results, styles: dict[str, VariantStyle]) -> Picture | None:
    """Bars of each condition's costs; None where no record has any."""
    conditions = results.conditions
    shown = [name for name in _PANELS if any(math.isfinite(results.mean(c, name)) for c in conditions)]
    if not shown:
        return None
    figure = new_figure(ROW * len(conditions) + 0.7)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, shown, strict=True):
        _draw_panel(panel, results, styles, name)
        panel.set_xlabel(metric_info(name).label)
        panel.tick_params(axis="y", length=0)
        panel.grid(visible=False, axis="y")
    rows_axis(panels[0], [results.label(condition) for condition in conditions])
    caption = (
        "Means over the seeds that trained to their end; dots: each seed. Speed and peak memory are of the whole "
        "training step; kept for backward are the bytes that one micro-batch's forward pass saves. Hatched: no number."
    )
    return render(figure, "costs", "Speed and memory", caption)


def _draw_panel(panel: Axes, results: Results, styles: dict[str, VariantStyle], name: str) -> None:
    for y, condition in enumerate(results.conditions):
        values = [score.value for score in results.scores(condition, name).values()]
        where = panel.get_yaxis_transform()
        if not values:
            panel.add_patch(Rectangle((0, y - 0.4), 1, 0.8, transform=where, **MISSING))
            continue
        mean = sum(values) / len(values)
        panel.barh(y, mean, height=0.8, color=styles[condition.variant].colour, alpha=0.4, linewidth=0)
        panel.plot(values, [y] * len(values), ".", color=GREY, markersize=3)
        written = f"{100 * mean:.1f}%" if name == "norm_share" else f"{mean:.0f}" if mean >= 100 else f"{mean:.1f}"
        panel.text(0.02, y, written, transform=where, va="center", fontsize=7.5)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(4))
    if name == "norm_share":
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
