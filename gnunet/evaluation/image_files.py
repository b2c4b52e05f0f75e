"""A directory of images to evaluate, read file by file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gnunet.data.decode import as_size, decode_image, open_image, upright_size
from gnunet.data.sources import visible_files
from gnunet.data.sources.image_folder import IMAGE_SUFFIXES
from gnunet.errors import DataError

GRID = "grid.png"
"""The overview that `gnunet sample` writes next to the samples; not counted as an image."""
GREY_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L")


def image_files(folder: Path) -> list[Path]:
    """All pictures below a folder, sorted by path."""
    return [file for file in visible_files(folder) if file.suffix.lower() in IMAGE_SUFFIXES]


class ImageFiles:
    """The images in a directory and its subdirectories, ordered by path.

    Resampling changes distances, so by default nothing is resized: the images must all be of one size, and all grey
    or all in colour. With `resolution` they may be anything, and are prepared like training images (`decode_image`), in
    RGB. Raises DataError if there are no images, or one is broken or unlike the others.

    Attributes:
        files: their paths.
        size: height and width.
        channels: 1 if all are grey, else 3.
    """

    def __init__(self, folder: Path, resolution: int | Sequence[int] | None = None):
        self.files = [file for file in image_files(folder) if file.name != GRID]
        if not self.files:
            raise DataError(f"{folder} holds no image files ({' '.join(IMAGE_SUFFIXES)}; {GRID} is not counted)")
        if resolution is not None:
            self.size, self.channels, self._resize = as_size(resolution), 3, "crop"
            return
        expected = _inspect_image(self.files[0])
        self.size, self.channels, self._resize = expected[:2], expected[2], "none"
        for file in self.files[1:]:
            if (found := _inspect_image(file)) != expected:
                raise DataError(
                    f"{file} is {_describe(*found)}, but {self.files[0]} is {_describe(*expected)}; valid: images of "
                    "one size, all grey or all in colour, or any images with --resolution"
                )

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The images with these indices, uint8 (len(indices), H, W, channels)."""
        return np.stack([self._decode(self.files[index]) for index in indices])

    def _decode(self, file: Path) -> np.ndarray:
        try:
            return decode_image(file, self.size, self.channels, self._resize)
        except Exception as error:  # image decoders raise many kinds of exceptions for broken files
            raise DataError(f"{file} cannot be decoded: {error}") from error


def _inspect_image(file: Path) -> tuple[int, int, int]:
    """An image's height, width and channels (1 or 3), from the file's header."""
    try:
        with open_image(file) as image:
            is_grey = image.mode in GREY_MODES and "transparency" not in image.info
            return *upright_size(image), 1 if is_grey else 3
    except Exception as error:
        raise DataError(f"{file} cannot be decoded: {error}") from error


def _describe(height: int, width: int, channels: int) -> str:
    return f"{width} x {height} {'grey' if channels == 1 else 'in colour'}"
