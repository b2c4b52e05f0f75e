"""Parquet files, arrow files, `save_to_disk` folders and hub data sets as data sources."""

import os
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gnunet.data.sources.base import SPLITS, Source, choose_split, file_identity, quoted
from gnunet.errors import DataError

BATCH_ROWS = 256
BATCH_BYTES = 2**28
"""What the rows that are read together may take, if there are several."""
GROUP_VALUES = 2**28
"""Of a column in one row group. Lists of pixels have one for each; a run of equal ones takes no bytes in the file."""


class Tabular(Source):
    """Rows described by `datasets`' features."""

    features: datasets.Features

    @property
    def columns(self) -> list[str]:
        return list(self.features)

    @property
    def image_columns(self) -> list[str]:
        return [name for name, feature in self.features.items() if isinstance(feature, datasets.Image)]

    def classes(self, column: str) -> list[str] | None:
        feature = self.features[column]
        return feature.names if isinstance(feature, datasets.ClassLabel) else None

    def values(self, column: str) -> list:
        values = self._read(column)
        if (names := self.classes(column)) is None:
            return values
        # Data sets mark hidden labels with -1.
        return [names[value] if value is not None and value >= 0 else None for value in values]

    @abstractmethod
    def _read(self, column: str) -> list:
        """A column as it is stored."""

    def where(self, row: int) -> str:
        return f"{self.name} row {row}"


class ParquetFiles(Tabular):
    """Parquet files with equal columns, read where they lie, without a copy in `datasets`' cache.

    A value that many rows have is stored once, so that a small file may stand for any number of bytes. No more rows
    are therefore read together than can be held if each has the largest value that the file's metadata leave room for.

    Raises:
        DataError: a file that cannot be read, or columns that differ.
    """

    def __init__(self, name: str, files: list[Path]):
        self.name = name
        self.files = files
        self._rows = []
        for file in files:
            with _readable(file):
                metadata = pq.read_metadata(file)
                features = datasets.Features.from_arrow_schema(metadata.schema.to_arrow_schema())
            if file is files[0]:
                self.features = features
            elif set(features) != set(self.features):
                raise DataError(
                    f"{file} has the columns {quoted(list(features))}, but {files[0]} has {quoted(list(self.features))}"
                )
            # Each row has an image of some bytes: more rows than bytes are not there, whatever the file says.
            if not 0 <= metadata.num_rows <= file.stat().st_size:
                raise DataError(f"{file} cannot be read: {metadata.num_rows} rows in {file.stat().st_size} bytes")
            self._rows.append(metadata.num_rows)
        self._starts = np.cumsum([0, *self._rows])

    @cached_property
    def identity(self) -> Any:
        return file_identity(self.files)

    def __len__(self) -> int:
        return sum(self._rows)

    def _read(self, column: str) -> list:
        values: list = []
        known: dict = {}  # each value once, however many rows have it
        for part in self._parts(column):
            if pa.types.is_nested(part.type):
                raise DataError(
                    f"the column {column!r} of {self.name} holds lists or structures; valid are words, whole numbers "
                    "and booleans"
                )
            values += [known.setdefault(value, value) for value in part.to_pylist()]
        return values

    def cells(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        start = 0
        for part in self._parts(column):
            first, last = np.searchsorted(rows, (start, start + len(part)))
            yield from (part[row].as_py() for row in rows[first:last] - start)
            start += len(part)

    def _parts(self, column: str) -> Iterator[pa.Array]:
        """A column in parts of as many rows as may be held together."""
        for file in self.files:
            with _readable(file), pq.ParquetFile(file) as parquet:
                for group in range(parquet.num_row_groups):
                    rows = _rows_at_once(parquet.metadata.row_group(group), column)
                    for batch in parquet.iter_batches(rows, row_groups=[group], columns=[column]):
                        yield batch.column(column)

    def where(self, row: int) -> str:
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self.files[file]} row {row - self._starts[file]}"


def _rows_at_once(group: pq.RowGroupMetaData, column: str) -> int:
    """How many rows of a column in a row group fit BATCH_BYTES, whichever of its values they have.

    Raises ValueError where it has more than GROUP_VALUES.
    """
    leaves = (group.column(number) for number in range(group.num_columns))
    mine = [leaf for leaf in leaves if leaf.path_in_schema == column or leaf.path_in_schema.startswith(f"{column}.")]
    values = max((leaf.num_values for leaf in mine), default=0)
    if values > GROUP_VALUES:
        raise ValueError(f"{values} values of {column!r} in one row group; valid: at most {GROUP_VALUES}")
    largest = max(sum(leaf.total_uncompressed_size for leaf in mine), 8 * values, 1)
    return min(max(BATCH_BYTES // largest, 1), BATCH_ROWS)


class DatasetRows(Tabular):
    """A `datasets.Dataset`, with the identity of the files it is mapped from."""

    def __init__(self, name: str, dataset: datasets.Dataset):
        self.name = name
        self.features = dataset.features
        self._dataset = dataset.with_format("arrow")

    @cached_property
    def identity(self) -> Any:
        files = file_identity(Path(file["filename"]) for file in self._dataset.cache_files)
        return [self.name, len(self._dataset), files]

    def __len__(self) -> int:
        return len(self._dataset)

    def _read(self, column: str) -> list:
        return self._dataset.select_columns(column)[:][column].to_pylist()

    def cells(self, column: str, rows: np.ndarray) -> Iterator[Any]:
        chosen = self._dataset.select_columns(column).select(rows)
        for table in chosen.iter(BATCH_ROWS):
            yield from table[column].to_pylist()


def open_table_files(root: Path, files: list[Path], split: str) -> Source:
    """Parquet or arrow files, one file or all below a folder, as one source.

    Where the names of a folder's files or subfolders begin with splits, the wanted split's are taken.

    Raises:
        DataError: both kinds, an unreadable file, or not the wanted split.
    """
    if len(suffixes := {file.suffix for file in files}) > 1:
        raise DataError(f"{root} holds {' and '.join(sorted(suffixes))} files; valid is one of these kinds")
    if root not in files:
        found: dict[str | None, list] = defaultdict(list)
        for file in files:
            found[_split_of(file.relative_to(root))].append(file)
        files = choose_split(str(root), found, split)
    if suffixes == {".parquet"}:
        return ParquetFiles(str(root), files)
    parts = []
    for file in files:
        with _readable(file):
            parts.append(_whole(datasets.Dataset.from_file(str(file))))
    with _readable(root):
        return DatasetRows(str(root), datasets.concatenate_datasets(parts))


def _split_of(file: Path) -> str | None:
    """The split that a file's name (train-00000-of-00002.parquet) or else its folder's name says."""
    for name in (file.stem, file.parent.name):
        if (word := re.split(r"[^a-z0-9]", name.lower(), maxsplit=1)[0]) in SPLITS:
            return SPLITS[word]
    return None


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets`' save_to_disk wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved_dataset(folder: Path, split: str) -> Source:
    """A folder that save_to_disk wrote; DataError where it is broken or lacks the split."""
    with _readable(folder):
        loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"data.split is {split!r}, which {folder} does not have; it has {quoted(list(loaded))}")
        loaded = loaded[split]
    with _readable(folder):
        return DatasetRows(str(folder), _whole(loaded))


def _whole(dataset: datasets.Dataset) -> datasets.Dataset:
    """The data set, once its arrays' offsets are known to lie within their buffers: arrow itself trusts them."""
    dataset.data.validate(full=True)
    return dataset


def open_hub_dataset(name: str, split: str) -> Source:
    """A data set of the hub, or of its cache on this machine; DataError where it cannot be had."""
    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # `datasets` lets errors of many libraries through
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"data.source is {name!r}: there is no such file or folder here (in {os.getcwd()}), and as a "
            f"hub data set it cannot be loaded with split {split!r}: {reason}\n"
            "Valid are noto_emoji, a folder of images or idx files, a .parquet or .arrow file or a folder of "
            "them, or the name of a data set on the Hugging Face hub, which needs a network or a cached copy."
        ) from error
    return DatasetRows(name, loaded)


@contextmanager
def _readable(file: Path | str) -> Iterator[None]:
    """Name the file in what arrow and `datasets` raise, of any kind, for one that they cannot read."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{file} cannot be read: {reason[:1000]}") from error
