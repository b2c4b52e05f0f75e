"""A training step as CUDA graphs: the functions it is made of are called, then captured, and from then on replayed
without Python (train.cuda_graph)."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from gnunet.config import Config
from gnunet.config.checks import cuda_graph_obstacle
from gnunet.distributed import fsdp
from gnunet.errors import ConfigError

logger = logging.getLogger(__name__)

DEVICES = ("cuda",)
WARM_UP = 3
"""Steps that are called before one is captured, as torch's documentation has it: libraries choose their algorithms,
kernels are compiled, and the optimizer makes its state."""


def is_wanted(config: Config, accelerator: Accelerator) -> bool:
    """Whether the steps of a run are to be replayed as CUDA graphs.

    Raises:
        ConfigError: train.cuda_graph is true where they cannot be.
    """
    asked = config.train.cuda_graph
    obstacle = _obstacle(config, accelerator)
    if asked is True and obstacle is not None:
        raise ConfigError(f"train.cuda_graph: given true {obstacle}; valid: auto or false")
    return asked is not False and obstacle is None


def _obstacle(config: Config, accelerator: Accelerator) -> str | None:
    if accelerator.device.type not in DEVICES:
        return f"on a device of type {accelerator.device.type}"
    if fsdp.is_requested() and torch.distributed.is_initialized():
        return "with FSDP"
    norm = config.model.norm
    kinds = {norm.kind, *(keys.get("kind") for keys in norm.overrides.values())}
    if "sync_batch" in kinds and accelerator.num_processes > 1:  # a collective in the forward pass
        return f"with sync_batch norms over {accelerator.num_processes} processes"
    setting = cuda_graph_obstacle(config)
    return setting and f"with {setting}"


def capture(function: Callable[[], Any], *, pool: Any, stream: torch.cuda.Stream) -> Callable[[], Any]:
    """Capture what a function launches, without running it; gives a function that runs it and returns its tensors."""
    graph = torch.cuda.CUDAGraph()
    # "thread_local", since the loader's thread allocates pinned memory meanwhile, and NCCL's looks at events.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = function()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def send(tensor: Tensor) -> Callable[[], list[float]]:
    """Begin to copy a tensor to the host; gives a function that waits for its values."""
    copy = tensor.to("cpu", non_blocking=True, copy=True)  # into pinned memory
    if tensor.device.type != "cuda":
        return copy.tolist
    arrived = torch.cuda.Event()
    arrived.record()

    def values() -> list[float]:
        arrived.synchronize()
        return copy.tolist()

    return values


class Graphs:
    """Runs the functions of a training step, and replays them once they are captured.

    All of them share a memory pool, so that every step must run the same ones in the same order. The values that they
    depend on are their tensors and what lies on the device: random numbers are drawn by the seed at the time of a
    replay. If a capture fails on any process, all go on by calls, which compute the same.

    Args:
        must_capture: raise where a capture fails.
    """

    def __init__(self, accelerator: Accelerator, *, must_capture: bool) -> None:
        self.accelerator, self.must_capture = accelerator, must_capture
        self.steps = 0
        self.failure: str | None = None
        self._inputs: dict[str, list[Tensor]] = {}
        self._replays: dict[str, Callable[[], Any]] = {}
        on_gpu = accelerator.device.type == "cuda"
        self._stream = torch.cuda.Stream(accelerator.device) if on_gpu else None
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None

    def run(self, name: str, function: Callable[..., Any], *given: Tensor) -> Any:
        """`function(*given)`. What it returns is overwritten when this name is next run.

        Args:
            name: of the function, which has it in every step.
            given: of the same shapes and types at every call.
        """
        inputs = self._inputs.setdefault(name, [torch.empty_like(tensor) for tensor in given])
        for static, tensor in zip(inputs, given, strict=True):
            static.copy_(tensor, non_blocking=True)
        call = partial(function, *inputs)
        if self.failure is None and self.steps == WARM_UP and name not in self._replays:
            try:
                with self._aside():
                    self._replays[name] = capture(call, pool=self._pool, stream=self._stream)
            except RuntimeError as error:
                self.failure = str(error).partition("\n")[0]
        if name in self._replays:
            return self._replays[name]()
        if self.steps >= WARM_UP:
            return call()
        with self._aside():
            return call()

    def captured(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """A function that does on the device what another does, replayed if that can be captured."""
        try:
            for work in (function, partial(capture, function, pool=None, stream=self._stream)):
                with self._aside():
                    result = work()
        except RuntimeError:
            return function
        return result

    def end_step(self) -> None:
        """To be called by every process at the end of a step, the one that captures included.

        Raises:
            ConfigError: a capture has failed that must not.
        """
        if self.steps == WARM_UP:
            failures = [text for text in gather_object([self.failure]) if text is not None]
            if failures:
                self.failure = failures[0]
                self._replays.clear()
                if self.must_capture:
                    raise ConfigError(
                        f"train.cuda_graph: given true, but the step cannot be captured ({failures[0]}); "
                        "valid: auto or false"
                    )
                logger.warning("train.cuda_graph: going on without, since a step cannot be captured (%s)", failures[0])
        self.steps += 1

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream of captures, after what the current stream has been given and before what it is given next."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)
