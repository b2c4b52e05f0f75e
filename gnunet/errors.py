"""Errors whose text is meant for the user.

Command-line programs print them without a traceback and exit with status 2; everything else is a bug and
keeps its traceback.
"""

import os
import sys
from collections.abc import Callable, Sequence


class GnunetError(Exception):
    """Base of every error that the user can mend; the message says what was given and what is valid."""


class ConfigError(GnunetError):
    """A key, a value or a combination of values in the configuration is not valid."""


class DataError(GnunetError):
    """A data source cannot be found, opened or decoded."""


class CheckpointError(GnunetError):
    """A run folder or a checkpoint is torn, foreign, or belongs to another configuration."""


class TrainingError(GnunetError):
    """Training cannot go on."""


class DivergenceError(TrainingError):
    """Too many steps in a row had a non-finite loss or gradient."""

    def __init__(self, message: str, *, images: int, nonfinite: int) -> None:
        super().__init__(message)
        self.images = images
        """Images seen, those of the last step included."""
        self.nonfinite = nonfinite
        """Steps skipped in all."""


def truncate(value: object, length: int = 100) -> str:
    """`str(value)`, cut to `length` characters."""
    text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def first_few(names: Sequence[object], count: int = 3) -> str:
    """The first `count` names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(truncate, names[:count])) + more


def run_cli(program: Callable[[], int | None]) -> int:
    """Run the work of a command-line program.

    Returns:
        Its exit status: what `program` returns (None is 0), 2 after an error of the user's, 130 after Ctrl-C.
    """
    try:
        return program() or 0
    except GnunetError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:  # outside a run, which has its own handling of signals
        return 130


def print_error(error: GnunetError) -> None:
    """Print an error to stderr; processes other than a machine's first say which they are."""
    rank = os.environ.get("RANK", "0")
    where = "" if os.environ.get("LOCAL_RANK", "0") == "0" else f"[rank {rank}] "
    print(f"{where}error: {error}", file=sys.stderr)
