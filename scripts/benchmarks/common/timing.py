"""Times of single calls, without what is not theirs: launch gaps and warm caches on a GPU, drifting clocks."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]
ROUNDS = 6
_GRAPH_BYTES = 2**30  # what a graph's calls move at least, so that launching it costs next to nothing
_MAX_SETS = 256


class Timed(Protocol):
    """Something that can be timed again and again."""

    def seconds(self, repeats: int) -> float:
        """The mean time of a call, over `repeats` passes through all calls."""


class HostTimed:
    """Calls on the CPU, one after the other."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        calls[0]()

    def seconds(self, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            for call in self.calls:
                call()
        return (time.perf_counter() - start) / (repeats * len(self.calls))


class GraphTimed:
    """Calls captured in one CUDA graph, so that the GPU never waits for Python.

    They are captured on the current stream, which must not be the default one. Whatever they differentiate must have
    been computed on it too: autograd runs a backward operation on the stream of the forward one.
    """

    def __init__(self, calls: Sequence[Call], call_bytes: int) -> None:
        self.count = max(len(calls), min(64, max(2, _GRAPH_BYTES // call_bytes)))
        for _ in range(3):
            calls[0]()
        self.graph, outputs = torch.cuda.CUDAGraph(), {}
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            for i in range(self.count):
                # An output lives until its set's turn comes again; others would be written over it, in the cache.
                outputs[i % len(calls)] = calls[i % len(calls)]()

    def seconds(self, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()  # the GPU is busy while the rest is queued
        start.record()
        for _ in range(repeats):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (repeats * self.count)


def timed(calls: Sequence[Call], device: torch.device, call_bytes: int) -> Timed:
    """Calls ready to be timed; each moves at least `call_bytes`."""
    return GraphTimed(calls, call_bytes) if device.type == "cuda" else HostTimed(calls)


def sets_needed(call_bytes: int, cache_bytes: int) -> int:
    """Sets of inputs to go through in turn so that twice the cache's size passes before one comes again.

    Args:
        call_bytes: what a call moves at least.
        cache_bytes: 0 where the cache may stay warm.
    """
    return min(_MAX_SETS, max(1, -(-2 * cache_bytes // call_bytes)))


def alternate(contenders: Mapping[str, Timed], seconds: float, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of a call of each, round by round, in an order that turns around from one round to the next.

    Args:
        seconds: the time to spend on all of them; what does not fit is timed once in a round.
    """
    share = seconds / (rounds * max(1, len(contenders)))
    repeats = {}
    for name, contender in contenders.items():
        start = time.perf_counter()
        contender.seconds(1)
        repeats[name] = max(1, round(share / (time.perf_counter() - start)))
    return alternate_repeats(contenders, repeats, rounds)


def alternate_repeats(
    contenders: Mapping[str, Timed], repeats: Mapping[str, int], rounds: int
) -> dict[str, list[float]]:
    """As `alternate`, with the number of passes of each in a round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(contenders[name].seconds(repeats[name]))
    return times


def launch_seconds(call: Call, count: int = 20) -> float:
    """The time of a call as Python makes it on a GPU, its launches included: the median of three runs."""
    runs = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        runs.append((time.perf_counter() - start) / count)
    return statistics.median(runs)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy_ on the device."""
    size = 2**26 if device.type == "cpu" else min(2**31, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = timed([lambda: target.copy_(source)], device, 2 * size)
    return 2 * size / statistics.median(alternate({"copy": copy}, seconds=0.5, rounds=10)["copy"])
