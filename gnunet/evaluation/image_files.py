"""A folder of images to measure, read file by file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gnunet.data.decode import decode_image, open_image
from gnunet.data.sources.base import visible_files
from gnunet.data.sources.folder import IMAGE_SUFFIXES
from gnunet.errors import DataError

GRID = "grid.png"
"""A file of this name is no image of the set: scripts/sample.py puts its overview beside the samples."""
GREY_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L")


class ImageFiles:
    """The images of a folder and those below it, in the order of their paths.

    Distances see every resampling, so nothing is resized unless `resolution` says so: the images must all be
    squares of one size, and all grey or all in colour. With `resolution` they may be anything, and are prepared as
    training images are (`decode_image`), in RGB.

    Args:
        folder: where they are.
        resolution: height and width to bring them to; None leaves them as they are.

    Attributes:
        files: their paths.
        resolution: height and width.
        channels: 1 where all are grey, 3 otherwise.

    Raises:
        DataError: no images, or one that is broken or unlike the others; names it.
    """

    def __init__(self, folder: Path, resolution: int | None = None):
        self.files = [f for f in visible_files(folder) if f.suffix.lower() in IMAGE_SUFFIXES and f.name != GRID]
        if not self.files:
            raise DataError(f"{folder} holds no image files ({' '.join(IMAGE_SUFFIXES)}; {GRID} is not counted)")
        if resolution is not None:
            self.resolution, self.channels = resolution, 3
            return
        first = self.files[0]
        (width, height), grey = _look(first)
        if width != height:
            raise DataError(f"{first} is {width} x {height}; valid are squares, or any images with --resolution")
        for file in self.files[1:]:
            size, grey_too = _look(file)
            if size != (width, height):
                raise DataError(
                    f"{file} is {size[0]} x {size[1]}, but {first} is {width} x {height}; valid are images of one "
                    "size, or any with --resolution"
                )
            if grey_too != grey:
                words = {True: "grey", False: "in colour"}
                raise DataError(
                    f"{file} is {words[grey_too]}, but {first} is {words[grey]}; valid are images of one kind, or any "
                    "with --resolution, which makes all RGB"
                )
        self.resolution, self.channels = width, 1 if grey else 3

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The images with these indices, uint8 (len(indices), resolution, resolution, channels).

        Raises DataError for a file that cannot be decoded.
        """
        return np.stack([self._decode(self.files[index]) for index in indices])

    def _decode(self, file: Path) -> np.ndarray:
        try:
            return decode_image(file, self.resolution, self.channels)
        except Exception as error:  # image decoders raise every kind for broken files
            raise DataError(f"{file} cannot be decoded: {error}") from error


def _look(file: Path) -> tuple[tuple[int, int], bool]:
    """An image's width and height, and whether it is grey, from the file's head."""
    try:
        with open_image(file) as image:
            return image.size, image.mode in GREY_MODES and "transparency" not in image.info
    except Exception as error:
        raise DataError(f"{file} cannot be decoded: {error}") from error
