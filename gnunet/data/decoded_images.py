"""The decoded data set: one array of images, one of labels."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from torch import Tensor

from gnunet.errors import DataError
from gnunet.scaling import PICTURES, Scaling

IMAGES_FILE = "images.bin"


@dataclass(frozen=True)
class Latents:
    """The latents of a table's images, as networks see them, mapped from the cache that `encode_images` writes."""

    folder: Path
    shape: tuple[int, ...]  # (n, 1 or 2 for mirrored images, h, w, channels or 2 * channels with deviations)
    channels: int
    std: float  # of all latents
    autoencoder: str  # its digest

    @cached_property
    def moments(self) -> np.ndarray:
        """float16, of this shape: latents, or their means and standard deviations."""
        return map_images(self.folder, self.shape, np.float16)[0]

    def draw(self, rows: np.ndarray, flip: np.ndarray | None, random: Iterable[Generator]) -> np.ndarray:
        """fp32 (b, h, w, channels): latents of these rows, mirrored where `flip` says, drawn by a generator each."""
        moments = self.moments[rows, 0 if flip is None else flip.astype(np.int64)].astype(np.float32)
        latents = np.ascontiguousarray(moments[..., : self.channels])
        if self.channels < self.shape[-1]:
            for each, std, generator in zip(latents, moments[..., self.channels :], random, strict=True):
                each += std * generator.standard_normal(std.shape, np.float32)
        return latents

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "moments"}


@dataclass(frozen=True)
class DecodedImages:
    """Decoded images of one size, usually mapped from the cache that `load_images` writes."""

    images: np.ndarray  # uint8 or, of arrays, float32 (n, H, W, C), read-only if mapped from disk
    labels: np.ndarray | None  # int64 (n,), 0..len(class_names)-1; None if the data has no labels
    class_names: tuple[str, ...]  # name of each label; empty if the data has none
    fingerprint: str  # sha256 over images, labels and class names: the same wherever the data is stored
    skipped: int = 0  # number of corrupted images that were left out (data.on_error: skip)
    broken: tuple[str, ...] = ()  # what is wrong with them, for the first ones
    folder: Path | None = None  # the cache that the images are mapped from; None if they are in memory
    unread: Mapping[str, int] = field(default_factory=dict)  # other files in the source's folder, by suffix
    scaling: Scaling = PICTURES  # between these values and the network's
    pairs: np.ndarray | None = None  # uint8 (n, H, W, channels), a partner for each image; None if there are none
    latents: Latents | None = None  # which networks see in place of the images (data.autoencoder)

    @classmethod
    def from_arrays(
        cls, images: np.ndarray, labels: np.ndarray | None = None, class_names: Sequence[str] = ()
    ) -> "DecodedImages":
        """Images in memory, uint8 (n, H, W, 1 or 3), with integer labels (n,), named "0", "1", ... by default.

        Raises:
            DataError: another shape or dtype, or a label out of range.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise DataError(f"images: {images.dtype} {images.shape} given; valid: uint8 (n, H, W, 1 or 3)")
        if labels is not None:
            labels = np.asarray(labels, np.int64)
            class_names = tuple(class_names) or tuple(str(i) for i in range(int(labels.max(initial=-1)) + 1))
            if labels.shape != images.shape[:1] or not ((labels >= 0) & (labels < len(class_names))).all():
                raise DataError(
                    f"labels: shape {labels.shape} given for {len(images)} images; valid: one of "
                    f"0..{len(class_names) - 1} for each image"
                )
        digest = hashlib.sha256(np.ascontiguousarray(images).data)
        fingerprint = content_fingerprint(digest, images.shape, labels, class_names)
        return cls(images, labels, tuple(class_names), fingerprint)

    def __len__(self) -> int:
        return len(self.images)

    def to_network(self, images: Tensor) -> Tensor:
        """What data sets give of this table, (b, C, H, W), as networks see it: fp32."""
        return images if self.latents is not None else self.scaling.to_network(images)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The images of these rows as pictures, which are shown and measured: uint8 (*rows.shape, H, W, 1 or 3)."""
        pictures = self.scaling.to_pictures(self.images[rows.ravel()])
        return pictures.reshape(*rows.shape, *pictures.shape[1:])

    def pairs_of(self, rows: np.ndarray) -> np.ndarray | None:
        """A copy of the partners of these rows' images."""
        return None if self.pairs is None else np.ascontiguousarray(self.pairs[rows])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __getstate__(self) -> dict[str, Any]:
        # Mapped images are pickled as their path, so that loader workers map them too.
        if self.folder is None:
            return self.__dict__
        added = 0 if self.pairs is None else self.pairs.shape[-1]
        shape = (*self.images.shape[:-1], self.images.shape[-1] + added)
        return self.__dict__ | {"images": (shape, self.images.dtype, added), "pairs": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if (folder := state["folder"]) is not None:
            state["images"], state["pairs"] = map_images(folder, *state["images"])
        self.__dict__.update(state)


def map_images(
    folder: Path, shape: tuple[int, ...], dtype: Any, pair_channels: int = 0
) -> tuple[np.ndarray, np.ndarray | None]:
    """Map a cache's images into memory, read-only, and their partners, which are its last channels; ValueError if the
    file does not have this shape and dtype."""
    file = folder / IMAGES_FILE
    if len(shape) < 4 or file.stat().st_size != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"{file} does not hold {dtype} images of shape {shape}")
    images = np.memmap(file, dtype, "r", shape=shape)
    return (images[..., :-pair_channels], images[..., -pair_channels:]) if pair_channels else (images, None)


def content_fingerprint(
    digest: "hashlib._Hash", shape: tuple[int, ...], labels: np.ndarray | None, class_names: Sequence[str]
) -> str:
    """Finish the sha256 of the images' bytes with their shape, the labels and the class names."""
    digest.update(repr((shape, tuple(class_names))).encode())
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, np.int64).data)
    return digest.hexdigest()
