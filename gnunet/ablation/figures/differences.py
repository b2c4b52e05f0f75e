"""Paired differences of the variants to the baseline: a forest plot with intervals, and a heat map by noise level."""

import math
import statistics

import numpy as np
from matplotlib.axes import Axes

from gnunet.ablation.analysis.formatting import describe, metric_info, percent, percent_tick
from gnunet.ablation.analysis.results import Contrast, Results
from gnunet.ablation.analysis.statistics import Difference
from gnunet.ablation.figures.scales import clip, relative_axis
from gnunet.ablation.figures.style import GREY, LIGHT, ROW, Picture, VariantStyle, hatch, new_figure, render, set_rows

_COLUMNS = ((0.23, "right"), (0.33, "left"), (0.29, "right"))
"""Columns of the table next to the forest plot: position, as a share of its width, and alignment."""
_SHOWN = 0.8
"""Share of the differences that the colours of the heat map span; those beyond have the colours at the ends."""


def draw_forest(results: Results, styles: dict[str, VariantStyle], metric: str) -> Picture | None:
    """The differences in a metric, sorted; None where there is nothing to compare with the baseline."""
    rows = results.main_contrast_rows(metric)
    if not rows:
        return None
    figure = new_figure(ROW * (len(rows) + 1) + 0.6)
    panel, table = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.25])
    table.set_axis_off()
    set_rows(panel, ["" if row.difference is None else row.label for row in rows])
    differences = [row.difference for row in rows if row.difference]
    base, info = results.study.baseline, metric_info(metric)
    values = [value for difference in differences for value in (*difference.by_seed, *(difference.interval or ()))]
    relative_axis(panel, "x", values, f"difference to {base}")
    panel.axvline(0, color="black", linewidth=1)
    _write(table, -1, ("difference", "95% interval", "n"), color=GREY)
    for y, row in enumerate(rows):
        if row.difference is None:
            panel.axhspan(y - 0.5, y + 0.5, facecolor="white", zorder=2.5)
            place = {"transform": panel.get_yaxis_transform(), "va": "center", "in_layout": False}
            panel.text(0.005, y + 0.1, row.label, weight="bold", **place)
        else:
            _write(table, y, describe(row.difference))
            _draw_row(panel, y, row.difference, styles[row.contrast.left.variant])
    caption = (
        f"Paired differences to {base}, relative to it, with 95% intervals (see Statistics). Grey dots: the seeds. "
        "Filled markers: the interval excludes zero, at two seeds or more. Arrows: beyond the axis, as where trials "
        "collapsed or diverged, which is worse than any number. Hatched: missing."
    )
    return render(figure, f"forest_{metric}", f"{info.heading}: difference to {base}", caption)


def _write(table: Axes, y: float, texts: tuple[str, str, str], **style: str) -> None:
    for (x, alignment), text in zip(_COLUMNS, texts, strict=True):
        table.text(x, y, text, transform=table.get_yaxis_transform(), ha=alignment, va="center", fontsize=7, **style)


def _draw_row(panel: Axes, y: int, difference: Difference, style: VariantStyle) -> None:
    if difference.pairs == 0:
        hatch(panel, y, diverged=bool(difference.both_diverged))
        return
    panel.axhline(y, color=LIGHT, linewidth=0.5, zorder=0)
    draw_interval(panel, y, difference, style.colour)
    panel.plot(difference.by_seed, [y + 0.32] * len(difference.by_seed), ".", color=GREY, markersize=2, zorder=3)
    if difference.relative is not None and math.isfinite(difference.relative):
        fill = style.colour if difference.is_clear else "white"
        panel.plot(difference.relative, y, color=style.colour, marker=style.marker, markerfacecolor=fill, zorder=4)


def draw_interval(panel: Axes, y: float, difference: Difference, colour: str) -> None:
    """Draw the interval of a difference in a row, with arrows where it goes beyond the axis."""
    if (interval := difference.interval) is None:
        return
    ends = [clip(panel, "x", end) for end in interval]
    panel.plot([at for at, _ in ends], [y, y], color=colour, linewidth=1.5, solid_capstyle="butt")
    for at, arrow in ends:
        if arrow:
            panel.plot(at, y, marker=arrow, color=colour, markersize=6, clip_on=False)


def draw_heat_map(results: Results) -> Picture | None:
    """The paired difference in the validation loss by bin of log-SNR; None of one bin, or without a comparison."""
    rows, base = results.main_contrast_rows("validation_loss"), results.study.baseline
    if not rows:
        return None
    edges = statistics.mode(tuple(record["bank"]["log_snr_edges"]) for record in results.found)
    if (bins := len(edges) - 1) < 2:
        return None
    labels = [""] * len(rows)
    grid, clear = np.full((len(rows), bins), math.nan), np.zeros((len(rows), bins), bool)
    figure = new_figure(ROW * len(rows) + 1.0)
    panel = figure.subplots()
    panel.grid(visible=False)
    for y, row in enumerate(rows):
        if row.difference is None:
            panel.text(-0.45, y, row.label, va="center", weight="bold")
            continue
        diverged = row.difference.diverged
        labels[y] = f"{row.label} ({diverged} diverged)" if diverged else row.label
        grid[y], clear[y] = _by_bin(results, row.contrast, bins)
        if diverged or row.difference.pairs == 0:
            hatch(panel, y, diverged=bool(diverged), height=1.0, facecolor="none")
    limit = _limit(grid)
    image = panel.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    for y, x in np.argwhere(clear):
        panel.plot(x, y, ".", color="white" if abs(grid[y, x]) > 0.6 * limit else "black", markersize=2.5)
    set_rows(panel, labels)
    panel.set_xticks(np.arange(len(edges)) - 0.5, [f"{edge:.3g}".replace("-", "\N{MINUS SIGN}") for edge in edges])
    panel.set_xlabel("log-SNR (natural logarithm; left: mostly noise)")
    is_clipped = np.nanmax(np.abs(grid), initial=0.0) > limit
    bar = figure.colorbar(image, extend="both" if is_clipped else "neither", aspect=30, pad=0.01)
    bar.set_label(f"difference to {base}")
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
    return np.array(means), np.array([d.is_clear and bool(d.by_seed) for d in differences])


def _limit(grid: np.ndarray) -> float:
    """Where the colours end, the same on both sides of zero."""
    sizes = np.abs(grid[np.isfinite(grid)])
    if not sizes.size or sizes.max() == 0:
        return 0.01
    usual = float(np.quantile(sizes, _SHOWN))
    return float(sizes.max()) if sizes.max() < 1.5 * usual else usual
