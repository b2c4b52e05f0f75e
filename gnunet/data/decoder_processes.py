"""Decoding in processes of their own: an image that takes too long or too much memory, or crashes a decoder, ends its
process and becomes an error."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

from gnunet.data import decode
from gnunet.data.decode import decode_cells
from gnunet.errors import DataError

MAX_SECONDS = 30
"""CPU time for one image; the slowest within the limits of decode.py take a few seconds."""
MAX_BYTES = 3 * 2**30
"""Memory for one image."""
LARGE_IMAGE_PIXELS = 2**24
"""Images with more pixels are decoded one at a time, so that memory does not grow with the number of cores."""
PR_SET_PDEATHSIG = 1
"""From <sys/prctl.h>."""


class Decoders:
    """Context in which up to `count` threads decode images, each in a process. On Linux only; elsewhere, and in a
    daemonic process, `decode` runs in the calling thread, without limits of time and memory.

    The processes are started by the thread that enters it, the main thread if possible: a fork in another thread frees
    the main thread's objects in the child, where torch's process groups crash or wait for threads that are not there.

    Raises:
        DataError: on entering, if a process cannot be started.
    """

    def __init__(self, count: int) -> None:
        can_start = sys.platform == "linux" and not multiprocessing.current_process().daemon
        self._count = count if can_start else 0
        self._processes: list[DecoderProcess] = []
        self._idle: SimpleQueue[DecoderProcess] = SimpleQueue()
        self._large_image_lock = threading.Lock()

    def __enter__(self) -> "Decoders":
        try:
            for _ in range(self._count):
                self._processes.append(DecoderProcess())
                self._idle.put(self._processes[-1])
        except OSError as error:
            self.__exit__()
            raise DataError(f"no process to decode images in can be started: {error}") from error
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.close()

    def decode(self, *image: Any) -> Any:
        """`decode_cells`, whose arguments are `image`.

        Raises:
            ValueError: if it fails, takes longer than MAX_SECONDS or more memory than MAX_BYTES.
            DataError: if no process can decode any image.
        """
        if not self._processes:
            return decode_cells(*image)
        process = self._idle.get()
        try:
            if (decoded := process.decode(*image, LARGE_IMAGE_PIXELS)) is not None:
                return decoded
            with self._large_image_lock:
                return process.decode(*image, decode.MAX_PIXELS)
        finally:
            self._idle.put(process)


class DecoderProcess:
    """A process that has one image after another decoded by a process of its own, which it replaces if it dies."""

    def __init__(self) -> None:
        fork = multiprocessing.get_context("fork")  # others would import torch, which takes seconds
        self._pipe, theirs = fork.Pipe()
        self._process = fork.Process(target=_supervise, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def decode(self, *arguments: Any) -> Any:
        """`decode_cells`, with max_pixels last; None for a LargeImage. ValueError for any other exception."""
        try:
            self._pipe.send(arguments)
            result = self._pipe.recv()
        except (EOFError, OSError):
            raise DataError("a process that images are decoded in has ended; run the same command again") from None
        if isinstance(result, str):
            raise ValueError(result)
        return result

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _supervise(pipe: Connection) -> None:
    """Pass what is sent to a process that decodes it, and its answer back, or what ended it."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    pid = None
    while True:
        image = pipe.recv_bytes()
        if pid is None:
            inner, theirs = multiprocessing.Pipe()
            pid = os.fork()
            if pid == 0:
                pipe.close()
                inner.close()
                _serve(theirs)
            theirs.close()
        try:
            inner.send_bytes(image)
            pipe.send_bytes(inner.recv_bytes())
        except (EOFError, OSError):
            pipe.send(_reason(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
            pid = None


def _reason(exit_code: int) -> str:
    if exit_code == -signal.SIGPROF:
        return f"took more than {MAX_SECONDS} s"
    return f"its decoder was ended by signal {-exit_code}" if exit_code < 0 else "its decoder failed"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(pipe: Connection) -> NoReturn:
    """Decode what is sent."""
    import resource  # Windows has none

    _die_with_parent()
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        allowed = [limit for limit in (soft, hard, used + MAX_BYTES) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(allowed), hard))
        while True:
            arguments: Sequence[Any] = pipe.recv()
            signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
            pipe.send(_decode(arguments))
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        os._exit(1)


def _decode(arguments: Sequence[Any]) -> Any:
    try:
        return decode_cells(*arguments[:-1], max_pixels=arguments[-1])
    except decode.LargeImage:
        return None
    except MemoryError as error:
        return str(error) or f"takes more than {MAX_BYTES} bytes of memory"
    except Exception as error:
        return str(error) or type(error).__name__
