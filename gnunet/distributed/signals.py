"""Signals during training: the first asks for a checkpoint, a second one ends the process at once."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import torch
from accelerate import Accelerator

from gnunet.distributed.launch import LAUNCHER_VARIABLES

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows has the first two
"""Ctrl-C, `kill` and launchers, a terminal that closes, and schedulers' warnings of the time limit."""
REPEAT_SECONDS = 3.0
"""Launchers pass signals on to processes that have already received them: equal signals this close are one."""
REPEAT_KEY_SECONDS = 0.3  # the same for Ctrl-C, which people press twice


class StopRequested(Exception):
    """A rank received one of SIGNALS; raised on every rank at the same place."""


class StopSignal:
    """Context in which the first of SIGNALS only sets `signum`, for the training loop to read. True once it is set.

    The same one again, or Ctrl-C, kills the process; others do not, since schedulers send several. `say` is called with
    what will happen, in the signal handler.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.signum: int | None = None
        self._say, self._received_at = say, 0.0

    def __bool__(self) -> bool:
        return self.signum is not None

    def check(self, accelerator: Accelerator) -> None:
        """Raise StopRequested if any rank has received a signal. All ranks must call this equally often."""
        received = torch.tensor([float(bool(self))], device=accelerator.device)
        if accelerator.gather(received).any():
            raise StopRequested

    def __enter__(self) -> "StopSignal":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in SIGNALS:
                # Under nohup SIGHUP stays ignored, and a program's own handlers of these stay.
                if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) == signal.SIG_DFL:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        is_key, now = signum == signal.SIGINT, time.monotonic()
        if self.signum is None:
            self.signum, self._received_at = signum, now
            text = "stopping after this step, saving"
            if not is_key:
                text = f"{signal.Signals(signum).name}: {text}"
            elif not any(name in os.environ for name in LAUNCHER_VARIABLES):  # which pass on only one
                text += "; press Ctrl-C again to stop without saving"
            self._say(text)
            return
        apart = REPEAT_KEY_SECONDS if is_key else REPEAT_SECONDS
        if (is_key or signum == self.signum) and now - self._received_at > apart:
            self._say("stopping without saving; the same command resumes from the newest checkpoint")
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
