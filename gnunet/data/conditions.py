"""What a network is conditioned on besides classes: images that are concatenated to its input."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from PIL import Image, ImageDraw
from torch import Tensor

from gnunet.data.decoded_images import DecodedImages
from gnunet.data.example_rng import row_order
from gnunet.random_streams import Stream, StreamKey

LUMA = np.array([19595, 38470, 7471], np.uint32)  # ITU-R 601-2 luma in units of 2**-16, as Pillow converts to grey


@dataclass(frozen=True)
class Condition:
    """How a condition is made of an image. It is stored and loaded in the values of the images (uint8 for pictures).

    low_resolution: each block of factor x factor pixels averaged, as by Pillow's `reduce`, (H / factor, W / factor, C).
        The network sees it enlarged to H x W by bicubic interpolation.
    mask: the image and 255 where it is known, 0 elsewhere, (H, W, C + 1). The network sees the image, 0 (in its values)
        where it is not known, and a mask of 1 and 0.
    grey: the luma, (H, W, 1).
    paired: the partner, (H, W, channels), or the classes in it, (H, W, 1), of which the network sees a channel each.
    """

    kind: str
    channels: int  # of the network's input
    can_drop: bool = False  # training replaces some conditions by 0, in the network's values, as guidance needs
    factor: int = 1
    num_classes: int | None = None

    def store(
        self, images: np.ndarray, random: Iterable[Generator] = (), partners: np.ndarray | None = None
    ) -> np.ndarray:
        """The conditions of images (n, H, W, C) and their partners; `random` has a generator for each mask."""
        if partners is not None:
            return partners
        n, height, width, channels = images.shape
        if self.kind == "mask":
            known = np.stack([255 * ~draw_mask(each, height, width) for each in random]).astype(images.dtype)
            return np.concatenate([images, known[..., None]], axis=-1)
        if self.kind == "grey":
            return (images[..., :3] @ LUMA + 2**15 >> 16).astype(np.uint8)[..., None]
        blocks = images.reshape(n, height // self.factor, self.factor, width // self.factor, self.factor, channels)
        means = blocks.mean(axis=(2, 4), dtype=np.float64)
        return (np.floor(means + 0.5) if images.dtype == np.uint8 else means).astype(images.dtype)

    def to_network(self, stored: Tensor, size: Sequence[int], to_network: Callable[[Tensor], Tensor]) -> Tensor:
        """Stored conditions (n, c, h, w) as fp32 (n, channels, *size); `to_network` converts the values of images."""
        if self.kind == "mask":
            known = (stored[:, -1:] > 0).float()
            return torch.cat([to_network(stored[:, :-1]) * known, known], dim=1)
        if self.num_classes is not None:
            return F.one_hot(stored[:, 0].long(), self.num_classes).permute(0, 3, 1, 2).float()
        x = to_network(stored)
        return x if x.shape[2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bicubic")

    def shown(self, seen: Tensor) -> Tensor:
        """What grids show of the network's input (n, channels, H, W): no mask, and classes from black to white."""
        if self.num_classes is not None:
            return seen.argmax(dim=1, keepdim=True) * 2 / (self.num_classes - 1) - 1
        return seen[:, :-1] if self.kind == "mask" else seen


def draw_mask(random: Generator, height: int, width: int) -> np.ndarray:
    """What an inpainting network has to fill, bool (height, width): 1 to 4 rectangles or free strokes."""
    picture, size = Image.new("1", (width, height)), np.array([width, height])
    draw, has_strokes = ImageDraw.Draw(picture), random.random() < 0.5
    for _ in range(random.integers(1, 5)):
        if has_strokes:
            steps = random.normal(0, 0.25, (random.integers(2, 7), 2))
            points = np.cumsum([random.random(2), *steps], axis=0) * size
            stroke = max(1, round(min(height, width) * random.uniform(0.08, 0.25)))
            draw.line([*map(tuple, points.tolist())], 1, stroke, joint="curve")
        else:
            extent = size * random.uniform(0.2, 0.6, 2)
            corner = random.random(2) * (size - extent)
            draw.rectangle([*corner.tolist(), *(corner + extent).tolist()], 1)
    return np.asarray(picture)


@dataclass(frozen=True)
class SampleConditions:
    """The conditions that a model samples from: image i takes entry i, in turn."""

    condition: Condition
    count: int
    store: Callable[[np.ndarray], np.ndarray]  # entries (n,) -> their stored conditions (n, h, w, c)
    fingerprint: str
    images: Callable[[np.ndarray], np.ndarray] | None = None  # entries (n,) -> their images (n, H, W, C), if known
    labels: np.ndarray | None = None  # int64 (count,), the classes of these images, if they have any

    @classmethod
    def of_rows(
        cls, condition: Condition, table: DecodedImages, rows: np.ndarray, labels: np.ndarray | None
    ) -> "SampleConditions":
        """The conditions of a table's rows, in an order that mixes them and is always the same."""
        rows = rows[row_order(0, 0, len(rows))]
        masks = Stream(0, StreamKey.FIXED_MASK)

        def store(entries: np.ndarray) -> np.ndarray:
            random = (masks.at(int(entry)) for entry in entries)
            originals, partners = table.examples(rows[entries])
            return condition.store(originals, random, partners)

        digest = hashlib.sha256(table.fingerprint.encode() + rows.tobytes()).hexdigest()
        images = lambda entries: table.examples(rows[entries])[0]  # noqa: E731
        return cls(condition, len(rows), store, digest, images, None if labels is None else labels[rows])

    @classmethod
    def of_arrays(cls, condition: Condition, stored: np.ndarray) -> "SampleConditions":
        """Stored conditions (n, h, w, c)."""
        digest = hashlib.sha256(repr(stored.shape).encode() + np.ascontiguousarray(stored).data)
        return cls(condition, len(stored), stored.__getitem__, digest.hexdigest())

    def entries(self, indices: Sequence[int]) -> np.ndarray:
        """The entries of images, int64 (n,)."""
        return np.asarray(indices, np.int64) % self.count

    def network_input(self, indices: Sequence[int], *settings: Any) -> Tensor:
        """What the network sees for these images, fp32 (n, channels, H, W); settings as of `Condition.to_network`."""
        stored = torch.from_numpy(self.store(self.entries(indices))).permute(0, 3, 1, 2)
        return self.condition.to_network(stored, *settings)
