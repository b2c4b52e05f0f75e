"""Grids of pictures."""

import io
import json
import math
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

TILE_SIZE = 128  # the longer side of small images is enlarged, by a whole factor, to at least this many pixels
GAP = 2  # pixels between the tiles of a grid
GAP_COLOUR = 208  # a light grey, that shows on white and on black pictures
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]\d+)?")  # at the start of names, which they are in the order of
FONT_SIZE, MAX_MARGIN = 14, 160  # pixels, of the names beside rows


def make_grid(
    images: np.ndarray, columns: int | None = None, *, scale: int | None = 1, names: Sequence[str] | None = None,
    before: int = 0,
) -> Image.Image:  # fmt: skip
    """Lay pictures out row by row, with a gap between them.

    Args:
        images: uint8 (N, H, W, C), N at least 1, C 1 (grey) or 3 (RGB).
        columns: pictures in a row, at most where there are names; None makes the grid about square.
        scale: each pixel becomes a square of so many by so many; None enlarges small images to TILE_SIZE.
        names: each picture's class; those of one class are side by side in rows that its name is in front of.
        before: pixels of each picture before the one that `info["tiles"]` is of.

    Returns:
        The grid; its `info["tiles"]` is JSON of `scale` and of each picture's `[top, left]`.
    """
    scale = scale or math.ceil(TILE_SIZE / max(images.shape[1], before or images.shape[2]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count)) * (1 if names is None else 2)
    classes = [""] * count if names is None else [" ".join(name.split()) for name in names]
    rows: list[tuple[str, list[int]]] = []
    found = {name: NUMBER.match(name) for name in classes}
    for name in sorted(found, key=lambda name: (float(found[name][0]) if found[name] else math.inf, name)):
        members = [i for i in range(count) if classes[i] == name]
        rows += [(name, members[start : start + columns]) for start in range(0, len(members), columns)]
    font = ImageFont.load_default(FONT_SIZE)
    margin = 0 if names is None else min(math.ceil(max(map(font.getlength, classes))), MAX_MARGIN) + 2 * GAP
    # Many short rows are stacked side by side, so that the picture is about square.
    stack_width = margin + (columns if names is None else max(len(members) for _, members in rows)) * (width + GAP)
    stacks = 1 if names is None else max(1, round(math.sqrt(len(rows) * (height + GAP) / stack_width)))
    stack_rows = math.ceil(len(rows) / stacks)
    size = math.ceil(len(rows) / stack_rows) * stack_width - GAP, stack_rows * (height + GAP) - GAP
    canvas = Image.new("L" if channels == 1 else "RGB", size, (GAP_COLOUR,) * channels)
    corners = [[0, 0]] * count
    for k, (name, members) in enumerate(rows):
        left, top = k // stack_rows * stack_width, k % stack_rows * (height + GAP)
        if margin:
            label = Image.new(canvas.mode, (margin, height), (GAP_COLOUR,) * channels)  # which cuts off long names
            ImageDraw.Draw(label).text((GAP, height / 2), name, (0,) * channels, font, anchor="lm")
            canvas.paste(label, (left, top))
        for column, i in enumerate(members):
            tile = images[i, ..., 0] if channels == 1 else images[i]
            x = left + margin + column * (width + GAP)
            corners[i] = [top, x + before * scale]
            canvas.paste(Image.fromarray(tile), (x, top))
    canvas.info["tiles"] = json.dumps({"scale": scale, "corners": corners})
    return canvas


def encode_png(picture: Image.Image) -> bytes:
    """A picture as a PNG; that of a grid has its `info["tiles"]`, too."""
    png, info = io.BytesIO(), PngInfo()
    if "tiles" in picture.info:
        info.add_text("tiles", picture.info["tiles"])
    picture.save(png, format="PNG", pnginfo=info)
    return png.getvalue()


def encode_gif(frames: Sequence[Image.Image]) -> bytes:
    """Pictures of one size as an animated GIF, which repeats."""
    gif, durations = io.BytesIO(), [100] * (len(frames) - 1) + [1500]  # milliseconds
    frames[0].save(gif, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return gif.getvalue()
