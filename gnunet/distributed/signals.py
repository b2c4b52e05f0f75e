"""SIGINT and SIGTERM during training."""

import signal
import time
from types import FrameType

import torch
from accelerate import Accelerator

REPEAT_SECONDS = 3.0
"""Launchers pass a terminal's signal on to processes that have already received it: signals this close are one."""


class StopRequested(Exception):
    """A rank received SIGINT or SIGTERM; raised on every rank at the same place."""


class StopSignal:
    """Context in which the first SIGINT or SIGTERM only sets `signum`, for the training loop to read, and a second
    one kills the process. True once a signal has been received."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._received_at = 0.0

    def __bool__(self) -> bool:
        return self.signum is not None

    def check(self, accelerator: Accelerator) -> None:
        """Raise StopRequested if any rank has received a signal. All ranks must call this equally often."""
        received = torch.tensor([float(bool(self))], device=accelerator.device)
        if accelerator.gather(received).any():
            raise StopRequested

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._received_at = signum, time.monotonic()
        elif time.monotonic() - self._received_at > REPEAT_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
