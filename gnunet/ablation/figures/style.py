"""What all figures share: a style for each variant, legends, labelled rows, and files with reproducible bytes."""

import io
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from gnunet.ablation.plan import Condition

WIDTH = 5.0  # inches: text of 8 points is 9 pixels high where a figure is 400 pixels wide
DPI = 160  # of PNG
ROW = 0.17  # inches of a row of text
GREY, LIGHT = "0.45", "0.85"
_MISSING = {"facecolor": "white", "edgecolor": "0.65", "hatch": "////", "linewidth": 0.0}
PATCHES = {False: _MISSING, True: _MISSING | {"edgecolor": "0.35", "hatch": "xxxx"}}
"""Patches where there is no record, and where the training diverged."""
SHADES = "Faint to full: the values of a variant's other axes, in their order."  # for captions
HATCHES = "Crosshatched: diverged; hatched: missing."  # the patches, for captions
_COLOURS_OF_PNG = 128  # in its palette
# The colour-blind-safe palette of Okabe and Ito, without yellow (faint on white), and Tol's wine and indigo.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#4B3FA7"]
_LEGEND = {"labelspacing": 0.2, "columnspacing": 1.0, "handlelength": 1.6, "handletextpad": 0.5}
_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]  # no arrows: they stand for divergence
_LINES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2))]


@dataclass(frozen=True)
class VariantStyle:
    """How a variant is drawn in every figure."""

    colour: str
    marker: str
    line: Any


@dataclass(frozen=True)
class Picture:
    """A rendered figure."""

    name: str  # of its files, without the suffix
    title: str
    caption: str  # how to read it, in a sentence or two
    png: bytes
    svg: str | None  # None where the picture is made of pixels


def variant_styles(variants: Sequence[str], baseline: str) -> dict[str, VariantStyle]:
    """A style for each variant: the baseline is black, the others differ in colour, then in line and marker."""
    styles = {}
    for i, variant in enumerate(variant for variant in variants if variant != baseline):
        turn = i // len(_COLOURS)
        marker = _MARKERS[(i + 3 * turn) % len(_MARKERS)]
        styles[variant] = VariantStyle(_COLOURS[i % len(_COLOURS)], marker, _LINES[turn % len(_LINES)])
    return styles | {baseline: VariantStyle("black", "o", "-")}


def figure_style() -> AbstractContextManager[None]:
    """Use matplotlib's defaults with the report's settings over them, whatever the user's settings are."""
    return style.context(["default", Path(__file__).with_name("report.mplstyle")])


def new_figure(height: float, width: float = WIDTH, layout: Literal["constrained", "none"] = "constrained") -> Figure:
    """An empty figure, sizes in inches, that pyplot does not know."""
    return Figure(figsize=(width, height), layout=layout)


def render(figure: Figure, name: str, title: str, caption: str, *, pixels: bool = False) -> Picture:
    """Write a figure as PNG and, unless it is made of pixels, as SVG whose text is text."""
    name = re.sub(r"[^\w-]+", "_", name)  # axes and metrics are named by the user
    figure.savefig(drawn := io.BytesIO(), format="png", dpi=DPI)
    image = Image.open(drawn).convert("RGB")
    # Half the bytes of true colour or less.
    method = Image.Quantize.MEDIANCUT if pixels else Image.Quantize.MAXCOVERAGE
    image = image.quantize(256 if pixels else _COLOURS_OF_PNG, method=method, dither=Image.Dither.NONE)
    image.save(png := io.BytesIO(), "png", optimize=True)
    if pixels:
        return Picture(name, title, caption, png.getvalue(), None)
    figure.set_layout_engine("none")  # the layout is known, and takes as long as drawing
    svg = io.StringIO()
    with rc_context({"svg.hashsalt": name}):  # ids that are unique in a page of figures
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(name, title, caption, png.getvalue(), svg.getvalue())


def legend_height(labels: Collection[str]) -> float:
    """The height in inches of a legend with these labels."""
    return 0.16 * math.ceil(len(labels) / _legend_columns(labels)) + 0.05


def _legend_columns(labels: Collection[str]) -> int:
    return max(1, int(WIDTH / (0.45 + 0.065 * max(map(len, labels), default=1))))


def put_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Put a legend above the panels."""
    location = "outside upper left" if figure.get_layout_engine() else "upper left"
    columns = _legend_columns([handle.get_label() for handle in handles])
    figure.legend(handles=handles, loc=location, borderaxespad=0.2, ncols=min(columns, len(handles)), **_LEGEND)


def variant_legend(
    figure: Figure,
    styles: Mapping[str, VariantStyle],
    variants: Iterable[str],
    more: Iterable[Any] = (),
    **changes: Any,
) -> None:
    """Put a legend of variants, and `more` handles, above the panels, with `changes` to the lines with markers."""
    lines = {v: {"color": styles[v].colour, "marker": styles[v].marker, "linestyle": styles[v].line} for v in variants}
    put_legend(figure, [*(Line2D([], [], label=variant, **line | changes) for variant, line in lines.items()), *more])


def row_panels(labels: Sequence[str], count: int, *, row: float = ROW, extra: float) -> tuple[Figure, Sequence[Axes]]:
    """`count` panels that share labelled rows, `row` inches high; `extra` is the height of the rest."""
    figure = new_figure(row * len(labels) + extra)
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for panel in panels:
        panel.tick_params(axis="y", length=0)
        panel.grid(visible=False, axis="y")
    set_rows(panels[0], labels)
    return figure, panels


def set_rows(panel: Axes, labels: Sequence[str]) -> None:
    """Label the rows of a panel, from the top."""
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)


def shades(conditions: Sequence[Condition]) -> dict[Condition, float]:
    """The opacity of each condition in a panel, from faint to full over those of a variant."""
    found = {}
    for variant in dict.fromkeys(condition.variant for condition in conditions):
        of_variant = [condition for condition in conditions if condition.variant == variant]
        found |= dict(
            zip(of_variant, np.linspace(1 if len(of_variant) == 1 else 0.3, 1, len(of_variant)).tolist(), strict=True)
        )
    return found


def hatch(axes: Axes, y: float, *, diverged: bool, height: float = 0.8, **changes: Any) -> None:
    """Mark a row as diverged or missing, with `changes` to the patch."""
    axes.axhspan(y - height / 2, y + height / 2, **PATCHES[diverged] | changes)
