"""Decoded images of arrays in memory."""

import hashlib
from collections.abc import Sequence

import numpy as np

from gnunet.data import DecodedImages
from gnunet.data.decoded_images import content_fingerprint


def make_table(images: np.ndarray, labels: np.ndarray | None = None, class_names: Sequence[str] = ()) -> DecodedImages:
    """Images, uint8 (n, H, W, 1 or 3), with integer labels (n,), named "0", "1", ... by default."""
    if labels is not None:
        class_names = tuple(class_names) or tuple(map(str, range(labels.max() + 1)))
    fingerprint = content_fingerprint(hashlib.sha256(images.tobytes()), images.shape, labels, class_names)
    return DecodedImages(images, images.shape[-1], labels, tuple(class_names), fingerprint)
