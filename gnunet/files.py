"""Files and folders that are whole or absent: written beside, flushed to disk, then renamed into place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Flush a file's or a folder's contents to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` at once: a reader sees the old file or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    fsync_path(temporary)
    os.replace(temporary, path)
    fsync_path(path.parent)


def atomic_rmtree(path: Path) -> None:
    """Remove a folder so that a crash midway leaves no half folder under its name."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `path`, replacing what is there, once it is whole."""
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
    old = path.with_name(f".{path.name}.removed")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)
