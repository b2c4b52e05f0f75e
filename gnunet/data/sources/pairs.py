"""A source of images that come in pairs."""

from collections.abc import Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gnunet.data.decode_pairs import Pair
from gnunet.data.sources import ImageFolder, Source, open_source
from gnunet.data.sources.image_folder import ALL
from gnunet.errors import DataError, did_you_mean, first_few, quoted


class PairedSource:
    """A source whose images are `Pair`s of its own and their partners; all else is the source's.

    Args:
        folder: what holds the partners, under the relative names of the source's images but for the suffix; or None.
        column: or else the column with the partners.
        channels, num_classes: of `Pair`.

    Raises:
        DataError: images without a partner, or a column that does not exist.
    """

    def __init__(
        self, source: Source, folder: str | None, column: str | None, channels: int, num_classes: int | None
    ) -> None:
        self._source, self._pair = source, partial(Pair, channels=channels, num_classes=num_classes)
        if folder is None:
            if column not in source.columns:
                hint = f"{did_you_mean(column, source.columns)}; valid: {quoted(source.columns)}"
                raise DataError(f"data.condition.column: {source.name} has no column {column!r}{hint}")
            self._others, self._rows = copy(source), None
            self._others.choose_columns(image_column=column)
        else:
            self._others = open_source(folder, ALL)
            if not isinstance(source, ImageFolder) or not isinstance(self._others, ImageFolder):
                wrong = self._others if isinstance(source, ImageFolder) else source
                raise DataError(f"data.condition.folder: {wrong.name} is not a folder of images; valid: a column of it")
            rows = {_name(self._others, row): row for row in range(len(self._others))}
            names = [_name(source, row) for row in range(len(source))]
            if missing := [source.describe_row(row) for row, name in enumerate(names) if name not in rows]:
                raise DataError(
                    f"data.condition.folder: {folder} has no partner of {len(missing)} images, {first_few(missing)}; "
                    f"valid: a file of the same relative name for each image, such as {names[0]}.png"
                )
            if len(rows) < len(self._others):
                found = [self._others.describe_row(row) for row in {*range(len(self._others))} - {*rows.values()}]
                raise DataError(
                    f"data.condition.folder: another file is named as {first_few(found)} but for the suffix"
                )
            self._rows = np.array([rows[name] for name in names])
        self.fingerprint = [source.fingerprint, self._others.fingerprint]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def iter_images(self, rows: np.ndarray) -> Iterator[Pair]:
        others = self._others
        cells = others.iter_images(rows) if self._rows is None else map(others.image, self._rows[rows].tolist())
        return map(self._pair, self._source.iter_images(rows), cells)


def _name(source: ImageFolder, row: int) -> str:
    return source.files[row].relative_to(Path(source.name)).with_suffix("").as_posix()
