"""The losses of a run as a picture."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gnunet.checkpoint.jsonl import read_jsonl
from gnunet.diffusion import encode_png
from gnunet.files import atomic_write

CURVES = {"loss": ("training loss", "#7aa6d8"), "validation_loss": ("validation loss", "#c44e20")}
"""Keys of metrics.jsonl, each with its label and colour."""
WIDTH, HEIGHT = 960, 540
LEFT, TOP, RIGHT, BOTTOM = 80, 40, 930, 480  # of the axes
OVERSAMPLING = 2  # against jagged lines


def draw_curves(metrics: Path, path: Path) -> None:
    """Draw the losses in `metrics` against images seen as the PNG `path`; nothing if there are none.

    The highest 2% of the training losses, the first of a run, may lie above the picture.
    """
    records = read_jsonl(metrics)
    curves = {}
    for key in CURVES:
        points = np.array([(each["images"], each.get(key)) for each in records], float).reshape(-1, 2)
        if len(points := points[np.isfinite(points[:, 1])]):
            curves[key] = points
    if not curves:
        return
    x_max = max(points[:, 0].max() for points in curves.values()) or 1.0
    y_min = min(points[:, 1].min() for points in curves.values())
    y_max = max(np.quantile(points[:, 1], 0.98 if key == "loss" else 1.0) for key, points in curves.items())
    margin = 0.05 * (y_max - y_min) or 0.05 * abs(y_min) or 1.0
    y_min, y_max = y_min - margin, y_max + margin

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            OVERSAMPLING * (LEFT + (RIGHT - LEFT) * x / x_max),
            OVERSAMPLING * (BOTTOM - (BOTTOM - TOP) * (min(y, 2 * y_max - y_min) - y_min) / (y_max - y_min)),
        )

    canvas = Image.new("RGB", (OVERSAMPLING * WIDTH, OVERSAMPLING * HEIGHT), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(OVERSAMPLING * 14)
    for x in ticks(0, x_max):
        left, bottom = at(x, y_min)
        draw.line((left, bottom, left, OVERSAMPLING * TOP), "#e0e0e0", OVERSAMPLING)
        draw.text((left, bottom + OVERSAMPLING * 6), f"{x:,.0f}", "black", font, anchor="mt")
    for y in ticks(y_min, y_max):
        left, top = at(0, y)
        draw.line((left, top, OVERSAMPLING * RIGHT, top), "#e0e0e0", OVERSAMPLING)
        draw.text((left - OVERSAMPLING * 6, top), f"{y:g}", "black", font, anchor="rm")
    for key, points in curves.items():
        line, radius = [at(x, y) for x, y in points], OVERSAMPLING * 3
        draw.line(line, CURVES[key][1], OVERSAMPLING * 2, joint="curve")
        for x, y in line if len(line) <= 100 else ():
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), CURVES[key][1])
    draw.rectangle((0, 0, OVERSAMPLING * WIDTH, OVERSAMPLING * TOP), "white")  # what lies above
    draw.text((OVERSAMPLING * RIGHT, OVERSAMPLING * (HEIGHT - 10)), "images seen", "black", font, anchor="rb")
    for i, key in enumerate(curves):
        draw.text((OVERSAMPLING * (LEFT + 180 * i), OVERSAMPLING * 12), *CURVES[key], font)
    atomic_write(path, encode_png(canvas.reduce(OVERSAMPLING)))


def ticks(low: float, high: float) -> list[float]:
    """Up to six round numbers between two."""
    step = 10 ** math.floor(math.log10((high - low) / 6))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
