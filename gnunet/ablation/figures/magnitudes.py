"""How large activations and gradients are along the noise levels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

from gnunet.ablation.analysis.results import Condition, Results
from gnunet.ablation.figures.style import DIVERGED, MISSING, ROW, Picture, new_figure, render, rows_axis

Reader = Callable[[Mapping[str, Any]], Sequence[float | None]]
"""Takes one quantity, a number for each bin, from a record's magnitudes."""
_REGIONS = ("encoder", "middle", "decoder", "out")


def draw(results: Results) -> list[Picture]:
    """Two figures, of RMS with gradients and of maxima; none where no record has magnitudes."""
    rms = {f"{region}: RMS": _of_region("activation_rms", region) for region in _REGIONS}
    largest = {f"{region}: largest": _of_region("activation_max", region) for region in _REGIONS}
    gradient = {"gradient norm": lambda magnitudes: magnitudes["gradient_norm"]}
    pictures = [
        _draw(
            results, rms | gradient, "magnitudes", "Activations and gradients by noise level",
            "Root mean square of what goes into the norm layers of each region, and the norm of the gradient of the "
            "bin's mean loss by all weights",
        ),
        _draw(
            results, largest, "largest_activations", "Largest activations by noise level",
            "Largest absolute value of what goes into the norm layers of each region",
        ),
    ]  # fmt: skip
    return [picture for picture in pictures if picture]


def _of_region(what: str, region: str) -> Reader:
    return lambda magnitudes: magnitudes[what][region]


def _draw(results: Results, panels: Mapping[str, Reader], name: str, title: str, what: str) -> Picture | None:
    records = [record for record in results.found if record["magnitudes"]]
    if not records:
        return None
    levels = records[0]["magnitudes"]["log_snr"]
    grids = {label: _grid(results, read, len(levels)) for label, read in panels.items()}
    figure = new_figure(ROW * len(results.conditions) + 1.2)
    drawn = figure.subplots(1, len(grids), sharey=True)
    half = (levels[1] - levels[0]) / 2 if len(levels) > 1 else 1.0
    for panel, (label, grid) in zip(drawn, grids.items(), strict=True):
        panel.grid(visible=False)
        panel.set_title(label)
        positive = grid[np.isfinite(grid) & (grid > 0)]
        if positive.size:
            image = panel.imshow(
                grid, norm=LogNorm(positive.min(), positive.max()), cmap="cividis", aspect="auto",
                interpolation="none", extent=(levels[0] - half, levels[-1] + half, len(grid) - 0.5, -0.5),
            )  # fmt: skip
            bar = figure.colorbar(image, location="bottom", aspect=12, pad=0.01)
            ends = [positive.min(), positive.max()]
            bar.set_ticks(ends, labels=[f"{end:.2g}" for end in ends])
            bar.minorticks_off()
        for y, condition in enumerate(results.conditions):
            if not np.isfinite(grid[y]).any():
                how = DIVERGED if results.diverged(condition) else MISSING
                where = panel.get_yaxis_transform()
                panel.add_patch(Rectangle((0, y - 0.5), 1, 1, transform=where, **how))
        panel.tick_params(axis="y", length=0)
        panel.set_xlabel("log-SNR")
    rows_axis(drawn[0], [results.label(condition) for condition in results.conditions])
    caption = (
        f"{what}, with the final averaged weights in evaluation mode; geometric mean over the seeds. Colours are "
        "logarithmic and of each panel its own. Crosshatched: diverged; hatched: missing."
    )
    return render(figure, name, title, caption)


def _grid(results: Results, read: Reader, bins: int) -> np.ndarray:
    """A row for each condition, a column for each bin: the geometric mean over the seeds, NaN where there is none."""
    return np.stack([_row(results, condition, read, bins) for condition in results.conditions])


def _row(results: Results, condition: Condition, read: Reader, bins: int) -> np.ndarray:
    found = [np.array(read(r["magnitudes"]), np.float64) for r in results.records(condition) if r["magnitudes"]]
    whole = [np.where(row > 0, row, np.nan) for row in found if len(row) == bins]  # None, of an empty bin, is NaN
    return np.exp(np.mean(np.log(whole), axis=0)) if whole else np.full(bins, np.nan)
