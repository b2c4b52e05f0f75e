"""Which columns hold images and labels, which rows are wanted, and what the classes are."""

import difflib
from collections.abc import Sequence

import numpy as np

from gnunet.data.sources.base import Source, quoted
from gnunet.errors import DataError

IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "pixel_values", "png", "jpg", "jpeg", "webp")
LABEL_COLUMNS = (
    "label", "labels", "fine_label", "class", "class_label", "class_id", "target", "cls", "category",
)  # fmt: skip


def find_image_column(source: Source, wanted: str | None) -> str:
    """The wanted column, or the one that by name or type holds images.

    Raises:
        DataError: there is no such column, listing those there are.
    """
    if wanted is not None:
        return _check_column(source, wanted, "data.image_column")
    if found := _by_name(source.columns, IMAGE_COLUMNS):
        return found
    if len(source.image_columns) == 1:
        return source.image_columns[0]
    raise DataError(
        f"{source.name} has no column that is known to hold images; set data.image_column to one of "
        f"{quoted(source.columns)}"
    )


def find_label_column(source: Source, wanted: str | None) -> str | None:
    """The wanted column, or the one that by name or type holds class labels; None where there is none.

    Raises:
        DataError: the wanted column is not there, listing those there are.
    """
    if wanted is not None:
        return _check_column(source, wanted, "data.label_column")
    if found := _by_name(source.columns, LABEL_COLUMNS):
        return found
    typed = [name for name in source.columns if source.classes(name) is not None]
    return typed[0] if len(typed) == 1 else None


def select_rows(source: Source, subset: dict) -> np.ndarray:
    """The rows whose columns have one of the given values each, ascending int64.

    Args:
        subset: {column: value or list of values}; class labels by name.

    Raises:
        DataError: an unknown column, a value that never occurs, or no row left.
    """
    keep = np.ones(len(source), bool)
    for column, wanted in subset.items():
        _check_column(source, column, "data.subset")
        values = source.values(column)
        there = _distinct(values)
        wanted = wanted if isinstance(wanted, (list, tuple)) else [wanted]
        for value in wanted:
            if value not in there:
                raise DataError(
                    f"data.subset.{column} asks for {value!r}, which never occurs"
                    f"{_did_you_mean(value, there)}; there are {quoted(there)}"
                )
        keep &= np.fromiter((value in wanted for value in values), bool, len(values))
    if not keep.any():
        raise DataError(f"{source.name} has no row" + (f" that fits data.subset {subset}" if subset else ""))
    return np.flatnonzero(keep)


def read_labels(source: Source, column: str, rows: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels of the given rows and the names of the classes.

    Classes are the values that occur in these rows: in the order of the column's class names where it has
    them, else sorted (numbers by size, words by spelling, false before true).

    Returns:
        (int64 (len(rows),), class names)

    Raises:
        DataError: rows without a label, or a column that does not hold words, whole numbers or booleans.
    """
    values = source.values(column)
    chosen = [values[row] for row in rows]
    for row, value in zip(rows, chosen, strict=True):
        if not isinstance(value, (str, int)):
            what = "no label" if value is None else f"a {type(value).__name__}"
            raise DataError(
                f"{source.where(int(row))} has {what} in the column {column!r}; labels must be words, whole "
                f"numbers or booleans. Set data.label_column to one of {quoted(source.columns)}"
            )
    order = source.classes(column)
    occurring = set(chosen)
    classes = [name for name in order if name in occurring] if order else _distinct(chosen)
    number = {value: i for i, value in enumerate(classes)}
    names = tuple(str(value).lower() if isinstance(value, bool) else str(value) for value in classes)
    return np.array([number[value] for value in chosen], np.int64), names


def _by_name(columns: Sequence[str], known: Sequence[str]) -> str | None:
    spelled = {column.lower(): column for column in reversed(columns)}
    return next((spelled[name] for name in known if name in spelled), None)


def _check_column(source: Source, column: str, key: str) -> str:
    if column not in source.columns:
        raise DataError(
            f"{key} names the column {column!r}, which {source.name} does not have"
            f"{_did_you_mean(column, source.columns)}; it has {quoted(source.columns)}"
        )
    return column


def _distinct(values: Sequence) -> list:
    """The values that occur, sorted; words before numbers. Nothing but words and whole numbers is listed."""
    known = {value for value in values if isinstance(value, (str, int))}
    return sorted(known, key=lambda value: (not isinstance(value, str), value))


def _did_you_mean(given: object, valid: Sequence) -> str:
    words = {str(value).lower(): value for value in valid}
    close = difflib.get_close_matches(str(given).lower(), words, n=1)
    return f" (did you mean {words[close[0]]!r}?)" if close else ""
