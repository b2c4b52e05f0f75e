"""Atomic files and directories: written under a temporary name, flushed to disk, then renamed into place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Flush a file's or directory's contents to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: Path, content: str | bytes, *, fsync: bool = True) -> None:
    """Write `content` to `path`: a reader sees the old file or the new one, never a partially written one.

    Without `fsync`, for many small files, this holds if the process dies but not if the machine does.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    if fsync:
        fsync_path(temporary)
    os.replace(temporary, path)
    if fsync:
        fsync_path(path.parent)


def atomic_rmtree(path: Path) -> None:
    """Remove a directory; a crash midway leaves nothing under its name."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory to fill, which then replaces `path`; removed if the body raises."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for entry in temporary.rglob("*"):
        fsync_path(entry)
    fsync_path(temporary)
    replaced = path.with_name(f".{path.name}.removed")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        os.replace(path, replaced)
    os.replace(temporary, path)
    fsync_path(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)
