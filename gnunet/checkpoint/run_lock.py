"""One trainer at a time in a run's folder."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from gnunet.errors import ConfigError


class RunLock:
    """A lock on a folder that dies with the process that has it, however it dies.

    It is a POSIX record lock on the file `.lock`: the kernel lets go of it when the process ends, NFS (from version 3
    with lockd) hands it over between machines, and children do not inherit it, so that a loader process which
    outlives its trainer for a moment keeps nobody out. Within one process it excludes nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._file: int | None = None

    def acquire(self) -> None:
        """Take the lock; the folder must exist. Does nothing where this object has it.

        Raises:
            ConfigError: another process has it, by host and process number where that is known; or the file system
                has no locks.
        """
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The owner before may have removed the file between our opening and locking it.
                if _is_same_file(file, self.path):
                    os.ftruncate(file, 0)
                    os.write(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
                    self._file = file
            except OSError as error:
                raise self._refusal(file, error) from None
            finally:
                if self._file is None:
                    os.close(file)

    def release(self) -> None:
        """Let go of the lock and remove its file."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _refusal(self, file: int, error: OSError) -> ConfigError:
        folder = self.path.parent
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return ConfigError(f"run_dir: {folder} cannot be locked: {error.strerror}; valid: a file system with locks")
        return ConfigError(f"run_dir: {folder} is in use by {_owner(file)}; wait for it, or choose another run_dir")


def _is_same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(file: int) -> str:
    """Who wrote the lock's file; it may be about to."""
    for _ in range(10):
        try:
            owner = json.loads(os.pread(file, 1000, 0))
            return f"process {owner['pid']} on {owner['host']}"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.05)
    return "another process"
