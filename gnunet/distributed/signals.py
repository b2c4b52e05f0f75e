"""Stopping a run by SIGINT or SIGTERM without losing work."""

import signal
import time
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

REPEAT_SECONDS = 3.0
"""Launchers pass a terminal's signal on to processes that already had it; repeats this soon are one request."""


class StopRequested(Exception):
    """Some process was asked to stop; raised on every process at the same place."""


class StopSignal:
    """Context in which the first SIGINT or SIGTERM is noted for the training loop, and a second one kills.

    `signum` is None, and the object false, until a stop has been asked for.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._when = 0.0

    def __bool__(self) -> bool:
        return self.signum is not None

    def check(self, accelerator: Accelerator) -> None:
        """Raise StopRequested if some process was asked to stop; all processes must call this equally often."""
        asked = torch.tensor([float(bool(self))], device=accelerator.device)
        if accelerator.gather(asked).any():
            raise StopRequested

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._when = signum, time.monotonic()
        elif time.monotonic() - self._when > REPEAT_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
