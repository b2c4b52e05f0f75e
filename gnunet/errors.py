"""Errors whose text is meant for the user, and how command-line programs report them. Any other exception is a bug."""

import difflib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Error numbers of a disk that is full or broken."""


class GnunetError(Exception):
    """Base of all errors that the user can fix; the message says what was given and what is valid."""


class ConfigError(GnunetError):
    """A key, a value or a combination of values in the configuration is not valid."""


class DataError(GnunetError):
    """A data source cannot be found, opened or decoded."""


class CheckpointError(GnunetError):
    """A run directory or checkpoint is damaged, untrusted, or belongs to another configuration."""


class TrainingError(GnunetError):
    """Training cannot continue."""


class DivergenceError(TrainingError):
    """Too many consecutive steps had a non-finite loss or gradient."""

    def __init__(self, message: str, *, images: int, nonfinite: int) -> None:
        super().__init__(message)
        self.images = images  # seen, including those of the last step
        self.nonfinite = nonfinite  # steps skipped since the run began


def truncate(value: object, length: int = 100) -> str:
    """`str(value)`, cut to `length` characters."""
    text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def first_line(error: BaseException) -> str:
    """What an exception of another library says, or is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:1000]


def first_few(names: Sequence[object], count: int = 3) -> str:
    """The first `count` names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(truncate, names[:count])) + more


def quoted(names: Sequence[str | int], limit: int = 20) -> str:
    """A readable list of valid values, cut off after `limit`."""
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def did_you_mean(given: object, valid: Sequence[str | int]) -> str:
    """A hint at the valid value that is spelled most alike; empty if none is close."""
    spelled = {str(value).lower(): value for value in valid}
    close = difflib.get_close_matches(str(given).lower(), spelled, n=1)
    return f" (did you mean {spelled[close[0]]!r}?)" if close else ""


@contextmanager
def as_data_error(name: object) -> Iterator[None]:
    """Turn what decoders, arrow and `datasets` raise, exceptions of any kind, into a DataError with the file's name."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name} cannot be read: {first_line(error)}") from error


def expand(path: str | Path) -> Path:
    """The path with a user's home in place of `~`; ConfigError if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: no such user; valid: ~ or ~USER at the start, or ./~ for a file") from None


def may_be_on_hub(name: str) -> bool:
    """Whether a name that is no path is OWNER/NAME of a model on the Hugging Face hub, not a misspelled path."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name).parent.is_dir()


def did_you_mean_path(path: Path) -> str:
    """A hint at the file or folder that is spelled most alike, or is runs/`path`; empty if there is none."""
    if (run := Path("runs") / path).exists():
        return f" (did you mean {run}?)"
    while not path.parent.is_dir() and path.parent != path:
        path = path.parent
    try:
        close = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    except OSError:
        close = []
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


class Output:
    """Standard output that may go away, with its terminal or with the reader of a pipe: then nothing is shown."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> None:
        self._attempt(lambda: self._file.write(text))

    def flush(self) -> None:
        self._attempt(self._file.flush)

    def _attempt(self, function: Callable[[], object]) -> None:
        try:
            function()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())  # else the interpreter fails at its exit


@contextmanager
def tolerate_closed_stdout() -> Iterator[None]:
    """Context in which what is printed is lost once nobody reads it, as after `gnunet train --help | head`."""
    output = Output(sys.stdout or io.StringIO())  # None after `>&-`
    with redirect_stdout(output):  # type: ignore[type-var]
        try:
            yield
        finally:
            output.flush()


def run_cli(program: Callable[[], int | None]) -> int:
    """The exit status of a program's main function: its result (0 for None), 2 on GnunetError and where a disk is full
    or broken, or 130 on Ctrl-C. Errors are printed with the rank unless it is the first on its machine."""
    try:
        return program() or 0
    except GnunetError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        message = f"{error.filename or 'a file'} cannot be written: {error.strerror}"
    except KeyboardInterrupt:  # outside of training, which handles signals itself
        return 130
    prefix = "" if os.environ.get("LOCAL_RANK", "0") == "0" else f"[rank {os.environ.get('RANK', '0')}] "
    print(f"{prefix}error: {message}", file=sys.stderr)
    return 2
