"""Atomic files and directories: written under a temporary name, flushed to disk, then renamed into place."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def packaged(name: str) -> Path:
    """The path of what is in the package once installed, and at the repository's root in a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).exists() else package.parent / name


def fsync_path(path: Path) -> None:
    """Flush a file's or directory's contents to disk; not on Windows, where that needs a handle for writing."""
    if os.name == "nt":
        return
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
def atomic_directory(path: Path, *, keep_others: bool = False) -> Iterator[Path]:
    """Yield a temporary directory to fill, which then replaces `path`; removed if the body raises.

    Its files get the permissions that the umask gives. With `keep_others`, files of `path` stay, also in
    subdirectories, if the new directory has none of their name.

    Raises:
        OSError: `path`, or with `keep_others` an entry of it, is a file in place of a directory or the reverse.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for entry in temporary.rglob("*"):
            if not entry.is_symlink() and entry.is_file() and entry.stat().st_mode & 0o777 != mode:
                entry.chmod(mode)  # safetensors creates files for their owner alone
        if keep_others and path.is_dir():
            link_missing(path, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for entry in temporary.rglob("*"):
        if not entry.is_symlink() and (entry.is_file() or entry.is_dir()):
            fsync_path(entry)
    fsync_path(temporary)
    replaced = path.with_name(f".{path.name}.removed")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        os.replace(path, replaced)
    os.replace(temporary, path)
    fsync_path(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def link_missing(old: Path, new: Path) -> None:
    """Link in `new` what only `old` has."""
    for entry in os.scandir(old):
        target = new / entry.name
        if entry.is_dir(follow_symlinks=False):
            target.mkdir(exist_ok=True)
            link_missing(Path(entry.path), target)
        elif target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), entry.path)
        elif not os.path.lexists(target):
            try:
                os.link(entry.path, target, follow_symlinks=False)
            except (OSError, NotImplementedError):  # not on this file system, or another user's
                shutil.copy2(entry.path, target, follow_symlinks=False)
