"""Directories of images, of samples or to evaluate, file by file."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gnunet.data.decode import ArrayCell, decode_image, load_array, open_image, read_values, upright_size
from gnunet.data.sources import visible_files
from gnunet.data.sources.image_folder import IMAGE_SUFFIXES
from gnunet.errors import DataError, as_data_error
from gnunet.files import atomic_write
from gnunet.scaling import PICTURES, Scaling, as_size

GRID, STRIP, GIF = OVERVIEWS = "grid.png", "denoising.png", "denoising.gif"
"""What `gnunet sample` writes next to the samples; not counted as images."""
GREY_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L")


def image_files(folder: Path, scaling: Scaling) -> list[Path]:
    """All pictures below a folder but OVERVIEWS, and .npy files unless the scaling is that of pictures, by path."""
    suffixes = IMAGE_SUFFIXES if scaling.is_pictures else (*IMAGE_SUFFIXES, ".npy")
    return [file for file in visible_files(folder) if file.suffix.lower() in suffixes and file.name not in OVERVIEWS]


def write_sample(file: Path, values: np.ndarray, scaling: Scaling) -> None:
    """Write (H, W, C) in the format of the data: a PNG, a TIFF with a page for each channel, or a .npy file.

    It is whole or absent if the process dies, but not if the machine does.
    """
    content, planes = io.BytesIO(), np.moveaxis(values, -1, 0)
    if scaling.suffix == ".npy":
        np.save(content, planes if scaling.axes == "CHW" else values.reshape(values.shape[: len(scaling.axes)]))
    else:
        is_picture = values.dtype == np.uint8 and len(planes) in (3, 4)
        first, *others = map(Image.fromarray, [values] if is_picture else planes)
        kind = "PNG" if scaling.suffix == ".png" else "TIFF"
        first.save(content, format=kind, save_all=bool(others), append_images=others)
    atomic_write(file, content.getvalue(), fsync=False)


def read_sample(file: Path, scaling: Scaling, channels: int) -> np.ndarray:
    """The (H, W, C) that `write_sample` wrote. Raises OSError, SyntaxError or ValueError if the file is broken."""
    if scaling.suffix != ".npy":
        return read_values(file, channels)[0]
    array = load_array(ArrayCell(file))
    return np.moveaxis(array, 0, -1) if scaling.axes == "CHW" else array.reshape(*array.shape[:2], channels)


class ImageFiles:
    """The images in a directory and its subdirectories, ordered by path.

    Resampling changes distances, so by default nothing is resized: the images must all be of one size, and all grey
    or all in colour. With `resolution` they may be anything, and are prepared like training images (`decode_image`), in
    RGB. Samples that are arrays become pictures by their scaling. Raises DataError if there are no images, or one is
    broken or unlike the others.

    Attributes:
        files: their paths.
        size: height and width.
        channels: 1 if all are grey, else 3; those given for arrays.
    """

    def __init__(
        self, folder: Path, resolution: int | Sequence[int] | None = None, scaling: Scaling = PICTURES,
        channels: int = 3,
    ):  # fmt: skip
        self._scaling, self._resize = scaling, "none" if resolution is None else "crop"
        self.files = image_files(folder, scaling)
        if not self.files:
            raise DataError(f"{folder} holds no image files ({' '.join(IMAGE_SUFFIXES)}; {GRID} is not counted)")
        if not scaling.is_pictures:
            self.channels = channels
            self.size = self._decode(self.files[0]).shape[:2]
        elif resolution is not None:
            self.size, self.channels = as_size(resolution), 3
        else:
            self.size, self.channels = expected = _inspect_image(self.files[0])
            for file in self.files[1:]:
                if (found := _inspect_image(file)) != expected:
                    given = f"{file} is {_describe(*found)}, but {self.files[0]} is {_describe(*expected)}"
                    raise DataError(f"{given}; valid: images of one size, all grey or all in colour, or --resolution")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The images with these indices, uint8 (len(indices), H, W, channels)."""
        return np.stack([self._decode(self.files[index]) for index in indices])

    def _decode(self, file: Path) -> np.ndarray:
        with as_data_error(file):
            if not self._scaling.is_pictures:
                return self._scaling.to_pictures(read_sample(file, self._scaling, self.channels)[None])[0]
            return decode_image(file, self.size, self.channels, self._resize)


def _inspect_image(file: Path) -> tuple[tuple[int, int], int]:
    """An image's size and channels (1 or 3), from the file's header."""
    with as_data_error(file), open_image(file) as image:
        is_grey = image.mode in GREY_MODES and "transparency" not in image.info
        return upright_size(image), 1 if is_grey else 3


def _describe(size: tuple[int, int], channels: int) -> str:
    return f"{size[1]} x {size[0]} {'grey' if channels == 1 else 'in colour'}"
