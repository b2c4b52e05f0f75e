"""Between uint8 pictures and the networks' fp32 images in [-1, 1], and grids of pictures."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GAP = 2  # pixels between the tiles of a grid
GAP_COLOUR = 208  # a light grey, that shows on white and on black pictures


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 of any shape -> fp32 in [-1, 1], the same shape, device and memory format."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """fp32 (N, C, H, W) nominally in [-1, 1] -> uint8 (N, H, W, C) on the host.

    Values are rounded to the nearest level and clamped; NaN becomes mid-grey. Undoes `to_unit_range` exactly.
    """
    levels = ((images.float().nan_to_num(nan=0.0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def make_grid(images: np.ndarray, columns: int | None = None) -> Image.Image:
    """Lay pictures out row by row, with a gap between them.

    Args:
        images: uint8 (N, H, W, C), N at least 1, C 1 (grey) or 3 (RGB).
        columns: pictures in a row; None makes the grid as square as it gets.
    """
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas_size = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    canvas = np.full(canvas_size, GAP_COLOUR, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
