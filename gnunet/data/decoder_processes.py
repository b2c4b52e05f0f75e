"""Decoding in processes of their own: an image that takes too long or too much memory, or crashes a decoder, ends its
process and becomes an error."""

import ctypes
import multiprocessing
import signal
import sys
import threading
from collections.abc import Sequence
from itertools import takewhile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from gnunet.data import decode
from gnunet.data.decode_pairs import decode_pair

MAX_SECONDS = 30
"""CPU time for one image; the slowest within the limits of decode.py take a few seconds."""
START_SECONDS = 10
"""Time for a process to start."""
MAX_BYTES = 3 * 2**30
"""Memory for one image."""
LARGE_IMAGE_PIXELS = 2**24
"""Images with more pixels are decoded one at a time, so that memory does not grow with the number of cores."""
PR_SET_PDEATHSIG = 1
"""From <sys/prctl.h>."""


class Decoders:
    """Context in which any number of threads, which live as long as it does, decode images, each in a process. On Linux
    only; elsewhere, and where no process can be started, `decode` runs in the calling thread, without limits of time
    and memory.

    `count` processes are started by the thread that enters it, the main thread if possible. A fork in another thread
    frees the main thread's objects in the child, where torch's process groups crash or wait for threads that are not
    there: only what replaces a process that died is forked so.
    """

    def __init__(self, count: int = 0) -> None:
        self._count = count
        # A daemon cannot start processes.
        self._can_start = sys.platform == "linux" and not multiprocessing.current_process().daemon
        self._idle: list[DecoderProcess] = []
        self._start_lock = threading.Lock()
        self._large_image_lock = threading.Lock()

    def __enter__(self) -> "Decoders":
        self._idle = list(takewhile(bool, (self._start() for _ in range(self._count))))
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._idle:
            process.close()

    def decode(self, *image: Any) -> np.ndarray:
        """`decode_image`, whose arguments are `image`; ValueError if it fails, takes longer than MAX_SECONDS or more
        memory than MAX_BYTES."""
        process = self._take_process()
        if process is None:
            return decode_pair(*image)
        try:
            pixels = process.decode(*image, LARGE_IMAGE_PIXELS)
            if pixels is None:
                with self._large_image_lock:
                    pixels = process.decode(*image, decode.MAX_PIXELS)
        except ProcessDied as error:
            process.close()
            raise ValueError(str(error)) from None
        except ValueError:
            self._idle.append(process)
            raise
        self._idle.append(process)
        return pixels

    def _take_process(self) -> "DecoderProcess | None":
        try:
            return self._idle.pop()
        except IndexError:
            return self._start()

    def _start(self) -> "DecoderProcess | None":
        with self._start_lock:  # else one process would keep the pipe of another open
            try:
                return DecoderProcess() if self._can_start else None
            except (OSError, ProcessDied):
                self._can_start = False
                return None


class ProcessDied(Exception):
    """A process that was decoding an image has died."""


class DecoderProcess:
    """A process that decodes one image after another."""

    def __init__(self) -> None:
        fork = multiprocessing.get_context("fork")  # others would import torch, which takes seconds
        self._pipe, theirs = fork.Pipe()
        self._process = fork.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        try:
            has_started = self._pipe.poll(START_SECONDS) and self._pipe.recv()
        except EOFError:
            has_started = False
        if not has_started:
            self.close()
            raise ProcessDied("could not be started")

    def decode(self, *arguments: Any) -> np.ndarray | None:
        """`decode_image`, with max_pixels last; None for a LargeImage. ValueError for any other exception."""
        try:
            self._pipe.send(arguments)
            result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            number = -(self._process.exitcode or 0)
            if number == signal.SIGPROF:
                raise ProcessDied(f"took more than {MAX_SECONDS} s") from None
            raise ProcessDied(f"its decoder was ended by signal {number}") from None
        if isinstance(result, str):
            raise ValueError(result)
        return result

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection) -> None:
    """Decode what is sent, until the thread that started this process ends."""
    import resource  # Windows has none

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = [limit for limit in (soft, hard, used + MAX_BYTES) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(allowed), hard))
    pipe.send(True)
    while True:
        arguments: Sequence[Any] = pipe.recv()
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        pipe.send(_decode(arguments))
        signal.setitimer(signal.ITIMER_PROF, 0)


def _decode(arguments: Sequence[Any]) -> np.ndarray | str | None:
    try:
        return decode_pair(*arguments[:-1], max_pixels=arguments[-1])
    except decode.LargeImage:
        return None
    except MemoryError as error:
        return str(error) or f"takes more than {MAX_BYTES} bytes of memory"
    except Exception as error:
        return str(error) or type(error).__name__
