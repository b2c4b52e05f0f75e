"""What a data source is, and what sources share."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gnunet.errors import DataError, did_you_mean, quoted

SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "t10k": "test",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
}  # fmt: skip
"""Words in the names of files and folders -> the split that they stand for."""


class Source(ABC):
    """Images by row, with labels if there are any.

    To add a kind of source, write a subclass in a new file and add it to SOURCES, before any class that also accepts
    its paths (`ImageFolder` accepts every folder). Opening a source should be cheap: images are read by `image` and
    `iter_images` only.
    """

    name: str  # in error messages
    fingerprint: Any  # JSON value that changes with the content, such as `file_fingerprint(files)`
    class_names: Sequence[str] | None = None  # the labels that there may be, in order; None sorts those that occur

    @classmethod
    def accepts(cls, path: Path, files: list[Path]) -> bool:
        """Whether this class reads the source at `path`; `files` are those below a folder, or the file itself."""
        return False

    @abstractmethod
    def __init__(self, path: Path, files: list[Path], split: str) -> None:
        """Open the source at `path`; `split` is `data.split`."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def image(self, row: int) -> Any:
        """A row's image, in any form that `decode_image` takes."""

    def labels(self) -> Sequence[Any] | None:
        """Each row's label, a string, an integer or None; None if the source has no labels."""
        return None

    def iter_images(self, rows: np.ndarray) -> Iterator[Any]:
        """The images of the given rows, ascending int64."""
        return (self.image(int(row)) for row in rows)

    def describe_row(self, row: int) -> str:
        """The file or row that error messages name."""
        return f"{self.name} image {row}"

    # Tables override the rest: other sources have the columns `image` and, with labels, `label`.

    label_column: str | None = "label"

    @property
    def columns(self) -> list[str]:
        """The names that `data.image_column`, `data.label_column` and `data.subset` may use."""
        return ["image"] if self.labels() is None else ["image", "label"]

    def choose_columns(self, image_column: str | None, label_column: str | None) -> None:
        """Use these columns; None leaves the choice to the source. DataError if one does not exist."""
        for key, column in (("data.image_column", image_column), ("data.label_column", label_column)):
            if column is not None:
                self.check_column(key, column)

    def check_column(self, key: str, column: str) -> None:
        """Raise DataError if the column that a key names does not exist."""
        if column not in self.columns:
            hint = did_you_mean(column, self.columns)
            raise DataError(f"{key}: {self.name} has no column {column!r}{hint}; valid: {quoted(self.columns)}")

    def values(self, column: str) -> Sequence[Any]:
        """A column's values, one per row; class labels by name."""
        return self.labels() or () if column == "label" else [self.describe_row(row) for row in range(len(self))]


def file_fingerprint(files: Iterable[Path]) -> list[list]:
    """Path, size and modification time of each file."""
    stats = [(os.path.abspath(file), file.stat()) for file in files]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def choose_split(name: str, found: Mapping[str | None, list], split: str) -> list:
    """One split's items of the source `name`, from {split: items}; the key None is for items that name no split."""
    if set(found) <= {None}:
        return found.get(None, [])
    wanted = split if split in found else SPLITS.get(split, split)
    if wanted not in found:
        known = ", ".join(sorted(key for key in found if key is not None))
        raise DataError(f"data.split: {name} has no split {split!r}; valid: {known}")
    return found[wanted]
