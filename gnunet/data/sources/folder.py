"""Folders of images and of idx files as data sources."""

import gzip
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gnunet.data.sources.base import SPLITS, Source, choose_split, file_identity, visible_files
from gnunet.errors import DataError

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
    ".ppm", ".pgm", ".pbm",
)  # fmt: skip


class ImageFolder(Source):
    """A folder of image files, searched through; columns `image` and, with class subfolders, `label`.

    Where all images lie in subfolders, the subfolder at the top names the class. Where all those subfolders
    are named for splits (train, test, val, ...), the wanted one is taken and classes are looked for in it.

    Raises:
        DataError: no image, or not the wanted split.
    """

    def __init__(self, folder: Path, split: str):
        self.name = str(folder)
        self.files = [path for path in visible_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
        if not self.files:
            raise DataError(
                f"{folder} holds no image files ({' '.join(IMAGE_SUFFIXES)}), no idx files and no "
                ".parquet or .arrow files"
            )
        tops = self._tops(folder)
        if None not in tops and all(top.lower() in SPLITS for top in tops):
            found = {SPLITS[top.lower()]: [top] for top in tops}
            folder = folder / choose_split(self.name, found, split)[0]
            self.files = [path for path in self.files if folder in path.parents]
            tops = self._tops(folder)
        self._folder = folder
        self._has_labels = None not in tops

    def _tops(self, folder: Path) -> list[str | None]:
        """The distinct subfolders that hold images; None stands for the folder itself."""
        parts = (path.relative_to(folder).parts for path in self.files)
        return list(dict.fromkeys(part[0] if len(part) > 1 else None for part in parts))

    @cached_property
    def identity(self) -> Any:
        return file_identity(self.files)

    @property
    def columns(self) -> list[str]:
        return ["image", "label"] if self._has_labels else ["image"]

    def __len__(self) -> int:
        return len(self.files)

    def values(self, column: str) -> list:
        if column == "image":
            return [str(file) for file in self.files]
        return [file.relative_to(self._folder).parts[0] for file in self.files]

    def cells(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        return (self.files[row] for row in rows)

    def where(self, row: int) -> str:
        return str(self.files[row])


IDX_BYTES = 2**31
"""Three times EMNIST's; a packed file may hold a thousand times its own size."""
DEFLATE_RATIO = 1032
"""The most that gzip packs into a byte."""
IDX_NAME = re.compile(r"(?:(?P<split>\w+)-)?(?P<part>images|labels)[-.]idx[13]-ubyte(\.gz)?$")


class IdxFolder(Source):
    """A folder of idx files under MNIST's names (train-images-idx3-ubyte, t10k-..., plain or .gz).

    Columns `image` and, where there is a file of labels, `label`.

    Raises:
        DataError: no file of images for the split, a file that is not what its name says, or counts that
            differ.
    """

    def __init__(self, folder: Path, split: str):
        self.name = str(folder)
        found: dict[str | None, list] = defaultdict(list)
        for file in visible_files(folder):
            if match := IDX_NAME.match(file.name):
                found[SPLITS.get(match["split"], match["split"])].append((match["part"], file))
        # Of a plain and a packed copy of one file the plain one, which sorts first, is read.
        files = dict(reversed(choose_split(self.name, found, split)))
        if "images" not in files:
            raise DataError(f"{folder} has labels but no file of images for the split {split!r}")
        self.files = list(files.values())
        self._images = read_idx(files["images"], dimensions=3)
        self._labels = read_idx(files["labels"], dimensions=1) if "labels" in files else None
        if self._labels is not None and len(self._labels) != len(self._images):
            raise DataError(
                f"{files['images']} holds {len(self._images)} images, but {files['labels']} holds "
                f"{len(self._labels)} labels"
            )

    @staticmethod
    def accepts(files: list[Path]) -> bool:
        """Whether idx files are among these."""
        return any(IDX_NAME.match(file.name) for file in files)

    @property
    def identity(self) -> Any:
        return file_identity(self.files)

    @property
    def columns(self) -> list[str]:
        return ["image"] if self._labels is None else ["image", "label"]

    def __len__(self) -> int:
        return len(self._images)

    def values(self, column: str) -> list:
        return (self._images if column == "image" else self._labels).tolist()

    def cells(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        return (self._images[row] for row in rows)

    def where(self, row: int) -> str:
        return f"{self.name} image {row}"


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Read an idx file of unsigned bytes, plain or .gz.

    The format: two zero bytes, 8 for unsigned bytes, the number of dimensions, each length as big-endian
    uint32, then the values.

    Raises:
        DataError: not such a file, not as long as it says, or of more than IDX_BYTES.
    """
    header = 4 + 4 * dimensions
    packed, size = file.suffix == ".gz", file.stat().st_size
    try:
        with gzip.open(file) if packed else file.open("rb") as stream:
            head = stream.read(header)
            if head[:4] != bytes([0, 0, 8, dimensions]) or len(head) < header:
                raise DataError(f"{file} is not an idx file of unsigned bytes in {dimensions} dimensions")
            shape = np.frombuffer(head, ">u4", dimensions, 4).tolist()
            count = math.prod(shape)
            if count > (most := min(IDX_BYTES, DEFLATE_RATIO * size if packed else IDX_BYTES)):
                raise DataError(f"{file} is broken: {count} values announced; valid: at most {most}")
            # No more than is announced, whatever a packed file goes on to, and no more than is there.
            content = stream.read(count + 1 if packed else min(count + 1, size))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if len(content) != count:
        there = "more" if len(content) > count else len(content)
        raise DataError(f"{file} is broken: {count} values announced, {there} there")
    return np.frombuffer(content, np.uint8).reshape(shape)
