"""Errors for columns and values that do not exist."""

import difflib
from collections.abc import Sequence

from gnunet.errors import DataError


def check_column(key: str, column: str, columns: Sequence[str], name: str) -> None:
    """Raise DataError if the column that a key names is not among those of the source `name`."""
    if column not in columns:
        raise DataError(
            f"{key}: {name} has no column {column!r}{did_you_mean(column, columns)}; valid: {quoted(columns)}"
        )


def quoted(names: Sequence[str | int], limit: int = 20) -> str:
    """A readable list of valid values, cut off after `limit`."""
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def did_you_mean(given: object, valid: Sequence[str | int]) -> str:
    """A hint at the valid value that is spelled most alike; empty if none is close."""
    spelled = {str(value).lower(): value for value in valid}
    close = difflib.get_close_matches(str(given).lower(), spelled, n=1)
    return f" (did you mean {spelled[close[0]]!r}?)" if close else ""
