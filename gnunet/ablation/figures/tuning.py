"""The search of one key's value: every variant at every setting, and what was chosen."""

import math

import numpy as np
from matplotlib.patches import Rectangle

from gnunet.ablation.analysis.formatting import percent_tick
from gnunet.ablation.analysis.metrics import metric_info
from gnunet.ablation.analysis.results import Results
from gnunet.ablation.figures.style import DIVERGED, MISSING, ROW, Picture, new_figure, render, rows_axis

_WORST = 0.2
"""Difference to a row's best at which the colours end."""


def draw(results: Results) -> Picture | None:
    """A row for each condition and a column for each value tried; None where the study has no tuning."""
    tried = results.tuning_scores()
    if not tried:
        return None
    values = list(next(iter(tried.values())))
    numbers = np.array([[math.nan if v is None else v for v in row.values()] for row in tried.values()], np.float64)
    finite = np.where(np.isfinite(numbers), numbers, math.nan)
    best = np.array([np.nanmin(row) if np.isfinite(row).any() else math.nan for row in finite])[:, None]
    figure = new_figure(ROW * 1.1 * len(tried) + 1.0, width=min(10.0, 3.0 + 1.1 * len(values)))
    panel = figure.subplots()
    panel.grid(visible=False)
    image = panel.imshow(
        (finite - best) / np.abs(best), cmap="Blues_r", vmin=0, vmax=_WORST, aspect="auto", interpolation="none"
    )
    for y, condition in enumerate(tried):
        chosen = results.plan.chosen.get((condition.variant, condition.setting))
        for x, value in enumerate(values):
            number = numbers[y, x]
            if math.isfinite(number):
                dark = number - best[y, 0] < 0.4 * _WORST * abs(best[y, 0])
                panel.text(
                    x, y, f"{number:.4g}", ha="center", va="center", fontsize=8, color="white" if dark else "black",
                    weight="bold" if value == chosen else "normal",
                )  # fmt: skip
            else:
                how = DIVERGED if math.isinf(number) else MISSING
                panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **how))
            if value == chosen:
                panel.add_patch(Rectangle((x - 0.5, y - 0.45), 1, 0.9, fill=False, edgecolor="#D55E00", linewidth=2))
    rows_axis(panel, [results.label(condition) for condition in tried])
    panel.set_xticks(range(len(values)), values)
    panel.set_xlabel(results.study.tuning.key)
    bar = figure.colorbar(image, extend="max", aspect=30, pad=0.02)
    bar.set_label("above the row's best")
    bar.ax.yaxis.set_major_formatter(percent_tick)
    name = metric_info(results.study.tuning.metric).title
    seeds = ", ".join(map(str, results.study.tuning.seeds))
    caption = (
        f"Mean {name} over the tuning seeds ({seeds}), which are not reported on. Framed: chosen. Crosshatched: a seed "
        "diverged. Hatched: missing. A choice at either end says that the search was too narrow."
    )
    return render(figure, "tuning", f"Tuning of {results.study.tuning.key}", caption)
