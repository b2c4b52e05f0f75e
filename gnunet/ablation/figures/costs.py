"""What each variant costs in speed and memory: bars, and the loss against it with the variants that no other beats."""

import math
import textwrap
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gnunet.ablation.analysis.formatting import metric_info
from gnunet.ablation.analysis.results import Condition, Results
from gnunet.ablation.analysis.tables import loss_metric
from gnunet.ablation.figures.scales import clip, loss_axis
from gnunet.ablation.figures.style import (
    GREY,
    Picture,
    VariantStyle,
    hatch,
    legend_height,
    new_figure,
    render,
    row_panels,
    variant_legend,
)

Point = tuple[float, float]  # (cost, loss)
_SIGNS = {"images_per_second": -1.0, "saved_mib": 1.0, "peak_memory_mib": 1.0}
"""What is on the x axes, and 1 where low is good."""
_CAVEAT = (
    "Implementations are compared, not norms: group norm is one fused operator, others are plain torch operations."
)
_COSTS = ("images_per_second", "norm_share", "saved_mib", "peak_memory_mib")


def draw_pareto(results: Results, styles: dict[str, VariantStyle]) -> Picture | None:
    """A panel for each cost; None where no record has a loss and a cost."""
    metric = loss_metric(results)
    losses = {condition: results.mean(condition, metric) for condition in results.main_conditions}
    shown: dict[str, dict[Condition, Point]] = {}
    for name in _SIGNS:
        points = {condition: (results.mean(condition, name), loss) for condition, loss in losses.items()}
        if finite := {c: point for c, point in points.items() if all(map(math.isfinite, point))}:
            shown[name] = finite
    if not shown:
        return None
    figure = new_figure(2.2 + legend_height(styles))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    panels[0].set_ylabel(metric_info(metric).title)
    finite = [loss for points in shown.values() for _, loss in points.values()]
    loss_axis(panels[0], "y", np.clip(finite, None, 4 * np.median(finite) - 3 * min(finite)))
    for panel, (name, points) in zip(panels, shown.items(), strict=True):
        for condition, (cost, loss) in points.items():
            style = styles[condition.variant]
            at, arrow = clip(panel, "y", loss)
            panel.plot(cost, at, color=style.colour, clip_on=False, marker=arrow or style.marker)
        panel.plot(*zip(*_front(points, _SIGNS[name]), strict=True), color=GREY, linewidth=0.8, zorder=1)
        loss_axis(panel, "x", [cost for cost, _ in points.values()])
        panel.set_xlabel(textwrap.fill(metric_info(name).label, 14))
        if panel.get_xscale() == "linear":
            panel.xaxis.set_major_locator(MaxNLocator(3))
    variant_legend(figure, styles, results.study.variants, linestyle="none")
    absent = [results.label(condition) for condition, loss in losses.items() if not math.isfinite(loss)]
    caption = (
        f"{_CAVEAT} Means over the seeds that trained. Down is better, and so is right for speed and left for memory; "
        "the line joins the conditions that none beats in both. Arrows: above the upper edge."
        + (f" Without a loss: {', '.join(absent)}." if absent else "")
    )
    return render(figure, "pareto", "Loss against speed and memory", caption)


def _front(points: Mapping[Condition, Point], sign: float) -> list[Point]:
    """The points that no other beats in both cost and loss, from the cheapest."""
    front: list[Point] = []
    for cost, loss in sorted(points.values(), key=lambda point: (sign * point[0], point[1])):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def draw_costs(results: Results, styles: dict[str, VariantStyle]) -> Picture | None:
    """Bars of each condition's costs; None where no record has any."""
    conditions = results.main_conditions
    metrics = [name for name in _COSTS if any(math.isfinite(results.mean(c, name)) for c in conditions)]
    if not metrics:
        return None
    figure, panels = row_panels([results.label(condition) for condition in conditions], len(metrics), extra=0.8)
    for panel, name in zip(panels, metrics, strict=True):
        _draw_bars(panel, results, styles, name)
        panel.set_xlabel(textwrap.fill(metric_info(name).label, 14), fontsize=8)
    caption = (
        f"{_CAVEAT} Means over the seeds that trained to their end; dots: each seed. Speed and peak memory are of the "
        "whole training step; saved for backward are the bytes that one micro-batch's forward pass saves. Hatched: no "
        "number."
    )
    return render(figure, "costs", "Speed and memory", caption)


def _draw_bars(panel: Axes, results: Results, styles: dict[str, VariantStyle], metric: str) -> None:
    is_share = metric == "norm_share"
    for y, condition in enumerate(results.main_conditions):
        values = [score.value for score in results.scores(condition, metric).values()]
        if not values:
            hatch(panel, y, diverged=False)
            continue
        mean = sum(values) / len(values)
        panel.barh(y, mean, height=0.8, color=styles[condition.variant].colour, alpha=0.4, linewidth=0)
        panel.plot(values, [y] * len(values), ".", color=GREY, markersize=2)
        text = f"{100 * mean:.1f}%" if is_share else f"{mean:.0f}" if mean >= 100 else f"{mean:.1f}"
        panel.text(0.02, y, text, transform=panel.get_yaxis_transform(), va="center", fontsize=6.5)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(2))
    if is_share:
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
