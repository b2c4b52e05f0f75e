"""Tables as data sources: parquet and arrow files, folders written by `save_to_disk`, data sets of the hub."""

import logging
import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gnunet.data.sources.base import (
    SPLITS,
    Name,
    Source,
    choose_split,
    file_fingerprint,
    split_of_file,
    split_of_folder,
)
from gnunet.errors import DataError, as_data_error, first_line, quoted

IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "pixel_values", "png", "jpg", "jpeg", "webp")
LABEL_COLUMNS = (
    "label", "labels", "fine_label", "class", "class_label", "class_id", "target", "cls", "category",
)  # fmt: skip

MAX_BATCH_ROWS = 256
MAX_BATCH_BYTES = 2**28
"""Size of the rows that are read together, if there is more than one."""
MAX_GROUP_VALUES = 2**28
"""Values of a column in one row group. A list of pixels has one per pixel; a run of equal ones takes no bytes."""
MAX_IMAGE_VALUES = 2**24
"""Values of an image that is a list of pixels, each of which becomes a Python object."""


class Table(Source):
    """Rows described by the features of `datasets`; columns that are not given are found by name or type."""

    features: datasets.Features

    @property
    def columns(self) -> list[str]:
        return list(self.features)

    @property
    def image_columns(self) -> list[str]:
        return [each.name for each in self.features.arrow_schema if not pa.types.is_primitive(each.type)]

    @property
    def label_advice(self) -> str:
        kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean, pa.types.is_integer)
        found = [each.name for each in self.features.arrow_schema if any(is_kind(each.type) for is_kind in kinds)]
        found.sort(key=lambda name: not isinstance(self.features[name], datasets.ClassLabel))
        if not found:
            return "none of its columns can hold classes (strings, integers or booleans)"
        return f"set data.label_column to the one that holds classes, a few values for many images, of {quoted(found)}"

    def choose_columns(self, image_column: Name = None, label_column: Name = None, subset: Iterable[str] = ()) -> None:
        image_column = image_column or self._find_column(IMAGE_COLUMNS, datasets.Image)
        label_column = label_column or self._find_column(LABEL_COLUMNS, datasets.ClassLabel)
        super().choose_columns(image_column, label_column, subset)
        if image_column is None:
            valid = f"set data.image_column to one of {quoted(self.image_columns)}"
            raise DataError(f"{self.name} has no column that is known to hold images; {valid}")
        self.class_names = getattr(self.features.get(self.label_column), "names", None)

    def _find_column(self, names: Sequence[str], feature: type) -> str | None:
        """The column with the first of these names, or else the only one of this type."""
        typed = [column for column in self.columns if isinstance(self.features[column], feature)]
        return find_column(self.columns, names) or (typed[0] if len(typed) == 1 else None)

    def values(self, column: str) -> Sequence[Any]:
        values = distinct_values(self.name, column, self._batches(column))
        if isinstance(feature := self.features[column], datasets.ClassLabel):
            # Data sets mark hidden labels with -1.
            return [None if value is None or value < 0 else feature.names[value] for value in values]
        return values

    @abstractmethod
    def _batches(self, column: str) -> Iterator[pa.Array | pa.ChunkedArray]:
        """A column in batches of rows that fit memory."""

    def describe_row(self, row: int) -> str:
        return f"{self.name} row {row}"


def find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The column with the first of these names, in small or capital letters; None if there is none."""
    spelled = {column.lower(): column for column in reversed(columns)}
    return next((spelled[name] for name in names if name in spelled), None)


class ParquetFiles(Table):
    """Parquet files with equal columns, read in place, without a copy in the cache of `datasets`."""

    suffixes = (".parquet",)

    def __init__(self, path: Path, files: list[Path], split: str) -> None:
        self.name = str(path)
        self.files = table_files(path, files, split)
        self.fingerprint = file_fingerprint(self.files)
        lengths = []
        for file in self.files:
            with as_data_error(file):
                metadata = pq.read_metadata(file)
                features = datasets.Features.from_arrow_schema(metadata.schema.to_arrow_schema())
            if file is self.files[0]:
                self.features = features
            elif set(features) != set(self.features):
                given = f"{file} has the columns {quoted(list(features))}"
                raise DataError(f"{given}, but {self.files[0]} has {quoted(self.columns)}")
            # An image takes at least a byte: there cannot be more rows than bytes, whatever the file says.
            if not 0 <= metadata.num_rows <= file.stat().st_size:
                raise DataError(f"{file} cannot be read: {metadata.num_rows} rows in {file.stat().st_size} bytes")
            lengths.append(metadata.num_rows)
        self._starts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def iter_images(self, rows: np.ndarray) -> Iterator[Any]:
        start = 0
        for batch in self._batches(self.image_column):
            first, last = np.searchsorted(rows, (start, start + len(batch)))
            yield from (_image(batch, row) for row in rows[first:last] - start)
            start += len(batch)

    def _batches(self, column: str) -> Iterator[pa.Array]:
        # Not by pyarrow.dataset, which decodes whole row groups: a value that many rows share is stored once, so that
        # a small file may expand to any size.
        for file in self.files:
            with as_data_error(file), pq.ParquetFile(file) as parquet:
                yield from column_batches(parquet, column)

    def describe_row(self, row: int) -> str:
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self.files[file]} row {row - self._starts[file]}"


def _image(column: pa.Array, row: int) -> Any:
    """A row of a column, or a ValueError in place of one with more than MAX_IMAGE_VALUES."""
    values = column.slice(row, 1)
    while hasattr(values, "flatten") and not pa.types.is_struct(values.type):
        values = values.flatten()
    if len(values) > MAX_IMAGE_VALUES:
        return ValueError(f"{len(values)} values in a list of pixels; valid: at most {MAX_IMAGE_VALUES}")
    return column[row].as_py()


def column_batches(parquet: pq.ParquetFile, column: str) -> Iterator[pa.Array]:
    """A column of an opened file in batches of rows that fit MAX_BATCH_BYTES even if each has the largest value."""
    largest = 1
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        leaves = [group.column(i) for i in range(group.num_columns)]
        leaves = [leaf for leaf in leaves if f"{leaf.path_in_schema}.".startswith(f"{column}.")]
        num_values = max((leaf.num_values for leaf in leaves), default=0)
        if num_values > MAX_GROUP_VALUES:
            raise ValueError(f"{num_values} values of {column!r} in one row group; valid: at most {MAX_GROUP_VALUES}")
        largest = max(largest, 8 * num_values, sum(leaf.total_uncompressed_size for leaf in leaves))
    num_rows = min(max(MAX_BATCH_BYTES // largest, 1), MAX_BATCH_ROWS)
    for batch in parquet.iter_batches(num_rows, columns=[column]):
        yield batch.column(column)


def distinct_values(name: object, column: str, batches: Iterable[pa.Array | pa.ChunkedArray]) -> list:
    """The values in batches of a column, each of which is one object, however many rows have it; lists of numbers are
    arrays."""
    values: list = []
    known: dict = {}
    for batch in batches:
        if holds_vectors(batch.type):
            values += batch.to_numpy(zero_copy_only=False).tolist() if len(batch) else []
            continue
        if pa.types.is_nested(batch.type):
            raise DataError(
                f"{name}: the column {column!r} holds lists or structures; valid: strings, numbers, booleans, or lists "
                "of numbers"
            )
        values += [known.setdefault(value, value) for value in batch.to_pylist()]
    return values


def holds_vectors(kind: pa.DataType) -> bool:
    """Whether a column has lists of numbers."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


class DatasetRows(Table):
    """A `datasets.Dataset`."""

    def __init__(self, name: str, dataset: datasets.Dataset) -> None:
        self.name = name
        self.features = dataset.features
        self._dataset = dataset.with_format("arrow")
        files = file_fingerprint(Path(file["filename"]) for file in dataset.cache_files)
        self.fingerprint = [name, len(dataset), files]

    def __len__(self) -> int:
        return len(self._dataset)

    def iter_images(self, rows: np.ndarray) -> Iterator[Any]:
        for table in self._dataset.select_columns(self.image_column).select(rows).iter(MAX_BATCH_ROWS):
            column = table[self.image_column].combine_chunks()
            yield from (_image(column, row) for row in range(len(column)))

    def _batches(self, column: str) -> Iterator[pa.ChunkedArray]:
        yield self._dataset.select_columns(column)[:][column]


class ArrowFiles(DatasetRows):
    """Arrow files with equal columns."""

    suffixes = (".arrow",)

    def __init__(self, path: Path, files: list[Path], split: str) -> None:
        parts = []
        for file in table_files(path, files, split):
            with as_data_error(file):
                parts.append(datasets.Dataset.from_file(str(file)))
                parts[-1].data.validate(full=True)  # that offsets lie within their buffers, which arrow does not check
        with as_data_error(path):
            super().__init__(str(path), datasets.concatenate_datasets(parts))


class SavedDataset(DatasetRows):
    """A folder written by `save_to_disk`."""

    def __init__(self, path: Path, files: list[Path], split: str) -> None:
        with as_data_error(path):
            loaded = datasets.load_from_disk(str(path))
            if not isinstance(loaded, datasets.DatasetDict):
                loaded = {str(loaded.split) if str(loaded.split) in SPLITS else None: loaded}
            loaded = choose_split(str(path), {name: [part] for name, part in loaded.items()}, split)[0]
            loaded.data.validate(full=True)  # as above
            super().__init__(str(path), loaded)

    @classmethod
    def accepts(cls, path: Path, files: list[Path]) -> bool:
        return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def open_hub_dataset(name: str, split: str) -> DatasetRows:
    """A data set of the Hugging Face hub, or of its cache on this machine; DataError if it is not available."""
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.CRITICAL)  # it says twice of each of several retries what the error says
    try:
        return DatasetRows(name, datasets.load_dataset(name, split=split))
    except Exception as error:  # `datasets` lets errors of many libraries through
        valid = "noto_emoji, a folder of images, arrays or idx files, .parquet or .arrow files, or a data set's name"
        missing = f"{name!r} is not a file or folder (in {os.getcwd()}), and no data set of the Hugging Face hub"
        reason = f"with split {split!r}: {first_line(error)}"
        raise DataError(f"data.source: {missing} that can be loaded {reason}; valid: {valid}") from error
    finally:
        hub_log.setLevel(level)


def table_files(path: Path, files: list[Path], split: str) -> list[Path]:
    """The parquet or arrow files among those at `path`; of one split, if their names or folders name one."""
    files = [file for file in files if file.suffix in (".parquet", ".arrow")]
    if len({file.suffix for file in files}) > 1:
        raise DataError(f"{path} has .arrow and .parquet files; valid: one kind of them")
    found: dict[str | None, list] = defaultdict(list)
    for file in files:
        # Such as train-00000-of-00002.parquet or train/0000.parquet.
        folders = () if file == path else file.relative_to(path).parts[:-1]
        splits = [*map(split_of_folder, folders), None if file == path else split_of_file(file.stem)]
        found[next(filter(None, splits), None)].append(file)
    return choose_split(str(path), found, split)
