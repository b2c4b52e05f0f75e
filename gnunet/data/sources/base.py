"""What a data source is, and what sources share."""

import hashlib
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gnunet.errors import DataError, did_you_mean, first_few, quoted

log = logging.getLogger(__name__)

SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "t10k": "test",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation", "eval": "validation",
    "evaluation": "validation",
}  # fmt: skip
"""Words in the names of files and folders -> the split that they stand for."""
_FILLERS = ("", "data", "dataset", "image", "images", "img", "imgs", "split", "x")
MAX_DIGESTS = 64  # files of a source of which the beginning and the end are read to notice a change
DIGEST_BYTES = 2**16

Name = str | None


class Source(ABC):
    """Images by row, with labels if there are any.

    To add a kind of source, write a subclass in a new file and add it to SOURCES, before any class that also accepts
    its paths (`ImageFolder` accepts every folder). Opening a source should be cheap: images are read by `image` or
    `iter_images`, of which a subclass has one, only.
    """

    suffixes: Sequence[str] = ()  # of the files that it reads, unless a subclass has another `accepts`
    name: str  # in error messages
    fingerprint: Any  # JSON value that changes with the content, such as `file_fingerprint(files)`
    unread: Mapping[str, int] = {}  # numbers of files that are not read, by suffix
    unreadable: Sequence[Path] = ()  # those of them that are images
    class_names: Sequence[str] | None = None  # the labels that there may be, in order; None sorts those that occur
    image_column: str = "image"  # chosen by `choose_columns`, as the next
    label_column: Name = None

    @classmethod
    def accepts(cls, path: Path, files: list[Path]) -> bool:
        """Whether this class reads the source at `path`; `files` are those below a folder, or the file itself."""
        return any(file.suffix in cls.suffixes for file in files)

    @abstractmethod
    def __init__(self, path: Path, files: list[Path], split: str) -> None:
        """Open the source at `path`; `split` is `data.split`."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    def image(self, row: int) -> Any:
        """A row's image, in any form that `decode_image` takes."""
        raise NotImplementedError

    def labels(self) -> Sequence[Any] | None:
        """Each row's label, a string, an integer or None; None if the source has no labels."""
        return self.values(self.label_column) if self.label_column else None

    def iter_images(self, rows: np.ndarray) -> Iterator[Any]:
        """The images of the given rows, ascending int64."""
        return (self.image(int(row)) for row in rows)

    def describe_row(self, row: int) -> str:
        """The file or row that error messages name."""
        return f"{self.name} image {row}"

    # Tables override the rest: other sources have the columns `image` and, with labels, `label`.

    @property
    def columns(self) -> list[str]:
        """The names that `data.label_column` and `data.subset` may use."""
        return ["image"] if self.labels() is None else ["image", "label"]

    @property
    def image_columns(self) -> list[str]:
        """Those that may hold images, which `data.image_column` and `data.condition.column` may use."""
        return self.columns[:1]

    @property
    def label_advice(self) -> str:
        """How to give a source labels."""
        folders = "valid: a folder for each class, and every image in one, or a metadata.csv with a column of labels"
        return f"{folders}, named by data.label_column; given {quoted(self.columns)}"

    def choose_columns(self, image_column: Name = None, label_column: Name = None, subset: Iterable[str] = ()) -> None:
        """Use these columns; None leaves the choice to the source. DataError if one, or one of `subset`, is missing."""
        of_images, columns = self.image_columns, self.columns
        keys = [("image_column", image_column, "null", of_images), ("label_column", label_column, "null", columns)]
        keys += [("subset", column, "'{}'", columns) for column in subset]
        if lacking := [item for item in keys if item[1] not in (None, *item[3])]:
            given = ", ".join(f"data.{key} {name!r}{did_you_mean(name, valid)}" for key, name, _, valid in lacking)
            flags = " ".join(dict.fromkeys(f"--data.{key} {value}" for key, _, value, _ in lacking))
            kind = "column of images" if lacking[0][0] == "image_column" else "column"
            raise DataError(
                f"{given}: no such {kind} in {self.name}; valid: {quoted(lacking[0][3])}; if a config for other images "
                f"sets this, {flags} resets it, or train with --config folder_small"
            )
        self.image_column = image_column or next(iter(of_images), "image")
        self.label_column = label_column or ("label" if "label" in columns else None)

    def values(self, column: str) -> Sequence[Any]:
        """A column's values, one per row; class labels by name."""
        return self.labels() or () if column == "label" else [self.describe_row(row) for row in range(len(self))]


def file_fingerprint(files: Iterable[Path]) -> list[list]:
    """What changes with any of the files: their paths, sizes, times of modification and of the last change of any kind,
    and digests of a sample.

    Times of change cannot be set, unlike those of modification. What is not noticed: content that changes while a file
    system keeps this time, in a file or a place that the sample does not hold.
    """
    paths = [os.path.abspath(file) for file in files]
    stats = [os.stat(path) for path in paths]
    step = max(1, -(-len(paths) // MAX_DIGESTS))
    digests = [_ends_digest(path, stat.st_size) for path, stat in zip(paths[::step], stats[::step], strict=True)]
    return [
        *([path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in zip(paths, stats, strict=True)),
        digests,
    ]


def _ends_digest(path: str, size: int) -> str:
    """sha256 of a file's first and last DIGEST_BYTES; empty if it cannot be read, which the decoder reports."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read(DIGEST_BYTES))
            file.seek(max(0, size - DIGEST_BYTES))
            digest.update(file.read(DIGEST_BYTES))
    except OSError:
        return ""
    return digest.hexdigest()


@lru_cache(2**16)
def split_of_folder(name: str) -> str | None:
    """The split that a folder's name stands for, such as `test`, `Train_images` or `val2017`; None if it is another."""
    words = {word.removesuffix("set") for word in re.findall("t10k|[a-z]+", name.lower())} - {*_FILLERS}
    return SPLITS.get(words.pop()) if len(words) == 1 else None


def split_of_file(name: str) -> str | None:
    """The split that a file's name has among its words, such as `cifar10-test-00000-of-00001`; None if none or two."""
    found = {SPLITS[word] for word in re.findall("t10k|[a-z]+", name.lower()) if word in SPLITS}
    return found.pop() if len(found) == 1 else None


def choose_split(name: str, found: Mapping[str | None, list], split: str, hint: str = "") -> list:
    """One split's items of the source `name`, from {split: items}; the key None is for items that name no split.

    Raises:
        DataError: there is no such split. A source without splits has `train`, and the one that it is named after.
    """
    wanted = split if split in found else SPLITS.get(split.lower(), split)
    own = (split_of_file if Path(name).suffix else split_of_folder)(Path(name).stem)
    known = {key for key in found if key is not None} or {"train", own or "train"}
    if wanted not in known:
        raise DataError(f"data.split: {name} has no split {split!r}; valid: {', '.join(sorted(known))}{hint}")
    if wanted not in found:
        return found.get(None, [])
    if unnamed := found.get(None):
        log.warning("%s: only the split %s is read, not %s", name, wanted, first_few(unnamed))
    return found[wanted]
