"""MNIST's idx files."""

import gzip
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from gnunet.data.sources.base import SPLITS, Source, choose_split, file_fingerprint
from gnunet.errors import DataError, as_data_error

MAX_IDX_BYTES = 2**31  # largest array read, three times EMNIST's; a packed file may expand a thousandfold
MAX_DEFLATE_RATIO = 1032  # the most bytes that gzip packs into one
IDX_NAME = re.compile(r"(?:(?P<split>\w+)-)?(?P<part>images|labels)[-.]idx[13]-ubyte(\.gz)?$")


class IdxFolder(Source):
    """A folder of idx files under MNIST's names (train-images-idx3-ubyte, t10k-..., plain or .gz)."""

    def __init__(self, path: Path, files: list[Path], split: str) -> None:
        self.name = str(path)
        found: dict[str | None, list] = defaultdict(list)
        for file in files:
            if match := IDX_NAME.match(file.name):
                found[SPLITS.get(match["split"], match["split"])].append((match["part"], file))
        # Of a plain and a packed copy of one file the plain one, which sorts first, is read.
        parts = dict(reversed(choose_split(self.name, found, split)))
        if "images" not in parts:
            raise DataError(f"{path} has labels but no file of images for the split {split!r}")
        self.fingerprint = file_fingerprint(parts.values())
        self._images = read_idx(parts["images"], ndim=3)
        self._labels = read_idx(parts["labels"], ndim=1).tolist() if "labels" in parts else None
        if self._labels is not None and len(self._labels) != len(self._images):
            counts = f"{len(self._images)} images, but {parts['labels']} has {len(self._labels)} labels"
            raise DataError(f"{parts['images']} has {counts}")

    @classmethod
    def accepts(cls, path: Path, files: list[Path]) -> bool:
        return path.is_dir() and any(IDX_NAME.match(file.name) for file in files)

    def __len__(self) -> int:
        return len(self._images)

    def image(self, row: int) -> np.ndarray:
        return self._images[row]

    def labels(self) -> list[int] | None:
        return self._labels


def read_idx(file: Path, ndim: int) -> np.ndarray:
    """Read an idx file of unsigned bytes, plain or .gz.

    The format: two zero bytes, 8 for unsigned bytes, the number of dimensions, each length as big-endian
    uint32, then the values.
    """
    header_size = 4 + 4 * ndim
    is_packed, size = file.suffix == ".gz", file.stat().st_size
    limit = min(MAX_IDX_BYTES, MAX_DEFLATE_RATIO * size if is_packed else size)
    with as_data_error(file), gzip.open(file) if is_packed else file.open("rb") as stream:
        header = stream.read(header_size)
        if header[:4] != bytes([0, 0, 8, ndim]) or len(header) < header_size:
            raise DataError(f"{file} is not an idx file of unsigned bytes in {ndim} dimensions")
        shape = np.frombuffer(header, ">u4", ndim, 4).tolist()
        count = math.prod(shape)
        content = stream.read(count + 1) if count <= limit else b""  # one more, to see that nothing follows
    if len(content) != count:
        raise DataError(f"{file} is corrupted: it does not hold the {count} values that its header announces")
    return np.frombuffer(content, np.uint8).reshape(shape)
