"""The decoded data set: one array of images, one of labels."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from torch import Tensor

from gnunet.data.float_labels import FloatLabels
from gnunet.scaling import PICTURES, Scaling

IMAGES_FILE = "images.bin"


class MappedArray(np.memmap):
    """A read-only array in a file, pickled as its path, so that loader workers map it too."""

    def __reduce__(self) -> Any:
        is_whole = self.base is not None and self.base is self._mmap
        return (MappedArray, (self.filename, self.dtype, "r", 0, self.shape)) if is_whole else super().__reduce__()


def map_array(file: Path, dtype: Any, shape: tuple[int, ...]) -> MappedArray:
    """Map an array into memory; ValueError if the file has another size, or the array less than four dimensions."""
    if len(shape) < 4 or file.stat().st_size != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"{file} does not hold {dtype} of shape {shape}")
    return MappedArray(file, dtype, "r", shape=shape)


@dataclass(frozen=True)
class Latents:
    """The latents of a table's images, as networks see them."""

    moments: np.ndarray  # float16 (n, 1 or 2 for mirrored images, h, w, channels, or means and standard deviations)
    channels: int
    std: float  # of all latents
    autoencoder: str  # its digest

    def draw(self, rows: np.ndarray, flip: np.ndarray | None, random: Iterable[Generator]) -> np.ndarray:
        """fp32 (b, h, w, channels): latents of these rows, mirrored where `flip` says, drawn by a generator each."""
        moments = self.moments[rows, 0 if flip is None else flip.astype(np.int64)].astype(np.float32)
        latents = np.ascontiguousarray(moments[..., : self.channels])
        if self.channels < moments.shape[-1]:
            for each, std, generator in zip(latents, moments[..., self.channels :], random, strict=True):
                each += std * generator.standard_normal(std.shape, np.float32)
        return latents


@dataclass(frozen=True)
class DecodedImages:
    """Decoded images of one size, usually mapped from the cache that `load_images` writes."""

    stored: np.ndarray  # uint8 or, of arrays, float32 (n, H, W, channels and, with partners, theirs)
    channels: int  # of images
    labels: np.ndarray | None  # int64 (n,), 0..len(class_names)-1, or float64 (n,) or (n, D); None without labels
    class_names: tuple[str, ...]  # name of each label; empty if the data has none
    fingerprint: str  # sha256 over images, labels and class names: the same wherever the data is stored
    skipped: int = 0  # number of corrupted images that were left out (data.on_error: skip)
    broken: tuple[str, ...] = ()  # what is wrong with them, for the first ones
    unread: Mapping[str, int] = field(default_factory=dict)  # other files in the source's folder, by suffix
    scaling: Scaling = PICTURES  # between these values and the network's
    latents: Latents | None = None  # which networks see in place of the images (data.autoencoder)
    float_labels: FloatLabels | None = None  # how networks take labels that are no classes

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def images(self) -> np.ndarray:
        """uint8 or, of arrays, float32 (n, H, W, C)."""
        return self.stored[..., : self.channels]

    def to_network(self, images: Tensor) -> Tensor:
        """What data sets give of this table, (b, C, H, W), as networks see it: fp32."""
        return images if self.latents is not None else self.scaling.to_network(images)

    def pictures(self, rows: np.ndarray) -> np.ndarray:
        """The images of these rows as pictures, which are shown and measured: uint8 (*rows.shape, H, W, 1 or 3)."""
        pictures = self.scaling.to_pictures(self.images[rows.ravel()])
        return pictures.reshape(*rows.shape, *pictures.shape[1:])

    def examples(
        self, rows: np.ndarray, random: Iterable[Generator] = (), flip: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
        """Copies of these rows' images, or latents drawn by a generator each, and of their partners, if they have any;
        mirrored where `flip` says."""
        if self.latents is not None:
            return self.latents.draw(rows, flip, random), None
        stored = self.stored[rows]
        if flip is not None:
            stored[flip] = stored[flip, :, ::-1]
        images, partners = np.split(stored, [self.channels], axis=-1)
        return np.ascontiguousarray(images), np.ascontiguousarray(partners) if partners.size else None

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """A copy of the labels of these rows, for the network: int64 classes or float32."""
        return self.labels[rows] if self.float_labels is None else self.float_labels.to_network(self.labels[rows])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def content_fingerprint(
    digest: "hashlib._Hash", shape: tuple[int, ...], labels: np.ndarray | None, class_names: Sequence[str]
) -> str:
    """Finish the sha256 of the images' bytes with their shape, the labels and the class names."""
    digest.update(repr((shape, tuple(class_names))).encode())
    if labels is not None:
        digest.update(np.ascontiguousarray(labels).data)
    return digest.hexdigest()
