"""One case of benchmark_op.py: inputs, the check of every contender against float64, and its times."""

import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.peers import PEERS, Contender, Unavailable, errors, exact, gnunet, is_right
from common.record import failure, rounded
from common.shapes import Case
from common.summary import COPY, MINIMUM_TENSORS, OURS, RMS_NORM, fits_one_pass, minimum_bytes, timing
from common.timing import Call, Timed, alternate, copy_bandwidth, launch_seconds, sets_needed, timed

_LAUNCH_BOUND = 8 * 2**20  # bytes of a tensor below which Python may take longer than the GPU
_ROW = 4096  # elements of a row of the yardstick's norm at most
Inputs = dict[str, list[tuple[Tensor, Tensor]]]
"""By layout, sets of x and dy; a set has the same values in every layout."""


def make_inputs(case: Case, layouts: set[str], sets: int, device: torch.device) -> Inputs:
    """Random sets, x requiring gradients."""
    last = torch.channels_last if len(case.shape) == 4 else torch.channels_last_3d
    formats = {"contiguous": torch.contiguous_format, "channels_last": last}
    inputs: Inputs = {layout: [] for layout in layouts}
    for _ in range(sets):
        x, dy = (torch.randn(case.shape, dtype=case.dtype, device=device) for _ in range(2))
        x.mul_(1.5).add_(0.5)
        for layout in layouts:
            x_laid, dy_laid = (t.clone(memory_format=formats[layout]) for t in (x, dy))
            inputs[layout].append((x_laid.requires_grad_(), dy_laid))
    return inputs


def calls_of(contender: Contender, inputs: Inputs, parameters: Sequence[Tensor], direction: str) -> list[Call]:
    """A contender's calls in one direction, one for each set of inputs; `parameters` are weight and bias or none."""

    def gradients(y: Tensor, x: Tensor, dy: Tensor, again: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (x, *parameters), dy, retain_graph=again)

    def call(x: Tensor, dy: Tensor) -> Call:
        if direction == "forward":
            return torch.no_grad()(lambda: contender.function(x, *parameters))
        if direction == "both":
            return lambda: gradients(contender.function(x, *parameters), x, dy, again=False)
        y = contender.function(x, *parameters)
        return lambda: gradients(y, x, dy, again=True)

    return [call(x, dy) for x, dy in inputs[contender.layout]]


def copy_calls(inputs: Inputs, layout: str, direction: str) -> list[Call]:
    """Calls that move as many bytes as the operator has to and compute next to nothing: a copy, a sum, or both."""

    def call(x: Tensor, dy: Tensor, out: Tensor) -> Call:
        if direction == "forward":
            return lambda: out.copy_(x)
        if direction == "backward":
            return lambda: torch.add(x, dy, out=out)
        return lambda: torch.add(out.copy_(x), dy, out=out)

    return [call(x.detach(), dy, torch.empty_like(dy)) for x, dy in inputs[layout]]


def rms_norm_calls(inputs: Inputs, layout: str, direction: str) -> list[Call]:
    """Calls of PyTorch's root mean square norm over short rows of the same bytes, which are read and written once."""

    def rows(t: Tensor) -> Tensor:
        flat = t.detach().as_strided((t.numel(),), (1,))
        return flat.view(-1, gcd(t.numel(), _ROW))

    in_rows = {layout: [(rows(x).requires_grad_(), rows(dy)) for x, dy in inputs[layout]]}
    norm = Contender(lambda x: F.rms_norm(x, x.shape[1:]), layout)
    return calls_of(norm, in_rows, (), direction)


YARDSTICKS = {COPY: copy_calls, RMS_NORM: rms_norm_calls}
"""Calls that move the same bytes as the operator, timed as yardsticks."""


def check(
    case: Case, contender: Contender, inputs: Inputs, weight: Tensor, bias: Tensor, expected: dict[str, Tensor]
) -> dict[str, Any]:
    """A contender's errors against float64, whether rounding explains them, and how long the first calls took."""
    x, dy = inputs[contender.layout][0]
    start = time.perf_counter()
    try:
        y = contender.function(x, weight, bias)
        dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
        with torch.no_grad():
            contender.function(x, weight, bias)
        relative = errors({"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}, expected)  # waits for the device
    except Exception as error:  # one failure does not stop the others
        return {"status": failure(error)}
    return {
        "status": "right" if is_right(case, relative) else "wrong",
        "first_calls_seconds": rounded(time.perf_counter() - start),
        "errors": {name: rounded(value) for name, value in relative.items()},
    }


class Benchmark:
    """Times cases on one device.

    Args:
        peers: names in PEERS.
        backend: the operator's.
        seconds: to spend on timing a case.
    """

    def __init__(self, device: torch.device, peers: Sequence[str], backend: str, seconds: float) -> None:
        self.device, self.peers, self.backend, self.seconds = device, peers, backend, seconds
        self.cache_bytes, self.is_cuda = 0, device.type == "cuda"
        if self.is_cuda:
            torch.cuda.set_stream(torch.cuda.Stream())  # CUDA graphs are not captured on the default one
            self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size

    @cached_property
    def bandwidth(self) -> float:
        """Of a large copy, in bytes per second."""
        return copy_bandwidth(self.device)

    def run(self, case: Case, *, with_times: bool = True) -> dict[str, Any]:
        """The record of one case; without times, what can compute it and how right."""
        torch.manual_seed(0)
        contenders, results = self._contenders(case)
        weight, bias = (
            torch.randn(case.shape[1], dtype=case.dtype, device=self.device).mul_(0.2).add_(mean).requires_grad_()
            for mean in (1.0, 0.0)
        )
        sets = sets_needed(minimum_bytes(case, "forward"), self.cache_bytes) if with_times else 1
        layouts = {case.layout, *(contender.layout for contender in contenders.values())}
        inputs = make_inputs(case, layouts, sets, self.device)
        expected = exact(case, inputs[case.layout][0][0], weight, bias, inputs[case.layout][0][1])
        for name, contender in contenders.items():
            results[name] = check(case, contender, inputs, weight, bias, expected)
        del expected
        right = {name: one for name, one in contenders.items() if results[name]["status"] == "right"}
        results |= {name: {"status": "right"} for name in YARDSTICKS if with_times}
        for direction in MINIMUM_TENSORS if with_times else ():
            makers: dict[str, Callable[[], list[Call]]] = {
                name: partial(calls, inputs, case.layout, direction) for name, calls in YARDSTICKS.items()
            }
            for name, contender in right.items():
                makers[name] = partial(calls_of, contender, inputs, (weight, bias), direction)
            for name, numbers in self._time(case, direction, makers).items():
                results[name][direction] = numbers
        return self.describe(case) | {"sets": sets, "results": results}

    def describe(self, case: Case) -> dict[str, Any]:
        """The fields of a case's record other than its results."""
        return {
            "label": case.label, "shape": case.shape, "num_groups": case.num_groups, "layout": case.layout,
            "tensor_bytes": case.tensor_bytes,
            "fits_one_pass": {d: fits_one_pass(case, d, self.cache_bytes) for d in ("forward", "backward")},
        }  # fmt: skip

    def failed(self, case: Case, error: Exception) -> dict[str, Any]:
        """The record of a case that could not be run."""
        return self.describe(case) | {"results": {OURS: {"status": failure(error)}}}

    def _contenders(self, case: Case) -> tuple[dict[str, Contender], dict[str, dict[str, Any]]]:
        """What can compute the case, and why the others cannot."""
        contenders, results = {OURS: gnunet(case, self.backend)}, {}
        for name in self.peers:
            try:
                contenders[name] = PEERS[name](case)
            except Unavailable as error:
                results[name] = {"status": str(error)}
        return contenders, results

    def _time(
        self, case: Case, direction: str, makers: dict[str, Callable[[], list[Call]]]
    ) -> dict[str, dict[str, Any]]:
        """Every contender's numbers in one direction; `makers` make its calls."""
        floor = minimum_bytes(case, direction)
        fits_cache = self.is_cuda and 3 * case.tensor_bytes <= self.cache_bytes / 2
        seconds = self.seconds / len(MINIMUM_TENSORS) / (2 if fits_cache else 1)
        numbers: dict[str, dict[str, Any]] = {}
        calls: dict[str, list[Call]] = {}
        cold: dict[str, Timed] = {}
        for name, make in makers.items():
            try:
                calls[name] = make()
                cold[name] = timed(calls[name], self.device, floor)
            except Exception as error:
                numbers[name] = {"failed": failure(error)}
        times = alternate(cold, seconds)
        for name, own in times.items():
            ours = times.get(OURS) if name != OURS and name not in YARDSTICKS else None
            numbers[name] = timing(own, ours, floor, self.bandwidth)
        if fits_cache:
            warm = {name: timed(calls[name][:1], self.device, floor) for name in times}
            for name, own in alternate(warm, seconds).items():
                numbers[name]["warm_us"] = timing(own, None, floor, self.bandwidth)["us"]
        if self.is_cuda and case.tensor_bytes <= _LAUNCH_BOUND:
            for name in times:
                numbers[name]["call_us"] = rounded(launch_seconds(calls[name][0]) * 1e6)
        return numbers
