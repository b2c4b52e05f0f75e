"""Decoding two images that belong together."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from gnunet.data import decode


class Pair(NamedTuple):
    """An image and its partner, in any form that `decode_image` takes."""

    image: Any
    other: Any
    channels: int
    """Of the partner."""
    num_classes: int | None
    """Of a partner that is a map of classes; None for a picture."""


def decode_pair(cell: Any, *settings: Any, **limit: Any) -> Any:
    """`decode_image`; of a `Pair` the two images, uint8 (H, W, channels of both).

    Raises:
        Exception: as `decode_image`, also if height and width of the two are not in the same ratio.
    """
    if not isinstance(cell, Pair):
        return decode.decode_image(cell, *settings, **limit)
    sizes = []
    for each in (cell.image, cell.other):
        with decode.open_image(each) as image:
            sizes.append(decode.upright_size(image))
    (height, width), (high, wide) = sizes
    if height * wide != width * high:
        raise ValueError(f"{width} x {height} pixels, but its partner has {wide} x {high}; valid: equal shapes")
    resolution, _, resize = settings[:3]
    if cell.num_classes is None:
        other = decode.decode_image(cell.other, resolution, cell.channels, resize, **limit)
    else:
        other = decode_classes(cell.other, resolution, cell.num_classes, resize, **limit)
    return np.concatenate([decode.decode_image(cell.image, *settings, **limit), other], axis=-1)


def decode_classes(
    cell: Any, resolution: int | Sequence[int], num_classes: int, resize: str, max_pixels: int = decode.MAX_PIXELS
) -> np.ndarray:
    """Decode a map of classes, grey values or indices of a palette, to uint8 (H, W, 1), as `decode_image`, but resized
    by the nearest pixel and padded with class 0."""
    with decode.open_image(cell) as image:
        decode.check_limits(image, max_pixels)
        if image.mode not in ("1", "L", "P"):
            raise ValueError(f"{image.mode} image; valid for a map of classes: 8 bits, grey or with a palette")
        indices = Image.fromarray(np.asarray(ImageOps.exif_transpose(image)).astype(np.uint8))
        resized = decode.RESIZE[resize](indices, *decode.as_size(resolution), Image.Resampling.NEAREST)
    classes = np.asarray(resized)[..., None]
    if classes.max() >= num_classes:
        raise ValueError(f"class {classes.max()}; valid: 0 to num_classes - 1, which is {num_classes - 1}")
    return classes
