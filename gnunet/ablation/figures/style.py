"""What all figures share: one look, one style for each variant, and bytes that depend on nothing but the records."""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import rc_context, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 10.0  # inches: 960 CSS pixels, the text of the report's page
ROW = 0.23  # inches of a row of text
_LEGEND_COLUMNS = 7
GREY, LIGHT = "0.45", "0.85"
MISSING = {"facecolor": "white", "edgecolor": "0.65", "hatch": "////", "linewidth": 0.0}
"""A patch where there is no record."""
DIVERGED = MISSING | {"edgecolor": "0.35", "hatch": "xxxx"}
"""A patch where the training diverged."""
_LOOK: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "font.size": 9,
    "grid.color": "0.91",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow, which is faint on white;
# Tol's wine and indigo beside them.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#4B3FA7"]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]  # no arrows, which stand for divergence
_LINES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2))]


@dataclass(frozen=True)
class VariantStyle:
    """How a variant is drawn in every figure."""

    colour: str
    marker: str
    line: Any

    @property
    def drawn(self) -> dict[str, Any]:
        """Arguments of a line with markers."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line}


@dataclass(frozen=True)
class Picture:
    """A finished figure."""

    name: str
    """Of its files, without the ending."""
    title: str
    caption: str
    """How to read it, in a sentence or two."""
    png: bytes
    svg: str | None
    """None where the picture is made of pixels."""


def variant_styles(variants: Sequence[str], baseline: str) -> dict[str, VariantStyle]:
    """A style for each variant: the baseline is black, the others differ in colour, then in line and marker."""
    others = [variant for variant in variants if variant != baseline]
    styles = {}
    for i, variant in enumerate(others):
        turn = i // len(_COLOURS)
        marker = _MARKERS[(i + 3 * turn) % len(_MARKERS)]
        styles[variant] = VariantStyle(_COLOURS[i % len(_COLOURS)], marker, _LINES[turn % len(_LINES)])
    return styles | {baseline: VariantStyle("black", "o", "-")}


@contextmanager
def figure_style() -> Iterator[None]:
    """Matplotlib's defaults, whatever the user's are, with the report's look over them; undone at the end."""
    with style.context(["default", _LOOK]):
        yield


def new_figure(height: float, width: float = WIDTH, layout: Literal["constrained", "none"] = "constrained") -> Figure:
    """An empty figure, in inches, that no global state knows."""
    return Figure(figsize=(width, height), layout=layout)


def render(figure: Figure, name: str, title: str, caption: str, *, pixels: bool = False, dpi: int = 110) -> Picture:
    """Write a figure as PNG and, unless it is made of pixels, as SVG whose text is text."""
    name = re.sub(r"[^\w-]+", "_", name)  # axes and metrics are named by the user
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi, metadata={"Software": None})
    svg = None
    if not pixels:
        figure.set_layout_engine("none")  # the panels stay where they are: to place them takes as long as to draw
        text = io.StringIO()
        with rc_context({"svg.hashsalt": name}):  # ids that do not meet in one page
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        svg = text.getvalue()
    return Picture(name, title, caption, png.getvalue(), svg)


def legend_rows(count: int) -> int:
    """How many rows a legend of so many variants has."""
    return math.ceil(count / _LEGEND_COLUMNS)


def put_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """A legend above the panels."""
    where = "outside upper left" if figure.get_layout_engine() else "upper left"
    columns = math.ceil(len(handles) / legend_rows(len(handles)))
    figure.legend(handles=handles, loc=where, borderaxespad=0.2, ncols=columns)


def rows_axis(axes: Axes, labels: Sequence[str]) -> None:
    """Name the rows of a panel, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
