"""Batch-dependent norms in training and in evaluation: the loss with running, re-estimated and batch statistics."""

import math

from gnunet.ablation.analysis.formatting import metric_info
from gnunet.ablation.analysis.results import Results
from gnunet.ablation.analysis.tables import loss_metric
from gnunet.ablation.figures.scales import loss_axis, relative_axis
from gnunet.ablation.figures.style import GREY, HATCHES, LIGHT, ROW, Picture, hatch, put_legend, render, row_panels

_MARKERS = {
    "": {"label": "running statistics", "marker": "o", "color": "black"},
    "_precise": {"label": "precise statistics", "marker": "D", "color": "#0072B2"},
    "_batch": {"label": "batch statistics", "marker": "^", "color": "#D55E00"},
}


def draw(results: Results) -> Picture | None:
    """The losses of each condition with batch-dependent norms; None where none of them has a loss."""
    loss = loss_metric(results)
    conditions = [condition for condition in results.main_conditions if results.is_batch_dependent(condition)]
    if not any(math.isfinite(results.mean(condition, loss)) for condition in conditions):
        return None
    labels = [results.label(condition) for condition in conditions]
    figure, (left, right) = row_panels(labels, 2, row=1.3 * ROW, extra=0.9)
    losses, ends = [], []
    for y, condition in enumerate(conditions):
        means = {statistics: results.mean(condition, loss + statistics) for statistics in _MARKERS}
        finite = [mean for mean in means.values() if math.isfinite(mean)]
        if not finite:
            for panel in (left, right):
                hatch(panel, y, diverged="diverged" in results.states(condition))
            continue
        losses += finite
        left.plot([min(finite), max(finite)], [y, y], color=GREY, linewidth=0.8, zorder=1)
        for shift, (statistics, marker) in zip((0, -0.16, 0.16), _MARKERS.items(), strict=True):
            left.plot(means[statistics], y, linestyle="none", **marker)
            difference = results.compare(condition, condition, loss + statistics, right_metric=loss)
            if not statistics or not difference.by_seed:
                continue
            if interval := difference.interval:
                right.plot(interval, [y + shift] * 2, color=marker["color"], linewidth=1.5)
                ends += interval
            mean = sum(difference.by_seed) / len(difference.by_seed)
            right.plot(mean, y + shift, linestyle="none", **marker)
            ends.append(mean)
    loss_axis(left, "x", losses)
    left.set_xlabel(metric_info(loss).title)
    relative_axis(right, "x", ends, "difference")
    right.axvline(0, color="black", linewidth=1)
    for y in range(len(conditions)):
        right.axhline(y + 0.5, color=LIGHT, linewidth=0.5, zorder=0)
    put_legend(figure, [left.plot([], [], linestyle="none", **marker)[0] for marker in _MARKERS.values()])
    caption = (
        "Final EMA weights on the same validation set. Running: as in sampling. Precise: re-estimated on training "
        "images. Batch: of each batch, as in training. Right: difference to running, paired by seed, with 95% "
        "intervals. " + HATCHES
    )
    return render(figure, "train_eval_gap", "Training and evaluation statistics of batch-dependent norms", caption)
