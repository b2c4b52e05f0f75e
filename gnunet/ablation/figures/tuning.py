"""The search over one key's values: every variant in every setting, and what was chosen."""

import math

import numpy as np
from matplotlib.patches import Rectangle

from gnunet.ablation.analysis.formatting import metric_info, percent_tick
from gnunet.ablation.analysis.results import Results
from gnunet.ablation.figures.style import PATCHES, ROW, Picture, new_figure, render, set_rows

_WORST = 0.2  # difference to the best of a row at which the colours end


def draw(results: Results) -> Picture | None:
    """A row for each condition and a column for each value; None where the study has no tuning."""
    scores = results.plan.tuning_scores
    if not scores:
        return None
    tuning, values = results.study.tuning, list(next(iter(scores.values())))
    numbers = np.array([[math.nan if v is None else v for v in row.values()] for row in scores.values()], np.float64)
    finite = np.where(np.isfinite(numbers), numbers, math.nan)
    best = np.array([np.nanmin(row) if np.isfinite(row).any() else math.nan for row in finite])[:, None]
    above = (finite - best) / np.abs(best)
    figure = new_figure(ROW * 1.1 * len(scores) + 0.7)
    panel = figure.subplots()
    panel.grid(visible=False)
    image = panel.imshow(above, cmap="Blues_r", vmin=0, vmax=_WORST, aspect="auto", interpolation="none")
    for y, condition in enumerate(scores):
        chosen = results.plan.chosen.get(condition)
        for x, value in enumerate(values):
            number = numbers[y, x]
            if math.isfinite(number):
                colour = "white" if number - best[y, 0] < 0.4 * _WORST * abs(best[y, 0]) else "black"
                style = {"fontsize": 7, "color": colour, "weight": "bold" if value == chosen else "normal"}
                panel.text(x, y, f"{number:.4g}", ha="center", va="center", **style)
            else:
                panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **PATCHES[math.isinf(number)]))
            if value == chosen:
                panel.add_patch(Rectangle((x - 0.5, y - 0.45), 1, 0.9, fill=False, edgecolor="#D55E00", linewidth=2))
    set_rows(panel, [results.label(condition) for condition in scores])
    panel.set_xticks(range(len(values)), values)
    panel.set_xlabel(tuning.key)
    bar = figure.colorbar(image, extend="max", aspect=30, pad=0.02)
    bar.set_label("above the row's best")
    bar.ax.yaxis.set_major_formatter(percent_tick)
    seeds = ", ".join(map(str, tuning.seeds))
    caption = (
        f"Mean {metric_info(tuning.metric).title} over the tuning seeds ({seeds}), which are not reported on. Framed: "
        "chosen. Crosshatched: a seed diverged. Hatched: missing. A choice at either end means that the search was too "
        "narrow."
    )
    return render(figure, "tuning", f"Tuning of {tuning.key}", caption)
