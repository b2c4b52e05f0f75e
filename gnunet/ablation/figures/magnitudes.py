"""Magnitudes of activations and gradients by noise level."""

import functools
import operator
from collections.abc import Mapping

import numpy as np
from matplotlib.colors import LogNorm

from gnunet.ablation.analysis.results import Condition, Results
from gnunet.ablation.figures.style import HATCHES, Picture, hatch, render, row_panels

KeyPath = tuple[str, ...]  # where a quantity, a number for each bin, is in a record's magnitudes
_REGIONS = ("encoder", "middle", "decoder", "out")


def draw(results: Results) -> list[Picture]:
    """Two figures, of RMS with gradients and of maxima; none where no record has magnitudes."""
    if not any(record["magnitudes"] for record in results.found):
        return []
    rms = {region: ("activation_rms", region) for region in _REGIONS}
    largest = {region: ("activation_max", region) for region in _REGIONS}
    gradient = {"gradient": ("gradient_norm",)}
    return [
        _draw(
            results, rms | gradient, "magnitudes", "Activations and gradients by noise level",
            "Root mean square of the norm layers' inputs in each region, and norm of the gradient of the bin's mean "
            "loss with respect to all weights",
        ),
        _draw(
            results, largest, "largest_activations", "Largest activations by noise level",
            "Largest absolute value of the norm layers' inputs in each region",
        ),
    ]  # fmt: skip


def _draw(results: Results, panels: Mapping[str, KeyPath], name: str, title: str, shown: str) -> Picture:
    levels = next(record["magnitudes"]["log_snr"] for record in results.found if record["magnitudes"])
    half = (levels[1] - levels[0]) / 2 if len(levels) > 1 else 1.0
    labels = [results.label(condition) for condition in results.main_conditions]
    figure, axes = row_panels(labels, len(panels), extra=1.2)
    for panel, (label, path) in zip(axes, panels.items(), strict=True):
        grid = np.stack([_row(results, condition, path, len(levels)) for condition in results.main_conditions])
        panel.grid(visible=False)
        panel.set_title(label)
        trained = ["complete" in results.states(condition) for condition in results.main_conditions]
        ranged = grid[trained] if any(trained) else grid  # a network that collapsed would stretch the colours
        positive = ranged[np.isfinite(ranged) & (ranged > 0)]
        if positive.size:
            ends = [positive.min(), positive.max()]
            image = panel.imshow(
                grid, norm=LogNorm(*ends), cmap="cividis", aspect="auto", interpolation="none",
                extent=(levels[0] - half, levels[-1] + half, len(grid) - 0.5, -0.5),
            )  # fmt: skip
            bar = figure.colorbar(image, location="bottom", aspect=12, pad=0.01)
            bar.set_ticks(ends, labels=[f"{float(f'{end:.2g}'):g}" for end in ends], fontsize=7)
            bar.minorticks_off()
        for y, condition in enumerate(results.main_conditions):
            if not np.isfinite(grid[y]).any():
                hatch(panel, y, diverged="diverged" in results.states(condition), height=1.0)
        panel.set_xlabel("log-SNR")
    caption = (
        f"{shown}, with the final EMA weights in evaluation mode; geometric mean over the seeds. Colours are "
        f"logarithmic and differ between panels. {HATCHES}"
    )
    return render(figure, name, title, caption)


def _row(results: Results, condition: Condition, path: KeyPath, bins: int) -> np.ndarray:
    """The geometric mean over the seeds in each bin, (bins,); NaN where there is none."""
    magnitudes = [record["magnitudes"] for record in results.records(condition) if record["magnitudes"]]
    found = [np.array(functools.reduce(operator.getitem, path, each), np.float64) for each in magnitudes]
    complete = [np.where(row > 0, row, np.nan) for row in found if len(row) == bins]  # None, of an empty bin, is NaN
    return np.exp(np.mean(np.log(complete), axis=0)) if complete else np.full(bins, np.nan)
