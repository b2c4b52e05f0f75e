"""Augmentation that does not leak into samples (Karras et al., 2022, EDM, appendix F.2): random transforms of which the
network is told, so that it samples images without them when it is told of none."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gnunet.random_streams import Stream

NUM_LABELS = 9
SCALE = ANISOTROPY = 2**0.2  # of one standard deviation, as a factor
TRANSLATION = 1 / 8  # of one standard deviation, as a share of height and width


def draw_transforms(
    stream: Stream, indices: Sequence[int], probability: float, size: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The transforms of examples of a height and width: mirroring in x or not, and five others with the probability.

    Returns:
        Their labels, float32 (b, 9), all 0 for an image as it is, and the affine maps from coordinates (x, y) in the
        transformed image to those in the image, float32 (b, 2, 3), each of which spans -1..1.
    """
    labels, maps = np.zeros((len(indices), NUM_LABELS)), np.zeros((len(indices), 3, 3))
    height, width = size
    for row, index in enumerate(indices):
        rng = stream.at(index)
        chosen = rng.random(6) < [1, *[probability] * 5]
        flips = rng.integers(2, size=2) * chosen[:2]
        angle, axis = rng.uniform(-np.pi, np.pi, 2) * chosen[3:5]
        scale, stretch, x, y = rng.standard_normal(4) * chosen[[2, 4, 5, 5]]
        labels[row] = [
            *flips, scale, np.cos(angle) - 1, np.sin(angle), stretch * np.cos(axis), stretch * np.sin(axis), x, y
        ]  # fmt: skip
        stretched = _rotation(axis) @ _scaling(ANISOTROPY**stretch, ANISOTROPY**-stretch) @ _rotation(-axis)
        linear = stretched @ _rotation(-angle) @ _scaling(SCALE**scale, SCALE**scale) @ _scaling(*(1 - 2 * flips))
        # Of squares of pixels; coordinates span height and width alike.
        linear = _scaling(1 / width, 1 / height) @ linear @ _scaling(width, height)
        linear[:2, 2] = 2 * TRANSLATION * x, 2 * TRANSLATION * y
        maps[row] = np.linalg.inv(linear)
    return labels.astype(np.float32), maps[:, :2].astype(np.float32)


def transform(images: Tensor, maps: Tensor) -> Tensor:
    """Transform images, fp32 (b, C, H, W), by the maps of `draw_transforms`: bicubic, reflected at the borders. Those
    whose map is the identity stay as they are."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    is_identity = (maps == torch.eye(2, 3, device=maps.device)).flatten(1).all(dim=1)
    return torch.where(is_identity[:, None, None, None], images, moved)


def _scaling(x: float, y: float) -> np.ndarray:
    return np.diag([x, y, 1.0])


def _rotation(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
