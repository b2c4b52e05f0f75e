"""The decoded data set: one uint8 array of images, one of labels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gnunet.errors import DataError

IMAGES_FILE = "images.npy"


@dataclass(frozen=True)
class DecodedImages:
    """Decoded images of one size, usually mapped from the cache that `load_images` writes.

    A table that lies on disk travels to loader processes as its path, not as its pixels.
    """

    images: np.ndarray
    """uint8 (n, H, W, C), not writable where it is mapped from disk."""
    labels: np.ndarray | None
    """int64 (n,), 0..len(class_names)-1; None where the data has no labels."""
    class_names: tuple[str, ...]
    """Name of each label; empty where the data has none."""
    fingerprint: str
    """sha256 over images, labels and class names: equal for equal data wherever it lies."""
    skipped: int = 0
    """Broken images that were left out (data.on_error: skip)."""
    folder: Path | None = None
    """Folder of the cache the images are mapped from; None for a table in memory."""

    @classmethod
    def from_arrays(
        cls, images: np.ndarray, labels: np.ndarray | None = None, class_names: Sequence[str] = ()
    ) -> "DecodedImages":
        """A table in memory.

        Args:
            images: uint8 (n, H, W, C) with C 1 or 3.
            labels: integers (n,).
            class_names: names of the labels; "0", "1", ... where empty.

        Raises:
            DataError: a shape or type that a table cannot have.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise DataError(f"images are {images.dtype} {images.shape}; valid is uint8 (n, H, W, 1 or 3)")
        if labels is not None:
            labels = np.asarray(labels, np.int64)
            class_names = tuple(class_names) or tuple(str(i) for i in range(int(labels.max(initial=-1)) + 1))
            if labels.shape != images.shape[:1] or not ((labels >= 0) & (labels < len(class_names))).all():
                raise DataError(
                    f"labels of shape {labels.shape} for {len(images)} images; "
                    f"valid is one of 0..{len(class_names) - 1} for each image"
                )
        digest = hashlib.sha256(np.ascontiguousarray(images).data)
        fingerprint = content_fingerprint(digest, images, labels, class_names)
        return cls(images, labels, tuple(class_names), fingerprint)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where the data has no labels."""
        return len(self.class_names)

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        if self.folder is not None:
            del state["images"]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.folder is not None:
            self.__dict__["images"] = map_images(self.folder)


def map_images(folder: Path) -> np.ndarray:
    """Map a cache folder's images into memory, read-only; ValueError or OSError where they are not whole."""
    return map_array(folder / IMAGES_FILE)


def map_array(file: Path) -> np.ndarray:
    """Map a .npy file into memory, read-only; ValueError or OSError where it is not whole, or holds objects."""
    return np.load(file, mmap_mode="r", allow_pickle=False)


def content_fingerprint(
    digest: "hashlib._Hash", images: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str]
) -> str:
    """Finish the sha256 of the images' bytes with their shape, the labels and the class names."""
    digest.update(repr((images.shape, tuple(class_names))).encode())
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, np.int64).data)
    return digest.hexdigest()
