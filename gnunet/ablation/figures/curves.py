"""The validation loss during training, and its difference to the baseline."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gnunet.ablation.analysis.results import Condition, Results
from gnunet.ablation.figures.scales import PREDICTORS, clip, draw_predictors, loss_axis, relative_axis
from gnunet.ablation.figures.style import (
    SHADES,
    Picture,
    VariantStyle,
    legend_height,
    new_figure,
    render,
    shades,
    variant_legend,
)

_MAX_IN_A_PANEL = 8  # variants that one panel has room for; more get a panel each
_MAX_COLUMNS = 3


@dataclass(frozen=True)
class _Curve:
    """The curve of one trial: x and y, float64 (n,)."""

    x: np.ndarray
    y: np.ndarray
    state: str


Read = Callable[[Results, Condition, int], _Curve | None]  # reads the curve of a trial


def draw(results: Results, styles: dict[str, VariantStyle]) -> list[Picture | None]:
    """Two figures, each None where no record has what it shows."""
    base = results.study.baseline
    absolute = (
        "Mean over the seeds, and from the lowest to the highest. Thin lines: seeds that collapsed or, with a cross at "
        "the end, diverged."
    )
    relative = (
        f"Loss relative to {base}'s of the same seed after the same images: mean over the seeds, lowest to highest."
    )
    title = "Validation loss over images"
    return [
        _draw(results, styles, _loss, "loss_over_images", title, absolute),
        _draw(results, styles, _difference, "difference_over_images", f"{title}: difference to {base}", relative),
    ]


def _draw(
    results: Results, styles: dict[str, VariantStyle], read: Read, name: str, title: str, caption: str
) -> Picture | None:
    """A panel for each setting of the baseline or, of many variants in one setting, for each variant."""
    study, base, relative = results.study, results.study.baseline, read is _difference
    variants = [variant for variant in study.variants if not (relative and variant == base)]
    curves = {
        condition: [curve for seed in study.seeds if (curve := read(results, condition, seed))]
        for condition in results.conditions
    }
    values = [curve.y for found in curves.values() for curve in found if curve.state == "complete"]
    if not values:
        return None
    apart = not study.axes and len(variants) > _MAX_IN_A_PANEL
    panels_of = {
        ", ".join(f"{axis}: {value}" for axis, value in at): conditions
        for at, conditions in results.by_base_setting.items()
    }
    if apart:
        panels_of = {v: [results.at(name, ()) for name in dict.fromkeys([base, v])] for v in variants}
    titles = list(panels_of)
    columns = min(_MAX_COLUMNS, len(titles))
    rows = math.ceil(len(titles) / columns)
    known = {} if relative else results.predictors("validation_loss")
    predictors = {name: known[name] for name in ("wiener", "scalar") if name in known}
    labels = [*([] if apart else variants), *(PREDICTORS[name][0] for name in predictors)]
    above = 0.25 + legend_height(labels)  # inches: titles, legend
    height = (2.4 if rows == 1 else 1.1 if apart else 1.3) * rows + 0.45 + above
    figure = new_figure(height, layout="none")  # constrained layout takes seconds for so many panels
    figure.subplots_adjust(0.14, 0.45 / height, 0.97, 1 - above / height, wspace=0.1, hspace=0.35 if apart else 0.6)
    grid = list(figure.subplots(rows, columns, sharex=apart, sharey=True, squeeze=False).flat)
    for panel in grid[len(titles) :]:
        panel.set_visible(False)
    panels = grid[: len(titles)]
    if relative:
        relative_axis(panels[0], "y", np.concatenate(values).tolist(), f"difference to {base}")
    else:
        loss_axis(panels[0], "y", [*np.concatenate(values).tolist(), *predictors.values()])
    lines = [draw_predictors(panel, predictors) for panel in panels][0]
    caption += " The loss is uniform by noise level." if known else ""
    for panel, conditions in zip(panels, panels_of.values(), strict=True):
        for condition, alpha in shades(conditions).items():
            _draw_curves(panel, styles[condition.variant], curves[condition], alpha)
    caption += f" {SHADES}" if any(len(study.axes_of(v)) > len(study.axes_of(base)) for v in variants) else ""
    caption += f" Black: {base}." if apart else ""
    for panel, panel_title in zip(panels, titles, strict=True):
        panel.set_title(panel_title, fontsize=8)
        panel.locator_params(axis="x", nbins=4)
        panel.xaxis.set_major_formatter(lambda images, _: f"{images / 1000:g}k" if images >= 1000 else f"{images:g}")
        if relative:
            panel.axhline(0, color="black", linewidth=0.8)
    for panel in panels[-columns:]:
        panel.tick_params(labelbottom=True)
    variant_legend(figure, styles, [] if apart else variants, lines, marker=None)
    figure.text(0.56, 0.05 / height, "images seen", ha="center", va="bottom")
    y_label = panels[0].get_ylabel() or "validation loss"
    figure.text(0.005, 0.5, y_label, rotation=90, ha="left", va="center")
    panels[0].set_ylabel("")
    return render(figure, name, title, caption)


def _draw_curves(panel: Axes, style: VariantStyle, curves: Sequence[_Curve], alpha: float = 1.0) -> None:
    line = {"color": style.colour, "linestyle": style.line, "alpha": alpha, "zorder": 4}
    if mean := _mean(curves):
        x, y, low, high = mean
        panel.plot(x, y, marker=".", markersize=3, **line)
        panel.fill_between(x, low, high, color=style.colour, alpha=0.2 * alpha, linewidth=0, zorder=3)
        at, arrow = clip(panel, "y", y[-1])
        if arrow:
            panel.plot(x[-1], at, marker=arrow, color=style.colour, markersize=6, clip_on=False, zorder=4)
    for curve in curves:
        if curve.state != "complete" and len(curve.x):
            panel.plot(curve.x, curve.y, linewidth=0.6, **line)
            if curve.state == "diverged":
                panel.plot(curve.x[-1], curve.y[-1], "x", color=style.colour, zorder=4)


def _mean(curves: Sequence[_Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Mean x, mean y, lowest and highest y of the complete curves, as far as all of them go."""
    complete = [curve for curve in curves if curve.state == "complete"]
    if not complete:
        return None
    length = min(len(curve.x) for curve in complete)
    x, y = (np.stack([getattr(curve, name)[:length] for curve in complete]) for name in "xy")
    return x.mean(axis=0), y.mean(axis=0), y.min(axis=0), y.max(axis=0)


def _validation(record: Mapping[str, Any]) -> np.ndarray:
    """Images seen and validation loss where that is finite, float64 (2, n)."""
    pairs = [(line["images"], line["validation_loss"]) for line in record["validation"]]
    return np.array([pair for pair in pairs if pair[1] is not None], dtype=np.float64).reshape(-1, 2).T


def _loss(results: Results, condition: Condition, seed: int) -> _Curve | None:
    record = results.record(condition, seed)
    return _Curve(*_validation(record), results.state(condition, seed)) if record else None


def _difference(results: Results, condition: Condition, seed: int) -> _Curve | None:
    """The loss over the baseline's, less 1; None for the baseline itself."""
    record = results.record(condition, seed)
    base_condition = results.at(results.study.baseline, condition.setting)
    base = results.record(base_condition, seed)
    if record is None or base is None or condition.variant == results.study.baseline:
        return None
    images, losses = _validation(record)
    base_images, base_losses = _validation(base)
    shared, own, others = np.intersect1d(images, base_images, return_indices=True)
    if results.state(base_condition, seed) != "complete" or not len(shared):
        return None
    return _Curve(shared, losses[own] / base_losses[others] - 1, results.state(condition, seed))
