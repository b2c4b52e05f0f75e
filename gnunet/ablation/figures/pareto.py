"""Loss against speed and memory, with the variants that no other beats in both."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from gnunet.ablation.analysis.metrics import metric_info
from gnunet.ablation.analysis.results import Condition, Results
from gnunet.ablation.figures.scales import loss_axis
from gnunet.ablation.figures.style import GREY, Picture, VariantStyle, legend_rows, new_figure, put_legend, render

_COSTS = {"images_per_second": -1.0, "saved_mib": 1.0, "peak_memory_mib": 1.0}
"""What is on the x axes, and 1 where low is good."""
_PLACES = [(7, 0), (-7, 0), *((dx, dy) for dy in (-13, -24, -35, -46, 13) for dx in (0, 6, -6))]
"""Where a name may be, in points from its point: beside it, else below, where no other point is."""
_BEHIND_NAMES = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}


def draw(results: Results, styles: dict[str, VariantStyle]) -> Picture | None:
    """A panel for each cost; None where no record has a loss and a cost."""
    losses = {condition: results.mean(condition, "validation_loss") for condition in results.conditions}
    shown: dict[str, dict[Condition, tuple[float, float]]] = {}
    for name in _COSTS:
        points = {condition: (results.mean(condition, name), loss) for condition, loss in losses.items()}
        finite = {c: point for c, point in points.items() if all(map(math.isfinite, point))}
        if finite:
            shown[name] = finite
    if not shown:
        return None
    figure = new_figure(4.4 + 0.2 * legend_rows(len(styles)))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    panels[0].set_ylabel(metric_info("validation_loss").label)
    top = _scale(panels[0], [loss for points in shown.values() for _, loss in points.values()])
    for panel, (name, points) in zip(panels, shown.items(), strict=True):
        for condition, (cost, loss) in points.items():
            look = styles[condition.variant]
            fill = look.colour if loss <= top else "white"
            panel.plot(cost, min(loss, top), marker=look.marker, color=look.colour, markerfacecolor=fill, clip_on=False)
        loss_axis(panel, "x", [cost for cost, _ in points.values()])
        panel.set_xlabel(metric_info(name).label)
        if panel.get_xscale() == "linear":
            panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    handles = [Line2D([], [], label=a, **styles[a].drawn | {"linestyle": "none"}) for a in results.study.variants]
    put_legend(figure, handles)
    figure.draw_without_rendering()  # labels are placed in pixels, which the layout decides
    for panel, (name, points) in zip(panels, shown.items(), strict=True):
        front = _front(points, _COSTS[name])
        panel.plot(*zip(*(points[c] for c in front), strict=True), color=GREY, linewidth=0.8, zorder=1)
        _place_labels(panel, list(points.values()), {results.label(c): points[c] for c in front})
    absent = [results.label(condition) for condition, loss in losses.items() if not math.isfinite(loss)]
    caption = (
        "Means over the seeds that trained to their end. Down is better, and so is right for speed and left for "
        "memory; the line joins those that none beats in both, whose names are written. Hollow: above the upper edge."
        + (f" Without a loss: {', '.join(absent)}." if absent else "")
    )
    return render(figure, "pareto", "Loss against speed and memory", caption)


def _scale(panel: Axes, losses: Sequence[float]) -> float:
    """Leave room for names below the lowest loss, and cut off what is far above the others; returns the upper end."""
    low, middle, high = min(losses), float(np.median(losses)), max(losses)
    top = min(high, low + 3 * (middle - low)) if middle > low else high
    room = (top - low) or 0.05 * abs(low) or 1.0
    panel.set_ylim(low - 0.35 * room, top + 0.03 * room)
    return top


def _front(points: dict[Condition, tuple[float, float]], sign: float) -> list[Condition]:
    """The conditions that no other is better than in both, from the cheapest on."""
    front: list[Condition] = []
    for condition in sorted(points, key=lambda c: (sign * points[c][0], points[c][1])):
        if not front or points[condition][1] < points[front[-1]][1]:
            front.append(condition)
    return front


def _place_labels(panel: Axes, points: Sequence[tuple[float, float]], labels: dict[str, tuple[float, float]]) -> None:
    """Write labels beside their points, where they hide as little as possible of points and other labels."""
    pixels = panel.transData.transform(np.array(points))
    taken: list[Bbox] = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in pixels]
    inside = panel.get_window_extent()
    for label, point in labels.items():
        best: tuple[float, dict, Bbox] | None = None
        for dx, dy in _PLACES:
            aligned = "left" if dx > 0 else "right" if dx < 0 else "center"
            how = {"xytext": (dx, dy), "textcoords": "offset points", "ha": aligned, "va": "center", "fontsize": 7.5}
            text = panel.annotate(label, point, **how)
            box = text.get_window_extent()
            text.remove()
            hidden = sum(_overlap(box, other) for other in taken) + box.width * box.height - _overlap(box, inside)
            if best is None or hidden < best[0]:
                best = hidden, how, box
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        panel.annotate(label, point, **best[1], arrowprops=line, bbox=_BEHIND_NAMES)
        taken.append(best[2])


def _overlap(a: Bbox, b: Bbox) -> float:
    """The area that two boxes share."""
    shared = Bbox.intersection(a, b)
    return shared.width * shared.height if shared is not None else 0.0
