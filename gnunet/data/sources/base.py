"""What a data source is."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gnunet.errors import DataError

SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "t10k": "test",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
}  # fmt: skip
"""Words in file and folder names that name a split, and the split."""


class Source(ABC):
    """A table of rows with named columns, one or more of which hold images.

    Opening one is cheap: the images are read only by `cells`.
    """

    name: str
    """The source as messages name it."""

    @property
    @abstractmethod
    def identity(self) -> Any:
        """JSON value that changes whenever the content may have changed."""

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """Names of the columns."""

    @property
    def image_columns(self) -> list[str]:
        """Columns whose type says that they hold images; may be empty."""
        return []

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def values(self, column: str) -> list:
        """A column's values, one for each row; class labels by name."""

    def classes(self, column: str) -> list[str] | None:
        """The names of a class-label column in their order; None for any other column."""
        return None

    @abstractmethod
    def cells(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        """The images of the given rows (ascending), in any form that `decode_image` takes."""

    @abstractmethod
    def where(self, row: int) -> str:
        """The file or row that a message about this row names."""


def file_identity(files: Iterable[Path]) -> list[list]:
    """Path, size and modification time of each file."""
    identity = []
    for file in files:
        status = os.stat(file)
        identity.append([os.path.abspath(file), status.st_size, status.st_mtime_ns])
    return identity


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder, links followed, hidden files and folders left out, sorted."""
    files, seen = [], set()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link to a folder above
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths = (os.path.join(parent, name) for name in names if not name.startswith("."))
        files += [Path(path) for path in paths if os.path.isfile(path)]
    return sorted(files)


def choose_split(name: str, found: dict[str | None, list], split: str) -> list:
    """Choose among things by the split that each belongs to; None is the key of those that name none.

    Raises:
        DataError: splits are named, but not the wanted one.
    """
    if set(found) <= {None}:
        return found.get(None, [])
    wanted = SPLITS.get(split, split)
    if wanted not in found:
        known = ", ".join(sorted(key for key in found if key is not None))
        raise DataError(f"data.split is {split!r}, which {name} does not have; it has {known}")
    return found[wanted]


def quoted(names: Sequence[Any], limit: int = 20) -> str:
    """A readable list of valid values, cut off where it is long."""
    shown = ", ".join(repr(name) if isinstance(name, str) else str(name) for name in names[:limit])
    return shown + (f", ... ({len(names)} in all)" if len(names) > limit else "")
