"""The validation loss over training: against images seen, against time, and as the difference to the baseline."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from gnunet.ablation.analysis.results import Condition, Results
from gnunet.ablation.figures.scales import loss_axis, relative_axis
from gnunet.ablation.figures.style import (
    LIGHT,
    MISSING,
    Picture,
    VariantStyle,
    legend_rows,
    new_figure,
    put_legend,
    render,
)

_TOGETHER = 8
"""Arms that one panel has room for; more get a panel each."""
_COLUMNS = 4
_CAPTIONS = {
    False: "Mean over the seeds, and from the lowest to the highest. Thin lines that end in a cross: diverged seeds.",
    True: "Loss relative to {base}'s of the same seed after the same images: mean over the seeds, lowest to highest.",
}


@dataclass(frozen=True)
class _Curve:
    """One trial's: x and y, float64 (n,)."""

    x: np.ndarray
    y: np.ndarray
    diverged: bool


Reader = Callable[[Condition, int], _Curve | None]


def draw(results: Results, styles: dict[str, VariantStyle]) -> list[Picture]:
    """Three figures; none where no record has a validation loss."""
    readers = {
        "loss_over_images": (_over_images(results), "images seen", "Validation loss over images"),
        "loss_over_time": (_over_time(results), "seconds of training", "Validation loss over time"),
        "difference_over_images": (
            _difference(results), "images seen", f"Validation loss over images: difference to {results.study.baseline}"
        ),
    }  # fmt: skip
    pictures = []
    for name, (read, x_label, title) in readers.items():
        relative = name.startswith("difference")
        caption = _CAPTIONS[relative].format(base=results.study.baseline)
        if name == "loss_over_time":
            caption += " Time is that of the training steps alone, and the mean over the seeds."
        y_label = f"difference to {results.study.baseline}" if relative else "validation loss"
        panels = _Panels(results, styles, read, relative)
        if panels.apart:
            caption += f" Grey: the other variants; black: {results.study.baseline}. Hatched: missing."
        figure = panels.draw(x_label, y_label)
        if figure:
            pictures.append(render(figure, name, title, caption))
    return pictures


@dataclass(frozen=True)
class _Panels:
    """The panels of one figure."""

    results: Results
    styles: dict[str, VariantStyle]
    read: Reader
    relative: bool

    @property
    def variants(self) -> list[str]:
        """The variants that have curves."""
        study = self.results.study
        return [variant for variant in study.variants if not (self.relative and variant == study.baseline)]

    @property
    def apart(self) -> bool:
        """Whether each variant has a panel."""
        return len(self.results.settings) == 1 and len(self.variants) > _TOGETHER

    def draw(self, x_label: str, y_label: str) -> Figure | None:
        """A panel for each setting of the axes or, of many variants without axes, for each; None without curves."""
        variants, settings = self.variants, self.results.settings
        curves = {condition: self._curves(condition) for condition in self.results.conditions}
        values = [curve.y for found in curves.values() for curve in found if not curve.diverged]
        if not values:
            return None
        titles = (
            variants
            if self.apart
            else [", ".join(f"{axis}: {value}" for axis, value in setting) for setting in settings]
        )
        columns = min(_COLUMNS, len(titles))
        rows = math.ceil(len(titles) / columns)
        above = 0.3 + (0.0 if self.apart else 0.2 * legend_rows(len(variants)))  # inches: titles, legend
        height = (1.6 if rows > 1 else 3.2) * rows + 0.3 + above
        figure = new_figure(height, layout="none")  # constrained layout takes seconds for so many panels
        figure.subplots_adjust(
            left=0.085, right=0.995, bottom=0.45 / height, top=1 - above / height, wspace=0.08,
            hspace=0.3,
        )  # fmt: skip
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        panels = list(grid.flat)
        if self.apart:
            self._draw_apart(panels, {variant: curves[Condition(variant, settings[0])] for variant in variants})
        else:
            for panel, setting in zip(panels, settings, strict=False):
                for variant in variants:
                    if set(self.results.study.axes_of(variant)) <= dict(setting).keys():
                        self._draw_variant(panel, variant, curves[self.results.at(variant, setting)])
            looks = {variant: self.styles[variant] for variant in variants}
            put_legend(figure, [Line2D([], [], label=a, color=s.colour, linestyle=s.line) for a, s in looks.items()])
        self._scale(panels[0], np.concatenate(values).tolist(), y_label)
        for panel, title in itertools.zip_longest(panels, titles):
            panel.set(visible=title is not None, title=title)
            if self.relative:
                panel.axhline(0, color="black", linewidth=0.8)
        for panel in panels[len(titles) - columns : len(titles)]:
            panel.tick_params(labelbottom=True)
        figure.text(0.54, 0.05 / height, x_label, ha="center", va="bottom")
        label = panels[0].yaxis.get_label_text()
        figure.text(0.003, 0.5, label, rotation=90, ha="left", va="center", multialignment="center")
        panels[0].set_ylabel("")
        return figure

    def _curves(self, condition: Condition) -> list[_Curve]:
        found = (self.read(condition, seed) for seed in self.results.study.seeds)
        return [curve for curve in found if curve is not None]

    def _scale(self, panel: Axes, values: list[float], label: str) -> None:
        panel.set_ylabel(label)
        if self.relative:
            relative_axis(panel, "y", values, label)
        else:
            loss_axis(panel, "y", values)

    def _draw_apart(self, panels: Sequence[Axes], curves: Mapping[str, list[_Curve]]) -> None:
        """Each variant in its panel, over the means of the others in grey and that of the baseline in black."""
        means = {variant: _mean([curve for curve in found if not curve.diverged]) for variant, found in curves.items()}
        for panel, variant in zip(panels, curves, strict=False):
            others = [mean for other, mean in means.items() if mean and other != variant]
            # One line with gaps: an element for each would make the file several times as large.
            x, y = (np.concatenate([[math.nan, *mean[i]] for mean in others] or [[]]) for i in (0, 1))
            panel.plot(x, y, color=LIGHT, linewidth=0.8, zorder=1)
            if base := means.get(self.results.study.baseline):
                panel.plot(*base[:2], color="black", linewidth=0.8, zorder=2)
            self._draw_variant(panel, variant, curves[variant])
            if not curves[variant]:
                panel.add_patch(Rectangle((0, 0), 1, 1, transform=panel.transAxes, **MISSING))

    def _draw_variant(self, panel: Axes, variant: str, curves: Sequence[_Curve]) -> None:
        look = self.styles[variant]
        if mean := _mean([curve for curve in curves if not curve.diverged]):
            x, y, low, high = mean
            panel.plot(x, y, color=look.colour, linestyle=look.line, zorder=4)
            panel.fill_between(x, low, high, color=look.colour, alpha=0.2, linewidth=0, zorder=3)
        for curve in curves:
            if curve.diverged and len(curve.x):
                panel.plot(curve.x, curve.y, color=look.colour, linestyle=look.line, linewidth=0.8, zorder=4)
                panel.plot(curve.x[-1], curve.y[-1], "x", color=look.colour, markersize=6, zorder=4)


def _mean(curves: Sequence[_Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Mean x, mean y, lowest and highest y of curves, as far as all of them go; None without any."""
    if not curves:
        return None
    length = min(len(curve.x) for curve in curves)
    x, y = (np.stack([getattr(curve, name)[:length] for curve in curves]) for name in "xy")
    return x.mean(axis=0), y.mean(axis=0), y.min(axis=0), y.max(axis=0)


def _validation(record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Images seen and validation loss, as far as the losses are finite."""
    pairs = [(line["images"], line["validation_loss"]) for line in record["validation"] or []]
    kept = [(images, loss) for images, loss in pairs if loss is not None]
    images, losses = zip(*kept, strict=True) if kept else ((), ())
    return np.array(images, dtype=np.float64), np.array(losses, dtype=np.float64)


def _over_images(results: Results) -> Reader:
    def read(condition: Condition, seed: int) -> _Curve | None:
        record = results.record(condition, seed)
        return _Curve(*_validation(record), record["outcome"] == "diverged") if record else None

    return read


def _over_time(results: Results) -> Reader:
    def read(condition: Condition, seed: int) -> _Curve | None:
        record = results.record(condition, seed)
        if record is None or not (record["times"] or {}).get("seconds_at"):
            return None
        images, losses = _validation(record)
        seen, seconds = np.array([[0, 0], *record["times"]["seconds_at"]], dtype=np.float64).T
        return _Curve(np.interp(images, seen, seconds), losses, record["outcome"] == "diverged")

    return read


def _difference(results: Results) -> Reader:
    """Curves of `loss / baseline's loss - 1`; of the baseline itself there are none."""

    def read(condition: Condition, seed: int) -> _Curve | None:
        record = results.record(condition, seed)
        base = results.record(results.at(results.study.baseline, condition.setting), seed)
        if record is None or base is None or condition.variant == results.study.baseline:
            return None
        images, losses = _validation(record)
        at, others = _validation(base)
        shared, mine, theirs = np.intersect1d(images, at, return_indices=True)
        if base["outcome"] == "diverged" or not len(shared):
            return None
        return _Curve(shared, losses[mine] / others[theirs] - 1, record["outcome"] == "diverged")

    return read
