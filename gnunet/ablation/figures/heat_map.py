"""Where along the noise levels a variant differs from the baseline: rows of variants, columns of bins of log-SNR."""

import math

import numpy as np
from matplotlib.patches import Rectangle

from gnunet.ablation.analysis.formatting import is_clear, percent, percent_tick
from gnunet.ablation.analysis.results import Contrast, Results
from gnunet.ablation.figures.style import DIVERGED, MISSING, ROW, Picture, new_figure, render, set_rows

_SHOWN = 0.8
"""Share of the differences that the colours span; those beyond have the colours at the ends."""


def draw(results: Results) -> Picture | None:
    """The paired difference in the validation loss by bin of log-SNR; None where there is nothing to compare."""
    rows, base = results.contrast_rows("validation_loss"), results.study.baseline
    edges = _log_snr_edges(results)
    if not rows or edges is None:
        return None
    bins = len(edges) - 1
    grid, clear = np.full((len(rows), bins), math.nan), np.zeros((len(rows), bins), bool)
    figure = new_figure(ROW * len(rows) + 1.0)
    panel = figure.subplots()
    panel.grid(visible=False)
    for y, row in enumerate(rows):
        if row.difference is None:
            panel.text(-0.45, y, row.label, va="center", weight="bold")
            continue
        grid[y], clear[y] = _by_bin(results, row.contrast, bins)
        if row.difference.diverged or row.difference.pairs == 0:
            hatch = DIVERGED if row.difference.diverged else MISSING
            panel.add_patch(Rectangle((-0.5, y - 0.5), bins, 1, **hatch | {"facecolor": "none"}))
    limit = _limit(grid)
    image = panel.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    for y, x in np.argwhere(clear):
        panel.plot(x, y, ".", color="white" if abs(grid[y, x]) > 0.6 * limit else "black", markersize=2.5)
    labels = []
    for row in rows:
        diverged = row.difference.diverged if row.difference else 0
        labels.append("" if row.difference is None else f"{row.label} ({diverged} diverged)" if diverged else row.label)
    set_rows(panel, labels)
    panel.set_xticks(np.arange(len(edges)) - 0.5, [f"{edge:.3g}".replace("-", "\N{MINUS SIGN}") for edge in edges])
    panel.set_xlabel("log-SNR (natural logarithm; left: mostly noise)")
    is_clipped = np.nanmax(np.abs(grid), initial=0.0) > limit
    bar = figure.colorbar(image, extend="both" if is_clipped else "neither", aspect=30, pad=0.01)
    bar.set_label(f"difference to {base}, relative to it")
    bar.ax.yaxis.set_major_formatter(percent_tick)
    clipped = f" Differences beyond {percent(limit)[1:]} have the colour of the end." if is_clipped else ""
    caption = (
        f"Paired difference of the validation loss to {base} in each bin of noise levels. Red: higher. Dots: the bin's "
        f"95% interval excludes zero.{clipped} Crosshatched: seeds diverged, and the colour is of those left. Hatched: "
        "missing."
    )
    return render(figure, "log_snr", f"Validation loss by noise level: difference to {base}", caption)


def _by_bin(results: Results, contrast: Contrast, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The difference in each bin, NaN where there is none, and whether its interval excludes zero: (bins,) each."""
    differences = [results.compare(contrast.left, contrast.right, "validation_loss", b) for b in range(bins)]
    means = [np.mean(difference.by_seed) if difference.by_seed else math.nan for difference in differences]
    return np.array(means), np.array([is_clear(d) and bool(d.by_seed) for d in differences])


def _log_snr_edges(results: Results) -> list[float] | None:
    """The edges of the bins that most records have; None without records."""
    edges = [tuple(record["bank"]["log_snr_edges"]) for record in results.found if record["bank"]]
    return list(max(edges, key=edges.count)) if edges else None


def _limit(grid: np.ndarray) -> float:
    """Where the colours end, the same on both sides of zero."""
    sizes = np.abs(grid[np.isfinite(grid)])
    if not sizes.size or sizes.max() == 0:
        return 0.01
    usual = float(np.quantile(sizes, _SHOWN))
    return float(sizes.max()) if sizes.max() < 1.5 * usual else usual
