"""Tables about a folder's images: metadata.csv, .jsonl or .parquet (ImageFolder of `datasets`), dataset.json (EDM)."""

import json
import posixpath
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from gnunet.data.sources.tables import column_batches, distinct_values, holds_vectors
from gnunet.errors import DataError, as_data_error, did_you_mean, quoted, truncate

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "dataset.json")
MAX_METADATA_BYTES = 2**27
"""Largest file, a hundred bytes for each image of ImageNet, and most values in one. JSON takes 20 times the memory."""
_FILE_NAME = "file_name"


def read_metadata(contents: Mapping[Path, bytes], images: Collection[Path]) -> dict[str, list]:
    """The columns of tables, one below the other: None, strings, numbers, booleans, lists or paths of images.

    A table's `file_name` is an image's path relative to its folder, and becomes the column `image`; `mask_file_name`
    becomes `mask`, and so on. The first column of images, which comes first, has another image in each row.

    Raises:
        DataError: a table cannot be read, or a row names no image, one that is not in `images`, or that of another row.
    """
    columns: dict[str, list] = {}
    seen: set[Path] = set()
    key, num_rows = "", 0
    for file, content in contents.items():
        with as_data_error(file):
            table = _read_table(file, content, images)
        if not table:
            continue
        named = [name for name in table if name == _FILE_NAME or name.endswith(f"_{_FILE_NAME}")]
        key = key or (named[0] if named and _FILE_NAME not in named else _FILE_NAME)
        if key not in table:
            raise DataError(f"{file}: no column {key!r}{did_you_mean(key, [*table])}, but {quoted([*table])}")
        for name in dict.fromkeys([key, *table]):
            values, column = table[name], name
            if name in named:
                column = name.removesuffix(_FILE_NAME).removesuffix("_") or "image"
                values = _find_images(file, name, values, images, seen if name == key else None)
            columns.setdefault(column, [None] * num_rows).extend(values)
        num_rows += len(table[key])
        for values in columns.values():
            values += [None] * (num_rows - len(values))
    return columns


def _find_images(file: Path, name: str, values: list, images: Collection[Path], seen: set | None) -> list:
    """The images, or None, in a table's column; with `seen`, to which they are added, each row must have another."""
    found = []
    for row, value in enumerate(values, {".csv": 2, ".jsonl": 1}.get(file.suffix, 0)):  # as a text file's lines
        image = file.parent / posixpath.normpath(str(value or "").replace("\\", "/"))
        problem = "is in another row too" if seen and image in seen else "is not an image" * (image not in images)
        if problem and (value or seen is not None):
            valid = f"valid: paths of images below {file.parent}, relative to it"
            raise DataError(f"{file} row {row}, column {name!r}: {truncate(value)} {problem}; {valid}")
        found.append(image if value else None)
        if seen is not None:
            seen.add(image)
    return found


def _read_table(file: Path, content: bytes, images: Collection[Path]) -> dict[str, list]:
    """The columns of a table with a row for each image, at most; {} for a dataset.json of another kind than EDM's."""
    values: Callable[[str], list]
    if file.suffix == ".csv":
        # In one block, since the first decides the types of columns.
        options = pa.csv.ReadOptions(block_size=len(content) + 1), pa.csv.ParseOptions(newlines_in_values=True)
        cells = pa.csv.read_csv(pa.BufferReader(content), *options)
        if any(map(pa.types.is_binary, cells.schema.types)):
            raise ValueError("it is not encoded as UTF-8")
        names, num_rows, values = cells.column_names, cells.num_rows, lambda name: cells[name].to_pylist()
    elif file.suffix == ".parquet":
        parquet = pq.ParquetFile(pa.BufferReader(content))
        schema = parquet.schema_arrow
        names = [each.name for each in schema if holds_vectors(each.type) or not pa.types.is_nested(each.type)]
        num_rows = parquet.metadata.num_rows
        values = lambda name: distinct_values(file, name, column_batches(parquet, name))  # noqa: E731
    else:
        # Not by pyarrow, which makes an array over all rows of each key, however few rows have it.
        rows = _json_lines(content) if file.suffix == ".jsonl" else _edm_rows(content, file.parent, images)
        if not rows and file.suffix == ".json":
            return {}
        names, num_rows = list(dict.fromkeys(key for row in rows for key in row)), len(rows)
        values = lambda name: [row.get(name) for row in rows]  # noqa: E731
    if not 0 < num_rows * len(names) <= MAX_METADATA_BYTES or num_rows > len(images) or len({*names}) < len(names):
        raise ValueError(f"{num_rows} rows of {quoted(names)}; valid: at most {len(images)}, and each column once")
    kinds = (int, float, list, np.ndarray, type(None))
    return {name: [v if isinstance(v, kinds) else str(v) or None for v in values(name)] for name in names}


def _json_lines(content: bytes) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(content.rstrip().split(b"\n"), 1):
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"row {number} is not a JSON object: {error}") from None
    return rows


def _edm_rows(content: bytes, folder: Path, images: Collection[Path]) -> list[dict[str, Any]]:
    """Rows from the `labels` of a dataset.json, which may be null: then folders are not classes."""
    found = json.loads(content)
    labels = found.get("labels", ()) if isinstance(found, dict) else ()
    if labels is None:
        labels = [[str(image.relative_to(folder)), None] for image in images if folder in image.parents]
    for row, pair in enumerate(labels := labels if isinstance(labels, list) else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"row {row} is {truncate(pair)}; valid: [file name, label]")
    return [{_FILE_NAME: name, "label": label} for name, label in labels]
