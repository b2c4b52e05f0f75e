"""Decoded images: made once from a data source, kept in a folder on disk, and mapped into memory from there."""

import hashlib
import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
from filelock import FileLock

from gnunet.data import decode
from gnunet.data.decoded_images import IMAGES_FILE, DecodedImages, content_fingerprint, map_array
from gnunet.data.decoder_processes import Decoders
from gnunet.data.rows import read_labels, select_rows
from gnunet.data.sources import Source, open_source
from gnunet.data.sources.pairs import open_partners
from gnunet.environment import num_cpus
from gnunet.errors import CheckpointError, DataError, expand, first_few, quoted
from gnunet.files import atomic_directory
from gnunet.scaling import PICTURES, Scaling, as_size

log = logging.getLogger(__name__)
Cached = TypeVar("Cached")

LABELS_FILE = "labels.bin"
METADATA_FILE = "table.json"
MAX_PENDING = 256  # images read ahead of the decoding
MAX_PENDING_BYTES = 2**28  # size of their files and of what they become, if there is more than one
MAX_REPORTED = 5  # corrupted images that are kept by name


def load_images(
    source: str, *, resolution: int | Sequence[int], channels: int, resize: str = "crop",
    normalization: str = "pixels", split: str = "train", image_column: str | None = None,
    label_column: str | None = None, subset: Mapping[str, Any] | None = None,
    pairs: Mapping[str, Any] | None = None, label_shape: Sequence[int] | None = None, on_error: str = "raise",
    class_conditional: bool = False, cache_dir: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DecodedImages:  # fmt: skip
    """The images of a source, decoded to uint8 or, unless normalization is pixels, float32, and mapped from disk.

    The first call decodes; later ones, by any process, find the result in the cache directory (cache_dir,
    else $GNUNET_CACHE, else gnunet in the user's cache directory), keyed by everything that decides the pixels.
    It is written atomically; processes that need the same images wait for the first. If a source's file has changed
    (`file_fingerprint`), or the cache is corrupted, images are decoded again.

    Args:
        source, split, image_column, label_column, subset, resolution, resize, normalization, on_error: as the keys
            of `data`.
        channels: of pictures 1 (grey), 3 (RGB) or 4 (RGBA); of arrays as many as they have.
        pairs: folder and column of `open_partners`, and channels (None as of the images) and num_classes of partners;
            None for none.
        label_shape: of labels that are numbers, () or (D,); None for classes.
        class_conditional: require labels.
        progress: called with (images done, images in all) while decoding.

    Raises:
        DataError: a source, split, column or value that does not exist, an image that is corrupted or of a format
            that is not read (unless on_error is "skip"), no usable image, no labels although required, or a different
            one for each image, or a cache that cannot be written.
    """
    opened = open_source(source, split, image_column=image_column, label_column=label_column, subset=subset or ())
    if opened.unreadable:
        formats = f"{len(opened.unreadable)} images of formats that are not read, or without a row in the metadata"
        found = first_few(opened.unreadable)
        _report(f"{opened.name} has {formats}, beside {len(opened)}: {found}", on_error)
    settings = [as_size(resolution), channels, resize, normalization]  # of `decode_cells`
    partners: list[Source] = []
    if pairs is not None:
        num_classes, partner_channels = pairs["num_classes"], pairs["channels"] or channels
        settings.append((1 if num_classes else partner_channels, num_classes))
        partners.append(open_partners(opened, pairs["folder"], pairs["column"]))
    decides_pixels = {
        "version": decode.VERSION, "pillow": PIL.__version__, "split": split, "subset": dict(subset or {}),
        "sources": [each.fingerprint for each in (opened, *partners)], "settings": settings, "pairs": pairs,
        "image_column": image_column, "label_column": label_column, "label_shape": label_shape,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(decides_pixels, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache_folder(cache_dir) / f"images-{key}"

    def build(temporary: Path) -> None:
        rows = select_rows(opened, subset or {})
        try:
            labels = read_labels(opened, rows, label_shape)
        except DataError:
            if class_conditional or label_column is not None:
                raise
            log.info("the column %r of %s does not hold a label for each row", opened.label_column, opened.name)
            labels = None, ()
        cells = zip(*(each.iter_images(rows) for each in (opened, *partners)), strict=True)
        _build(temporary, opened, rows, *labels, _decode_all(cells, *settings), channels, normalization, progress)

    images = read_or_build(folder, _read_cache, build)
    if images.broken:
        more = f"; and {images.skipped - len(images.broken)} more" if images.skipped > len(images.broken) else ""
        _report(f"{images.skipped} corrupted images: {'; '.join(images.broken)}{more}", on_error)
    if class_conditional and images.labels is None:
        read_labels(opened, select_rows(opened, subset or {}), label_shape)  # what is wrong with them, if it has any
        columns = f"valid for data.label_column: {quoted(opened.columns)}"
        advice = opened.label_advice if label_shape is None else columns
        raise DataError(f"data.class_conditional is true, but {opened.name} has no labels; {advice}")
    if class_conditional and images.num_classes == len(images) > 2:
        given = f"each of the {len(images)} images of {opened.name} has a class of its own"
        given += f" (data.label_column {opened.label_column})"
        valid = "numbers are labels with model.class_embed_type timestep"
        raise DataError(f"data.class_conditional is true, but {given}; {valid}")
    return replace(images, unread=opened.unread)


def _report(problem: str, on_error: str) -> None:
    if on_error == "raise":
        raise DataError(f"{problem}; convert or remove them, or set data.on_error to skip")
    log.warning("skipped: %s", problem)


def read_or_build(folder: Path, read: Callable[[Path], Cached | None], build: Callable[[Path], None]) -> Cached:
    """`read(folder)`; if it fails or is None, one process first calls `build` with what becomes the folder."""

    def find() -> Cached | None:
        with suppress(CheckpointError, OSError, ValueError, KeyError, TypeError, RecursionError):
            return read(folder)
        return None

    try:
        if (found := find()) is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if (found := find()) is None:  # no other process was faster
                    with atomic_directory(folder) as temporary:
                        build(temporary)
                    found = find()
        if found is None:
            raise OSError(f"{folder} cannot be read back")
        return found
    except OSError as error:
        valid = "set data.cache_dir or GNUNET_CACHE to a directory with enough space"
        raise DataError(f"the cache of decoded images cannot be written: {error}; {valid}") from error


def cache_folder(configured: str | None) -> Path:
    """The directory that holds the caches, one subfolder each."""
    if given := configured or os.environ.get("GNUNET_CACHE"):
        return expand(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gnunet"


def _read_cache(folder: Path) -> DecodedImages:
    """Map a cache into memory; an exception of many kinds if it does not exist or is corrupted."""
    metadata = json.loads((folder / METADATA_FILE).read_text())
    channels, shape = metadata["channels"], tuple(metadata["shape"])
    scaling = Scaling.from_dict(metadata.get("scaling"), channels, folder)
    stored = map_array(folder / IMAGES_FILE, scaling.dtype, shape)
    labels = None
    if metadata["labels"] is not None:
        kind = np.int64 if metadata["class_names"] else np.float64
        labels = np.fromfile(folder / LABELS_FILE, kind).reshape(metadata["labels"])
    return DecodedImages(
        stored, channels, labels, tuple(metadata["class_names"]), metadata["fingerprint"], metadata["skipped"],
        tuple(metadata["broken"]), scaling=scaling,
    )  # fmt: skip


def _build(
    folder: Path, source: Source, rows: np.ndarray, labels: np.ndarray | None, class_names: tuple[str, ...],
    results: Iterator[Any], channels: int, normalization: str, progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Write the images of the given rows of a source, or the exceptions, of `_decode_all` into an existing folder."""
    scaling, formats = PICTURES, set()
    is_valid = np.ones(len(rows), bool)
    broken = []
    digest = hashlib.sha256()
    with open(folder / IMAGES_FILE, "wb") as file:
        for i, result in enumerate(results):
            if isinstance(result, BaseException):
                is_valid[i] = False
                others = f" (unlike {source.describe_row(int(rows[is_valid.argmax()]))})" if formats else ""
                broken.append(f"{source.describe_row(int(rows[i]))} cannot be decoded: {result}{others}")
            else:
                pixels, file_format = result
                formats |= {file_format} - {None}
                file.write(pixels.data)
                digest.update(pixels.data)
            progress(i + 1, len(rows))
    if not is_valid.any():
        raise DataError(f"{source.name} has no usable image: {'; '.join(broken[:MAX_REPORTED])}")
    shape = (int(is_valid.sum()), *pixels.shape)
    if formats:
        (suffix, file_dtype, axes), *others = sorted(formats)
        if others:  # of several kinds, in one that holds the values of all
            suffix, file_dtype = ".npy", np.result_type(file_dtype, *(dtype for _, dtype, _ in others)).name
        array = map_array(folder / IMAGES_FILE, np.float32, shape)
        scaling = Scaling.fit(array, normalization, suffix=suffix, file_dtype=file_dtype, axes=axes)
    if labels is not None:
        labels = labels[is_valid]
        if labels.dtype == np.int64:
            occurring, labels = np.unique(labels, return_inverse=True)
            class_names = tuple(class_names[label] for label in occurring)
        labels.tofile(folder / LABELS_FILE)
    metadata = {
        "shape": shape,
        "channels": channels,
        "labels": None if labels is None else labels.shape,
        "class_names": class_names,
        "fingerprint": content_fingerprint(digest, shape, labels, class_names),
        "skipped": len(broken),
        "broken": broken[:MAX_REPORTED],
        "source": source.name,
        **({} if scaling.is_pictures else {"scaling": scaling.as_dict()}),
    }
    (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=1))


def _decode_all(cells: Iterator[tuple], size: tuple[int, int], channels: int, *settings: Any) -> Iterator[Any]:
    """`decode_cells` in order on all cores; yields an exception in place of an image that cannot be decoded."""
    pending: deque = deque()
    num_bytes, result_bytes = 0, 4 * math.prod(size) * channels
    with Decoders(num_cpus()) as decoders, ThreadPoolExecutor(max_workers=num_cpus()) as pool:
        try:
            for cell in cells:
                future = pool.submit(decoders.decode, cell, size, channels, *settings)
                pending.append((future, result_bytes + sum(map(_file_size, cell))))
                num_bytes += pending[-1][1]
                while len(pending) > MAX_PENDING or num_bytes > MAX_PENDING_BYTES:
                    future, taken = pending.popleft()
                    num_bytes -= taken
                    yield _result(future)
            for future, _ in pending:
                yield _result(future)
        except OSError as error:
            raise DataError(f"the data set cannot be read: {error}") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _result(future: Future) -> Any:
    error = future.exception()
    if isinstance(error, DataError):  # of the processes, not of this image
        raise error
    return error or future.result()


def _file_size(image: Any) -> int:
    content = image.get("bytes") if isinstance(image, dict) else getattr(image, "path", image)
    return len(content) if isinstance(content, bytes) else getattr(content, "nbytes", 0)
