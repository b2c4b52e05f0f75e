"""The training step as CUDA graphs (train.cuda_graph): its parts are called, then captured, then replayed."""

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
WARM_UP_STEPS = 3
"""Steps before one is captured, as PyTorch's documentation recommends: libraries choose their algorithms, kernels are
compiled, and the optimizer creates its state."""


def is_enabled(config: Config, accelerator: Accelerator) -> bool:
    """Whether a run replays its steps as CUDA graphs; ConfigError if train.cuda_graph is true but it cannot."""
    obstacle = _obstacle(config, accelerator)
    if config.train.cuda_graph is True and obstacle is not None:
        raise ConfigError(f"train.cuda_graph: given true {obstacle}; valid: auto or false")
    return config.train.cuda_graph is not False and obstacle is None


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
    """Capture a function's kernels without running them; returns a function that replays them, with the same result."""
    graph = torch.cuda.CUDAGraph()
    # "thread_local", since the loader's thread allocates pinned memory meanwhile, and NCCL's thread queries events.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = function()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def copy_to_host(tensor: Tensor) -> Callable[[], list[float]]:
    """Start copying a tensor to the host; returns a function that waits for its values."""
    copy = tensor.to("cpu", non_blocking=True, copy=True)  # into pinned memory
    if tensor.device.type != "cuda":
        return copy.tolist
    copied = torch.cuda.Event()
    copied.record()

    def values() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return values


class Graphs:
    """Runs the functions that a training step consists of, and replays them once they are captured.

    They share one memory pool, so every step must run the same functions in the same order. They may depend only on
    their input tensors and on what is on the device; random numbers are drawn by the seed at the time of a replay. If a
    capture fails on any rank, all ranks continue with calls, which compute the same, or raise an error if
    `must_capture` is set.
    """

    def __init__(self, accelerator: Accelerator, *, must_capture: bool) -> None:
        self.must_capture = must_capture
        self.steps = 0
        self.failure: str | None = None
        self._inputs: dict[str, list[Tensor]] = {}
        self._replays: dict[str, Callable[[], Any]] = {}
        on_gpu = accelerator.device.type == "cuda"
        self._stream = torch.cuda.Stream(accelerator.device) if on_gpu else None
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None

    def run(self, name: str, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """`function(*inputs)`, whose name and inputs' shapes and dtypes are the same in every step.

        The next run of the same name overwrites the tensors that are returned.
        """
        if name not in self._inputs:
            self._inputs[name] = [torch.empty_like(tensor) for tensor in inputs]
        for static, tensor in zip(self._inputs[name], inputs, strict=True):
            static.copy_(tensor, non_blocking=True)
        call = partial(function, *self._inputs[name])
        if self.failure is None and self.steps == WARM_UP_STEPS and name not in self._replays:
            try:
                with self._on_capture_stream():
                    self._replays[name] = capture(call, pool=self._pool, stream=self._stream)
            except RuntimeError as error:
                self.failure = str(error).partition("\n")[0]
        if name in self._replays:
            return self._replays[name]()
        if self.steps >= WARM_UP_STEPS:
            return call()
        with self._on_capture_stream():
            return call()

    def captured(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """A replay of `function`, or `function` itself if it cannot be captured."""
        try:
            with self._on_capture_stream():
                function()
            with self._on_capture_stream():
                return capture(function, pool=None, stream=self._stream)
        except RuntimeError:
            return function

    def end_step(self) -> None:
        """To be called by every rank at the end of each step."""
        if self.steps == WARM_UP_STEPS:
            failures = [text for text in gather_object([self.failure]) if text is not None]
            if failures:
                self.failure = failures[0]
                self._replays.clear()
                if self.must_capture:
                    raise ConfigError(
                        f"train.cuda_graph: given true, but the step cannot be captured ({failures[0]}); "
                        "valid: auto or false"
                    )
                logger.warning("train.cuda_graph: the step cannot be captured (%s); training without", failures[0])
        self.steps += 1

    @contextmanager
    def _on_capture_stream(self) -> Iterator[None]:
        """Run on the stream of captures, after the current stream's earlier work and before its later work."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)
