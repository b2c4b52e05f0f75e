"""What each variant costs in speed and memory: bars, and the loss against it with the variants that no other beats."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from gnunet.ablation.analysis.formatting import metric_info
from gnunet.ablation.analysis.results import Condition, Results
from gnunet.ablation.analysis.tables import loss_metric
from gnunet.ablation.figures.scales import loss_axis
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
_LABEL_OFFSETS = [(7, 0), (-7, 0), *((dx, dy) for dy in (-13, -24, -35, -46, 13) for dx in (0, 6, -6))]
"""Where a label may be, in printer's points from its point: at its side, else below, where no other point is."""
_LABEL_BACKGROUND = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}
_CAVEAT = (
    "Implementations are compared, not norms: group norm is one fused operator, others are plain torch operations."
)
_COSTS = ("images_per_second", "norm_share", "saved_mib", "peak_memory_mib")


def draw_pareto(results: Results, styles: dict[str, VariantStyle]) -> Picture | None:
    """A panel for each cost; None where no record has a loss and a cost."""
    metric = loss_metric(results)
    losses = {condition: results.mean(condition, metric) for condition in results.conditions}
    shown: dict[str, dict[Condition, Point]] = {}
    for name in _SIGNS:
        points = {condition: (results.mean(condition, name), loss) for condition, loss in losses.items()}
        if finite := {c: point for c, point in points.items() if all(map(math.isfinite, point))}:
            shown[name] = finite
    if not shown:
        return None
    figure = new_figure(2.2 * len(shown) + legend_height(styles))
    panels = figure.subplots(len(shown), 1, sharey=True, squeeze=False)[:, 0]
    panels[0].set_ylabel(metric_info(metric).title)
    top = _scale(panels[0], [loss for points in shown.values() for _, loss in points.values()])
    for panel, (name, points) in zip(panels, shown.items(), strict=True):
        for condition, (cost, loss) in points.items():
            style = styles[condition.variant]
            marker = {"marker": style.marker, "markerfacecolor": style.colour if loss <= top else "white"}
            panel.plot(cost, min(loss, top), color=style.colour, clip_on=False, markersize=5, **marker)
        loss_axis(panel, "x", [cost for cost, _ in points.values()])
        panel.set_xlabel(metric_info(name).label)
        if panel.get_xscale() == "linear":
            panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    variant_legend(figure, styles, results.study.variants, linestyle="none")
    figure.draw_without_rendering()  # labels are placed in pixels, which the layout decides
    for panel, (name, points) in zip(panels, shown.items(), strict=True):
        front = _front(points, _SIGNS[name])
        panel.plot(*zip(*(points[c] for c in front), strict=True), color=GREY, linewidth=0.8, zorder=1)
        _place_labels(panel, list(points.values()), {results.label(c): points[c] for c in front})
    absent = [results.label(condition) for condition, loss in losses.items() if not math.isfinite(loss)]
    caption = (
        f"{_CAVEAT} Means over the seeds that trained to their end. Down is better, and so is right for speed and left "
        "for memory; the line joins the labelled conditions, which none beats in both. Hollow: above the upper edge."
        + (f" Without a loss: {', '.join(absent)}." if absent else "")
    )
    return render(figure, "pareto", "Loss against speed and memory", caption)


def _scale(panel: Axes, losses: Sequence[float]) -> float:
    """Leave room for labels below the lowest loss, and cut off losses far above the others; returns the upper end."""
    low, middle, high = min(losses), float(np.median(losses)), max(losses)
    top = min(high, low + 3 * (middle - low)) if middle > low else high
    room = (top - low) or 0.05 * abs(low) or 1.0
    panel.set_ylim(low - 0.35 * room, top + 0.03 * room)
    return top


def _front(points: Mapping[Condition, Point], sign: float) -> list[Condition]:
    """The conditions that no other beats in both cost and loss, from the cheapest."""
    front: list[Condition] = []
    for condition in sorted(points, key=lambda c: (sign * points[c][0], points[c][1])):
        if not front or points[condition][1] < points[front[-1]][1]:
            front.append(condition)
    return front


def _place_labels(panel: Axes, points: Sequence[Point], labels: Mapping[str, Point]) -> None:
    """Write labels next to their points, where they hide the least of points and other labels."""
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in panel.transData.transform(np.array(points))]
    inside = panel.get_window_extent()
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    for label, point in labels.items():
        candidates = []
        for dx, dy in _LABEL_OFFSETS:
            alignment = {"ha": "left" if dx > 0 else "right" if dx < 0 else "center", "va": "center"}
            place = {"xytext": (dx, dy), "textcoords": "offset points", "fontsize": 7, **alignment}
            text = panel.annotate(label, point, **place)
            box = text.get_window_extent()
            text.remove()
            hidden = sum(_overlap(box, other) for other in taken) + box.width * box.height - _overlap(box, inside)
            candidates.append((hidden, place, box))
        _, place, box = min(candidates, key=lambda candidate: candidate[0])
        panel.annotate(label, point, arrowprops=line, bbox=_LABEL_BACKGROUND, **place)
        taken.append(box)


def _overlap(a: Bbox, b: Bbox) -> float:
    """The area that two boxes share."""
    shared = Bbox.intersection(a, b)
    return shared.width * shared.height if shared is not None else 0.0


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
