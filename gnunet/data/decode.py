"""Decoding: whatever a data set stores as an image to uint8 pixels, or an array to float32 values, of one size."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, ImageSequence

from gnunet.scaling import as_size

VERSION = 1  # increased whenever the same file would decode to other pixels, so that no older cache is used
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "PPM")
"""The formats that are read, whatever a file's name says. Of Pillow's others some are rare and little tested against
malicious files, one holds images of other sizes than it declares (ICO), one takes gigabytes for a file of 150 bytes
(JPEG 2000), and one is run as a program (EPS)."""
MAX_PIXELS = 89_478_485
"""Largest image, which takes up to 2 GiB to decode. Pillow only warns at this size and fails at twice this size."""
MAX_SIDE = 2**16 - 1
"""Largest width and height, as in JPEG and GIF: Pillow keeps a pointer for each row, and reads whole rows."""
MAX_PYTHON_PIXELS = 2**22
"""Largest image of the kinds that Pillow decodes in Python, a second for a million pixels: plain PPM, BMP with RLE."""
MAX_SCANNED_PIXELS = 2**31
"""Pixels times scans of a JPEG: each scan of a progressive file goes over all of them, even if it holds nothing."""
MAX_FILE_BYTES = 2**30  # largest file, more than the largest image takes without compression

LANCZOS = Image.Resampling.LANCZOS
Image.init()
_OR_ARRAYS = "or any numbers with data.normalization range or mean_std"
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_formats = [name for name in FORMATS if name in Image.OPEN]  # older Pillows have no AVIF
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
_JPEG_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # not one within the data of a scan


class LargeImage(Exception):
    """An image has more pixels than the caller wants decoded."""


def decode_image(
    cell: Any, resolution: int | Sequence[int], channels: int, resize: str = "crop", max_pixels: int = MAX_PIXELS,
    num_classes: int | None = None, padding: str = "white",
) -> np.ndarray:  # fmt: skip
    """Decode, flatten and resize one image to uint8 (H, W, channels).

    An EXIF orientation is applied, transparency is flattened on white unless channels is 4, 16 bits are scaled to 8.
    Images are resized by Lanczos' antialiased filter (as in EDM's dataset_tool), unless they have that size already.
    Colour is converted to grey by ITU-R 601-2 luma.

    Args:
        cell: a file's path or bytes, `datasets`' {"bytes", "path"}, a PIL image, or 8-bit pixels (arrays or
            nested lists of (H, W), (H, W, C) or (C, H, W), C 1, 3 or 4).
        resolution, resize: as the keys of `data`.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        max_pixels: raise LargeImage for a valid image with more.
        num_classes: decode a map of classes, grey values or indices of a palette, to (H, W, 1); it is resized by the
            nearest pixel and padded with class 0.
        padding: the colour that pictures are padded with.

    Raises:
        Exception: of any kind, as image decoders raise them, if the image is corrupted, of an unsupported format or,
            with resize "none", size, or beyond the limits of this file.
    """
    size = as_size(resolution)
    with open_image(cell) as image:
        check_limits(image, max_pixels)
        if num_classes is None:
            pixels = RESIZE[resize](_convert(image, channels), *size, LANCZOS, padding)
            return np.asarray(pixels).reshape(*size, channels)
        if image.mode not in ("1", "L", "P"):
            raise ValueError(f"{image.mode} image; valid for a map of classes: 8 bits, grey or with a palette")
        indices = Image.fromarray(np.asarray(ImageOps.exif_transpose(image)).astype(np.uint8))
        classes = np.asarray(RESIZE[resize](indices, *size, Image.Resampling.NEAREST, 0))[..., None]
    if classes.max() >= num_classes:
        raise ValueError(f"class {classes.max()}; valid: 0 to num_classes - 1, which is {num_classes - 1}")
    return classes


def decode_array(
    cell: Any, resolution: int | Sequence[int], channels: int, resize: str = "crop", max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, tuple[str, str, str]]:
    """`decode_image` of numbers: float32 (H, W, channels), each channel resized by itself, and what `read_values` says
    of the file. Values must be finite."""
    size = as_size(resolution)
    values, file_format = read_values(cell, channels, max_pixels)
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
        if np.isfinite(values).all():
            planes = (Image.fromarray(plane) for plane in np.moveaxis(values, -1, 0))
            values = np.stack([np.asarray(RESIZE[resize](plane, *size, LANCZOS, None)) for plane in planes], axis=-1)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are NaN, infinite or too large for float32")
    return values, file_format


def decode_cells(
    cells: Sequence[Any], size: int | Sequence[int], channels: int, resize: str = "crop", normalization: str = "pixels",
    partner: Sequence[Any] | None = None, **limit: Any,
) -> tuple[np.ndarray, tuple[str, str, str] | None]:  # fmt: skip
    """`decode_array` of a row's cell, or, with normalization pixels, `decode_image` and None. With the (channels,
    num_classes) of a partner, of two cells: uint8 (H, W, channels of both); they must have equal shapes."""
    if partner is not None:
        (height, width), (high, wide) = map(read_size, cells)
        if height * wide != width * high:
            raise ValueError(f"{width} x {height} pixels, but its partner has {wide} x {high}; valid: equal shapes")
        image = decode_image(cells[0], size, channels, resize, **limit)
        other = decode_image(cells[1], size, partner[0], resize, num_classes=partner[1], **limit)
        return np.concatenate([image, other], axis=-1), None
    if normalization == "pixels":
        return decode_image(cells[0], size, channels, resize, **limit), None
    return decode_array(cells[0], size, channels, resize, **limit)


class ArrayCell(NamedTuple):
    """A .npy file or its content, or the array of a .npz file that has this name, or no other beside it."""

    path: Path | bytes
    name: str | None = None


def read_values(cell: Any, channels: int, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, tuple[str, str, str]]:
    """An array, image or .npy file as numbers (H, W, channels), and the suffix, file_dtype and axes of a `Scaling`.

    Images keep 16 bits and floats; the pages of a TIFF are channels. LargeImage and ValueError as in `decode_image`; an
    array's channels must be on either its first or its last axis.
    """
    suffix = ".npy"
    if isinstance(cell, Path) and cell.suffix.lower() == suffix:
        cell = ArrayCell(cell)
    if isinstance(cell, ArrayCell):
        array = load_array(cell)
    elif isinstance(cell, (list, tuple, np.ndarray)):
        array = np.asarray(cell)
        array = np.float32(array) if isinstance(cell, (list, tuple)) and array.dtype == np.float64 else array
    else:
        with open_image(cell) as image:
            suffix = ".tif" if image.format == "TIFF" else ".png"
            array = _read_image(image, channels, max_pixels)
    if array.dtype.kind not in "biuf" or array.itemsize > 8 or array.ndim not in (2, 3) or array.size == 0:
        valid = "numbers of up to 64 bits, (H, W), (H, W, C) or (C, H, W)"
        raise ValueError(f"{array.dtype} {array.shape}; valid: {valid}")
    shape = (*array.shape, 1)[:3]
    is_first, is_last = array.ndim == 3 and shape[0] == channels, shape[-1] == channels
    if is_first == is_last:
        given = "both its first and its last axis have" if is_first else "neither its first nor its last axis has"
        raise ValueError(f"shape {array.shape}: {given} the {channels} channels of model.in_channels")
    values = np.moveaxis(array, 0, -1) if is_first else array.reshape(shape)
    if (size := values[..., 0].size) > MAX_PIXELS:
        raise ValueError(f"{values.shape[1]} x {values.shape[0]} values exceed the limit of {MAX_PIXELS}")
    if size > max_pixels:
        raise LargeImage
    dtype = np.uint8 if array.dtype == bool else array.dtype
    return values, (suffix, np.dtype(dtype).name, "CHW" if is_first else "HWC"[: array.ndim])


def _read_image(image: Image.Image, channels: int, max_pixels: int) -> np.ndarray:
    """An opened image as numbers (H, W, C)."""
    check_limits(image, max_pixels)
    pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    if pages > 1 or image.mode[0] in "IF":
        if pages != channels:
            raise ValueError(f"{pages} pages of one channel; model.in_channels is {channels}")
        planes = []
        for page in ImageSequence.Iterator(image):
            check_limits(page, max_pixels)
            planes.append(np.asarray(ImageOps.exif_transpose(page)))
        array = np.stack(planes, axis=-1)
        return array.astype(np.uint16) if image.mode == "I" and image.format != "TIFF" else array
    if ";16" in str(getattr(image, "tile", "")):  # which Pillow would read as 8
        raise ValueError("16 bits in several channels; valid: .npy, or a TIFF with a page for each channel")
    if channels not in _MODES:
        raise ValueError(f"{len(image.getbands())} channels; model.in_channels is {channels}")
    array = np.asarray(_convert(image, channels))
    return array.reshape(*array.shape[:2], channels)


def load_array(cell: ArrayCell) -> np.ndarray:
    """The array of a cell, unpickled, of at most MAX_FILE_BYTES; raises exceptions of any kind."""
    content = io.BytesIO(cell.path) if isinstance(cell.path, bytes) else None
    array = np.load(content or cell.path, mmap_mode=None if content else "r", allow_pickle=False)
    if isinstance(array, np.lib.npyio.NpzFile):
        with array:
            name = array.files[0] if cell.name is None and len(array.files) == 1 else cell.name
            if name not in array.files:
                raise ValueError(f"arrays {', '.join(array.files[:20])}; valid: one, or its name as data.image_column")
            if (size := array.zip.getinfo(f"{name}.npy").file_size) > MAX_FILE_BYTES:
                raise ValueError(f"{size} bytes exceed the limit of {MAX_FILE_BYTES} bytes")
            array = array[name]
    if array.nbytes > MAX_FILE_BYTES:
        raise ValueError(f"{array.nbytes} bytes exceed the limit of {MAX_FILE_BYTES} bytes")
    return array


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """An opened image, upright, as grey, RGB or RGBA of 8 bits."""
    image = ImageOps.exif_transpose(image)
    keep = channels == 4 and image.mode[0] not in "IF"
    return (image if keep else flatten(image)).convert(_MODES[channels])


def upright_size(image: Image.Image) -> tuple[int, int]:
    """The height and width of an opened image once its EXIF orientation is applied."""
    exif = Image.Image.getexif(image)  # PNG's own reads all pixels
    turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size if turned else image.size[::-1]


def read_size(cell: Any) -> tuple[int, int]:
    """The `upright_size` of an image that is not opened."""
    with open_image(cell) as image:
        return upright_size(image)


def check_limits(image: Image.Image, max_pixels: int) -> None:
    """Raise ValueError for what an opened file's header says would take very long or very much memory to decode, and
    LargeImage for more than max_pixels."""
    # A TIFF's tiles may be larger than the image, and are decoded entirely.
    tile = [int(getattr(image, "tag_v2", {}).get(tag, 1)) for tag in (_TILE_WIDTH, _TILE_LENGTH)]
    in_python = any(decoder[0] in Image.DECODERS for decoder in getattr(image, "tile", ()))
    limit = MAX_PYTHON_PIXELS if in_python else MAX_PIXELS
    for width, height in (image.size, tile):
        if width * height > limit:
            kind = f" for {image.format} of this kind" if in_python else ""
            raise ValueError(f"{width} x {height} pixels exceed the limit of {limit} pixels{kind}")
        if max(width, height) > MAX_SIDE and isinstance(image, ImageFile.ImageFile):
            raise ValueError(f"{width} x {height} pixels exceed the limit of {MAX_SIDE} pixels a side")
    if image.format in ("JPEG", "MPO"):
        image.fp.seek(0)
        jpeg, allowed = image.fp.read(), MAX_SCANNED_PIXELS // (image.width * image.height)
        # Few files have so many of these two bytes; to look at every marker would take a tenth of the decoding.
        if jpeg.count(b"\xff\xda") > allowed and (scans := _count_scans(jpeg)) > allowed:
            raise ValueError(f"{scans} scans of {image.width} x {image.height} pixels exceed the limit")
    if image.width * image.height > max_pixels:
        raise LargeImage


def _count_scans(jpeg: bytes) -> int:
    """The scans of a JPEG's first image: those of thumbnails, and what follows its end, do not count."""
    scans, position = 0, 2
    while (marker := _JPEG_MARKER.search(jpeg, position)) and marker[1] != b"\xd9":
        position = marker.end()
        scans += marker[1] == b"\xda"
        if marker[1] not in b"\x01\xd8":  # the others begin with their length
            position += int.from_bytes(jpeg[position : position + 2], "big")
    return scans


def open_image(cell: Any) -> Image.Image:
    """Open an image without reading its pixels yet; ValueError or OSError if it is not an image."""
    if isinstance(cell, Image.Image):
        return cell.copy()
    if isinstance(cell, Exception):  # by which a source says that it has no image
        raise cell
    if isinstance(cell, ArrayCell):
        cell = load_array(cell)
    if isinstance(cell, dict) and {"bytes", "path"} & set(cell):
        cell = cell["path"] if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(cell), formats=_formats)
    if isinstance(cell, (str, os.PathLike)):
        if not os.path.isfile(cell):  # opening a pipe would wait indefinitely
            raise FileNotFoundError(f"{cell} is not a file")
        if (size := os.path.getsize(cell)) > MAX_FILE_BYTES:
            raise ValueError(f"{size} bytes exceed the limit of {MAX_FILE_BYTES} bytes")
        return Image.open(cell, formats=_formats)
    if isinstance(cell, (list, tuple, np.ndarray)):
        return Image.fromarray(_to_pixels(np.asarray(cell)))
    raise ValueError("no image" if cell is None else f"{type(cell).__name__} is not an image")


def _to_pixels(array: np.ndarray) -> np.ndarray:
    """uint8 (H, W) or (H, W, C) with C 3 or 4."""
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))
    if array.dtype.kind not in "iu" or not is_image or array.size == 0:
        valid = f"8-bit (H, W), (H, W, C) or (C, H, W), C 1, 3 or 4, {_OR_ARRAYS}"
        raise ValueError(f"{array.dtype} {array.shape}; valid: {valid}")
    if array.min() < 0 or array.max() > 255:
        raise ValueError(f"pixel values {array.min()} to {array.max()}; valid: 0 to 255, {_OR_ARRAYS}")
    return np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array, np.uint8)


def flatten(image: Image.Image) -> Image.Image:
    """Convert any mode to L or RGB: transparency on white, 16 bits scaled to 8 (65535 becomes 255)."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _scale_16_bits(image)
    if image.mode == "F":
        raise ValueError(f"a floating-point image has no known range; valid: 8 or 16 bits, {_OR_ARRAYS}")
    if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def _scale_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixel values {values.min()} to {values.max()}; valid: 8 or 16 unsigned bits")
    grey = (values * 255 + 32767) // 65535
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))


def _crop(image: Image.Image, height: int, width: int, resample: int, colour: Any) -> Image.Image:
    """Resize until both sides are covered, one of them exactly, and crop the centre."""
    target, side = min((width, image.width), (height, image.height), key=lambda pair: pair[1] / pair[0])
    wide, high = (round(length * target / side) for length in image.size)
    wide, high = max(wide, width), max(high, height)
    left, top = (wide - width) // 2, (high - height) // 2
    if target == side:
        return image.crop((left, top, left + width, top + height))
    # Only the crop is computed: up to rounding what resizing the whole image gives, in bounded memory.
    x_scale, y_scale = image.width / wide, image.height / high
    box = (left * x_scale, top * y_scale, (left + width) * x_scale, (top + height) * y_scale)
    return image.resize((width, height), resample, box=box)


def _pad(image: Image.Image, height: int, width: int, resample: int, colour: Any) -> Image.Image:
    """Resize to fit inside, one side exactly, and centre on a colour, or on the mean of a channel of numbers."""
    scale = min(width / image.width, height / image.height)
    wide, high = (max(1, round(side * scale)) for side in image.size)
    if image.mode == "F" and not np.isfinite(colour := float(np.mean(image))):  # the sum is not a float32
        colour = float(np.mean(image, dtype=np.float64))
    canvas = Image.new(image.mode, (width, height), colour)
    canvas.paste(image.resize((wide, high), resample), ((width - wide) // 2, (height - high) // 2))
    return canvas


def _check_size(image: Image.Image, height: int, width: int, resample: int, colour: Any) -> Image.Image:
    if image.size != (width, height):
        given = f"{image.width} x {image.height} pixels"
        raise ValueError(f"{given}; valid with data.resize none: {width} x {height}, width x height")
    return image


RESIZE = {"crop": _crop, "pad": _pad, "none": _check_size}
"""By `data.resize`: an image of any size to one of (height, width), by a filter, padded with a colour."""
