"""From `data.*` to a table of pixels: decoded once into a folder on disk, mapped from there ever after."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from filelock import FileLock

from gnunet.data import decode
from gnunet.data.sources import columns, open_source
from gnunet.data.sources.base import Source
from gnunet.data.table import IMAGES_FILE, DecodedImages, content_fingerprint, map_array, map_images
from gnunet.environment import num_cpus
from gnunet.errors import DataError
from gnunet.files import fsync_path

log = logging.getLogger(__name__)

LABELS_FILE = "labels.npy"
TABLE_FILE = "table.json"
CHUNK_IMAGES = 256
CHUNK_BYTES = 2**28
"""Of files in memory, after which a chunk ends."""
REPORTED = 20  # broken images that are kept by name


def load_images(
    source: str,
    *,
    resolution: int,
    channels: int,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    subset: Mapping[str, Any] | None = None,
    on_error: str = "raise",
    class_conditional: bool = False,
    cache_dir: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DecodedImages:
    """The images of a source, decoded to uint8 and mapped from disk.

    The first call decodes; later ones, by any process, find the result in the cache folder
    (cache_dir, else $GNUNET_CACHE, else gnunet in the user's cache folder), keyed by everything that
    decides the pixels. The cache appears whole, by one rename; processes that want the same one wait for the
    first. Files whose size or date changed, and a torn cache, are decoded anew.

    Args:
        source, split, image_column, label_column, subset, resolution, on_error: as the keys of `data`.
        channels: 1 (grey) or 3 (RGB).
        class_conditional: labels are needed.
        cache_dir: where decoded images are kept.
        progress: called with (images done, images in all) while decoding.

    Raises:
        DataError: a source, split, column or value that is not there, a broken image (unless
            data.on_error is skip), no usable image, labels wanted where there are none, or a cache folder
            that cannot be written.
    """
    opened = open_source(source, split)
    pixels = {
        "image_column": image_column,
        "label_column": label_column,
        "subset": subset or {},
        "resolution": resolution,
        "channels": channels,
    }
    key = {
        "version": decode.VERSION,
        "pillow": PIL.__version__,
        "source": opened.identity,
        "split": split,
        **pixels,
    }
    name = "images-" + hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache_folder(cache_dir) / name
    try:
        table = _open_or_build(folder, on_error, partial(_build, opened, on_error, progress, **pixels))
    except OSError as error:
        raise DataError(
            f"the cache of decoded images cannot be written: {error}; set data.cache_dir or GNUNET_CACHE "
            "to a folder with space"
        ) from error
    if class_conditional and table.labels is None:
        raise DataError(
            f"data.class_conditional is true, but no column of {opened.name} is known to hold labels; set "
            f"data.label_column to one of {', '.join(opened.columns)}"
        )
    return table


def cache_folder(configured: str | None) -> Path:
    """The folder that holds the caches, one subfolder each."""
    if given := configured or os.environ.get("GNUNET_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gnunet"


def _open_or_build(folder: Path, on_error: str, build: Callable[[Path], None]) -> DecodedImages:
    if table := _open_cache(folder, on_error):
        return table
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if table := _open_cache(folder, on_error):  # another process was faster
            return table
        for torn in folder.parent.glob(f"{folder.name}.tmp-*"):  # what a killed process left
            shutil.rmtree(torn, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        try:
            build(building)
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(building, folder)
            fsync_path(folder.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    if table := _open_cache(folder, on_error):
        return table
    raise OSError(f"{folder} cannot be read back")


def _open_cache(folder: Path, on_error: str) -> DecodedImages | None:
    """Map a cache; None where it is absent or torn. DataError where it left out images that may not be."""
    try:
        about = json.loads((folder / TABLE_FILE).read_text())
        images = map_images(folder)
        # Mapped at first, since a file that is shorter than its header says is refused before memory is taken.
        labels = np.array(map_array(folder / LABELS_FILE)) if about["has_labels"] else None
        if list(images.shape) != about["shape"] or images.dtype != np.uint8 or images.ndim != 4:
            return None
        if labels is not None and (labels.dtype != np.int64 or labels.shape != images.shape[:1]):
            return None
        table = DecodedImages(
            images, labels, tuple(about["class_names"]), about["fingerprint"], about["skipped"], folder
        )
        broken = about["broken"]
    except (OSError, EOFError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    if table.skipped and on_error == "raise":
        raise DataError(broken[0] + _HOW_TO_SKIP)
    if table.skipped:
        log.warning("left out %d broken images, for instance %s", table.skipped, broken[0])
    return table


_HOW_TO_SKIP = "; mend or remove it, or set data.on_error to skip"


def _build(
    source: Source,
    on_error: str,
    progress: Callable[[int, int], None] | None,
    folder: Path,
    *,
    image_column: str | None,
    label_column: str | None,
    subset: Mapping[str, Any],
    resolution: int,
    channels: int,
) -> None:
    """Decode a source into an existing folder."""
    images_in = columns.find_image_column(source, image_column)
    rows = columns.select_rows(source, subset)
    labels, class_names = None, ()
    if labels_in := columns.find_label_column(source, label_column):
        try:
            labels, class_names = columns.read_labels(source, labels_in, rows)
        except DataError:
            if label_column is not None:
                raise
            log.info("the column %r of %s does not hold a label for each row", labels_in, source.name)

    size = resolution
    good = np.ones(len(rows), bool)
    broken = []
    digest = hashlib.sha256()
    with open(folder / IMAGES_FILE, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), size, size, channels)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for i, result in enumerate(_decode_all(source.cells(images_in, rows), size, channels)):
            if isinstance(result, Exception):
                message = f"{source.where(int(rows[i]))} cannot be decoded: {result}"
                if on_error == "raise":
                    raise DataError(message + _HOW_TO_SKIP) from result
                good[i] = False
                broken.append(message)
            else:
                file.write(result.data)
                digest.update(result.data)
            if progress:
                progress(i + 1, len(rows))
        if not good.any():
            raise DataError(f"{source.name} has no usable image; the first: {broken[0]}")
        header["shape"] = (int(good.sum()), size, size, channels)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
        if file.tell() != start:
            raise RuntimeError("NumPy's header changed its length with the number of images")
    if labels is not None:
        labels = labels[good]
        np.save(folder / LABELS_FILE, labels, allow_pickle=False)
    images = map_images(folder)
    about = {
        "shape": images.shape,
        "has_labels": labels is not None,
        "class_names": class_names,
        "fingerprint": content_fingerprint(digest, images, labels, class_names),
        "skipped": len(broken),
        "broken": broken[:REPORTED],
        "source": source.name,
    }
    (folder / TABLE_FILE).write_text(json.dumps(about, indent=1))
    for path in [*folder.iterdir(), folder]:
        fsync_path(path)


def _decode_all(cells: Iterator[Any], resolution: int, channels: int) -> Iterator[np.ndarray | Exception]:
    """Decode in order, on all cores, holding few at a time; an image's error takes its place."""

    def attempt(cell: Any) -> np.ndarray | Exception:
        try:
            return decode.decode_image(cell, resolution, channels)
        except Exception as error:  # image decoders raise every kind for broken files
            return error

    with ThreadPoolExecutor(max_workers=num_cpus()) as pool:
        while chunk := _read(cells):
            yield from pool.map(attempt, chunk)


def _read(cells: Iterator[Any]) -> list[Any]:
    """The next of a source's cells, as many as are decoded together."""
    chunk, size = [], 0
    try:
        for cell in islice(cells, CHUNK_IMAGES):
            chunk.append(cell)
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            size += len(content) if isinstance(content, bytes) else 0
            if size >= CHUNK_BYTES:
                break
    except OSError as error:
        raise DataError(f"the data set cannot be read: {error}") from error
    return chunk
