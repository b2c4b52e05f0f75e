"""Which rows of a source are used, and their labels."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gnunet.data.sources import Source
from gnunet.errors import DataError, did_you_mean, quoted, truncate


def select_rows(source: Source, subset: Mapping[str, Any]) -> np.ndarray:
    """The rows that match `subset`, ascending int64.

    It maps columns to the value, or the list of values, that a row may have there; class labels by name.
    """
    keep = np.ones(len(source), bool)
    for column, allowed in subset.items():
        values = source.values(column)
        occurring = _distinct(values)
        allowed = allowed if isinstance(allowed, (list, tuple)) else [allowed]
        for value in allowed:
            if value not in occurring:
                raise DataError(
                    f"data.subset.{column}: {value!r} does not occur{did_you_mean(value, occurring)}; "
                    f"valid: {quoted(occurring)}"
                )
        keep &= np.fromiter((value in allowed for value in values), bool, len(values))
    if not keep.any():
        raise DataError(f"{source.name} has no rows" + (f" that match data.subset {dict(subset)}" if subset else ""))
    return np.flatnonzero(keep)


def read_labels(
    source: Source, rows: np.ndarray, shape: Sequence[int] | None = None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The labels of the given rows, int64 (len(rows),), and the names of the classes; (None, ()) without labels. With a
    shape, that of each label: float64 (len(rows), *shape), and no names.

    Classes are the labels that occur in these rows, in the order of the source's class names if it has them,
    otherwise sorted. DataError if a row has no label, or one of another type than a string, integer or boolean, or
    with a shape than finite numbers.
    """
    values, order = source.labels(), source.class_names
    if values is None:
        return None, ()
    labels = [values[row] for row in rows]
    for row, label in zip(rows, labels, strict=True):
        if not isinstance(label, (str, int)) if shape is None else not _is_numeric(label, shape):
            found = "no label" if label is None else f"a {type(label).__name__}"
            valid = f"strings, integers or booleans, or numbers with model.class_embed_type; {source.label_advice}"
            if shape is not None:
                found = f"{len(label)} values" if isinstance(label, (list, np.ndarray)) else f"{truncate(label)!r}"
                numbers = f"lists of {shape[0]} finite numbers" if shape else "finite numbers"
                valid = f"{numbers} with this model.class_embed_type"
            raise DataError(
                f"{source.describe_row(int(row))} has {found} in the column {source.label_column!r}; valid: {valid}"
            )
    if shape is not None:
        return np.array(labels, np.float64), ()
    occurring = set(labels)
    classes = [name for name in order if name in occurring] if order else _distinct(labels)
    number = {label: i for i, label in enumerate(classes)}
    names = tuple(str(label).lower() if isinstance(label, bool) else str(label) for label in classes)
    return np.array([number[label] for label in labels], np.int64), names


def _is_numeric(label: Any, shape: Sequence[int]) -> bool:
    try:
        found = np.asarray(label)
    except ValueError:  # lists of several lengths
        return False
    return found.dtype.kind in "biuf" and found.shape == tuple(shape) and bool(np.isfinite(found).all())


def _distinct(values: Iterable[Any]) -> list:
    """The strings and integers that occur, sorted, strings first."""
    found = {value for value in values if isinstance(value, (str, int))}
    return sorted(found, key=lambda value: (not isinstance(value, str), value))
