"""Batch-dependent norms in training and in use: the loss with running, precise and batch statistics."""

import math

from gnunet.ablation.analysis.results import Results
from gnunet.ablation.figures.scales import loss_axis, relative_axis
from gnunet.ablation.figures.style import (
    DIVERGED,
    GREY,
    LIGHT,
    MISSING,
    ROW,
    Picture,
    new_figure,
    put_legend,
    render,
    rows_axis,
)

_LOOKS = {
    "validation_loss": {"label": "running statistics", "marker": "o", "color": "black"},
    "validation_loss_precise": {"label": "precise statistics", "marker": "D", "color": "#0072B2"},
    "validation_loss_batch": {"label": "statistics of the batch at hand", "marker": "^", "color": "#D55E00"},
}


def draw(results: Results) -> Picture | None:
    """The losses of each condition with batch-dependent norms; None where none of them has a loss."""
    conditions = [condition for condition in results.conditions if results.is_batch_dependent(condition)]
    if not any(math.isfinite(results.mean(condition, "validation_loss")) for condition in conditions):
        return None
    figure = new_figure(ROW * 1.3 * len(conditions) + 1.0)
    left, right = figure.subplots(1, 2, sharey=True)
    losses, ends = [], []
    for y, condition in enumerate(conditions):
        means = {metric: results.mean(condition, metric) for metric in _LOOKS}
        finite = [mean for mean in means.values() if math.isfinite(mean)]
        if not finite:
            for panel in (left, right):
                panel.axhspan(y - 0.4, y + 0.4, **(DIVERGED if results.diverged(condition) else MISSING))
            continue
        losses += finite
        left.plot([min(finite), max(finite)], [y, y], color=GREY, linewidth=0.8, zorder=1)
        for step, (metric, look) in zip((0, -0.16, 0.16), _LOOKS.items(), strict=True):
            left.plot(means[metric], y, linestyle="none", **look)
            if metric == "validation_loss":
                continue
            difference = results.compare(condition, condition, metric, to="validation_loss")
            if not difference.by_seed:
                continue
            if interval := difference.interval:
                right.plot([interval.low, interval.high], [y + step] * 2, color=look["color"], linewidth=1.5)
                ends += [interval.low, interval.high]
            middle = sum(difference.by_seed) / len(difference.by_seed)
            right.plot(middle, y + step, linestyle="none", **look)
            ends.append(middle)
    loss_axis(left, "x", losses)
    left.set_xlabel("validation loss")
    relative_axis(right, "x", ends, "difference to the loss with running statistics")
    right.axvline(0, color="black", linewidth=1)
    rows_axis(left, [results.label(condition) for condition in conditions])
    right.grid(visible=False, axis="y")
    right.tick_params(axis="y", length=0)
    for y in range(len(conditions)):
        right.axhline(y + 0.5, color=LIGHT, linewidth=0.5, zorder=0)
    put_legend(figure, [left.plot([], [], linestyle="none", **look)[0] for look in _LOOKS.values()])
    caption = (
        "Final averaged weights on the same bank. Running: as in sampling. Precise: statistics estimated anew on "
        "training images. Batch: each batch's own, as in training. Right: paired by seed, with 95% intervals (see "
        "Statistics). Crosshatched: diverged; hatched: missing."
    )
    return render(figure, "train_eval_gap", "Training and evaluation statistics of batch-dependent norms", caption)
