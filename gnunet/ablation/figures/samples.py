"""The same images of every variant, cut from the sample grids of the trials."""

import json
import math

import numpy as np
from PIL import Image

from gnunet.ablation.analysis.results import Condition, Results
from gnunet.ablation.figures.style import DPI, HATCHES, WIDTH, Picture, hatch, new_figure, render
from gnunet.diffusion.images import GAP, GAP_COLOUR
from gnunet.scaling import as_size

_MAX_TILES, _MAX_HEIGHT = 10, 72  # images of a variant, and pixels of each in height


def draw(results: Results) -> Picture | None:
    """A row of images for each condition, of the seed with the most grids; None where there are no grids."""
    by_seed = {seed: [_tiles(results, c, seed) for c in results.main_conditions] for seed in results.study.seeds}
    seed = max(by_seed, key=lambda seed: sum(tiles is not None for tiles in by_seed[seed]))
    found = [tiles for tiles in by_seed[seed] if tiles is not None]
    if not found:
        return None
    height, width = (max(tiles.shape[axis] for tiles in found) + GAP for axis in (1, 2))
    scale = max(1, _MAX_HEIGHT // height)  # an integer, so that pixels stay square
    labels = [results.label(condition) for condition in results.main_conditions]
    room = 0.1 + 0.065 * max(map(len, labels))  # inches, of the labels
    count = min(*(len(tiles) for tiles in found), max(1, int((WIDTH - room) * DPI) // (scale * width)))
    rows = len(results.main_conditions)
    canvas = np.full((rows * height - GAP, count * width - GAP, 3), GAP_COLOUR, np.uint8)
    for y, tiles in enumerate(by_seed[seed]):
        for x, tile in enumerate([] if tiles is None else tiles[:count]):
            canvas[y * height :, x * width :][: tile.shape[0], : tile.shape[1]] = tile
    tall, wide = (scale * side / DPI for side in canvas.shape[:2])  # inches
    figure = new_figure(tall, room + wide, layout="none")
    panel = figure.add_axes((room / (room + wide), 0.0, wide / (room + wide), 1.0))
    panel.set_aspect("equal")
    panel.spines[:].set_visible(False)
    panel.imshow(canvas, interpolation="nearest", extent=(0, canvas.shape[1], rows * height - GAP, 0))
    for y, (condition, tiles) in enumerate(zip(results.main_conditions, by_seed[seed], strict=True)):
        if tiles is None:
            diverged = results.state(condition, seed) == "diverged"
            hatch(panel, y * height + (height - GAP) / 2, diverged=diverged, height=height - GAP)
    panel.grid(visible=False)
    panel.set_xticks([])
    panel.set_yticks(np.arange(rows) * height + (height - GAP) / 2, labels)
    panel.tick_params(axis="y", length=0)
    caption = (
        f"Images 0 to {count - 1} of the final EMA weights at seed {seed}: the images of a column start from the same "
        f"noise and have the same label. {HATCHES}"
    )
    return render(figure, "samples", "Samples", caption, pixels=True)


def _tiles(results: Results, condition: Condition, seed: int) -> np.ndarray | None:
    """The first images of a trial's grid as `make_grid` lays them out, uint8 (n, H, W, 3); None without a grid."""
    record = results.record(condition, seed)
    path = results.folder / "samples" / f"{results.name(condition, seed)}.png"
    if record is None or not path.exists():
        return None
    image = Image.open(path)
    grid = np.asarray(image.convert("RGB"))
    count = record["config"]["sampling"]["num_images"]
    height, width = as_size(record["config"]["data"]["resolution"])
    if "tiles" in image.info:
        scale, corners = json.loads(image.info["tiles"]).values()
    else:  # of studies before the tiles' places were recorded
        scale, columns = 1, math.ceil(math.sqrt(count))
        corners = [(i // columns * (height + GAP), i % columns * (width + GAP)) for i in range(count)]
        if grid.shape[:2] != (corners[-1][0] + height, columns * (width + GAP) - GAP):
            return None
    return np.stack(
        [grid[top:, left:][: scale * height : scale, : scale * width : scale] for top, left in corners[:_MAX_TILES]]
    )
