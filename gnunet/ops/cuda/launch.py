"""The backend "cuda": which kernels of group_norm_silu.cu are compiled and launched, and what is allocated for them."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gnunet.ops import eager
from gnunet.ops.arguments import NormArgs
from gnunet.ops.autograd import apply, library_operator
from gnunet.ops.planned import OperatorOfAnySignature, Plan, PlannedOperator, Planner, Shape

from . import compiler, driver
from .tiling import PORTABLE_RANKS, Gpu, Tiling, choose_tiling

_TYPES = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}
"""As group_norm_silu.cu numbers them."""
_CONSTANTS = (
    "X_TYPE", "WEIGHT_TYPE", "BIAS_TYPE", "ADD_TYPE", "SCALE_TYPE", "SHIFT_TYPE", "CHANNELS_LAST", "SILU", "CENTER",
    "CHANNELS", "NUM_GROUPS", "WIDTH", "VECTOR", "LANES", "ROWS", "FOLD", "THREADS", "RANKS", "RESIDENT", "THREAD_SUMS",
    "FITS", "NEED_X", "NEED_SUMS", "NEED_D",
)  # fmt: skip
"""The names that are defined when the source is compiled."""
_FORWARD_POINTERS = ("x", "", "weight", "bias", "add", "scale", "shift", "y", "stats", *[""] * 6)
_BACKWARD_POINTERS = (
    "x", "dy", "weight", "bias", "add", "scale", "shift", "dx", "stats", "dweight", "dbias", "dadd", "dscale", "dshift",
    "sums",
)  # fmt: skip
_POINTERS = {"forward": _FORWARD_POINTERS, "backward": _BACKWARD_POINTERS, "affine": _BACKWARD_POINTERS}
"""The tensors at the beginning of `Params`, the parameters of the kernels."""
_FORMAT = "15Q4qf3i"  # the format of `Params` for `struct`
_ALIGNMENT = 16  # alignment in bytes of x, y and their gradients; torch.empty gives more
_MIN_CAPABILITY = 8  # the compute capability of the first GPUs that copy to shared memory asynchronously
_MIN_ROW_BYTES = 64  # the least bytes of a row of channels with which clusters are faster than Triton's two passes
_CLUSTER_CAPABILITY = 9  # the compute capability of the first GPUs with clusters
_LARGE_CLUSTER, _CLUSTER_THREADS = 16, 512
"""Thread blocks, and threads of each, of a cluster that only some GPUs can hold."""
_CHANNELS_AT_ONCE, _SAMPLES_AT_ONCE = 32, 16
"""Channels and samples of a thread block that adds up the sums of samples; group_norm_silu.cu has the same numbers."""
_MAX_PLANNED = 4096


class Launch(NamedTuple):
    """A kernel, the values of _CONSTANTS, its size, and its parameters after the pointers.

    tiling: None for the kernel that adds up the sums of samples.
    """

    name: str
    constants: tuple[int, ...]
    blocks: int
    threads: int
    ranks: int
    shared_bytes: int
    tiling: Tiling | None
    values: tuple[Any, ...]

    @property
    def options(self) -> list[str]:
        defined = [f"{name}={value}" for name, value in zip(_CONSTANTS, self.constants, strict=True)]
        return [*defined, self.name.upper()]


def gpu_of(device: torch.device) -> Gpu:
    return _gpu(device.index)


@cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    if properties.major < _CLUSTER_CAPABILITY:
        return Gpu(shared, 1)
    nothing = driver.load(index, compiler.probe(_arch(index)), "nothing", shared, _LARGE_CLUSTER)
    has_place = driver.max_active_clusters(nothing, _CLUSTER_THREADS, _LARGE_CLUSTER, shared) > 0
    return Gpu(shared, _LARGE_CLUSTER if has_place else 8)


def _arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def tilings(shape: Shape, gpu: Gpu, has_add: bool) -> tuple[Tiling, Tiling] | None:
    """The tilings of forward and backward; None where the kernels do not support the shape."""
    forward, backward = choose_tiling(shape, gpu, 1, 0), choose_tiling(shape, gpu, 2, 2 + has_add)
    return None if forward is None or backward is None else (forward, backward)


def _tilings(args: NormArgs) -> tuple[Tiling, Tiling]:
    found = tilings(Shape.of(args), gpu_of(args.x.device), args.add is not None)
    if found is None:
        raise ValueError(
            f"backend 'cuda' does not take x of {tuple(args.x.shape)} in {args.num_groups} groups: a group has too "
            "many channels for a thread block, or channels too many positions; 'auto' takes a backend that does"
        )
    return found


def is_worthwhile(args: NormArgs) -> bool:
    """Whether these kernels are faster than Triton's (measured, assets/benchmarks): both directions read everything
    once, contiguous channels by clusters, channels_last in long rows and without clusters of 16."""
    shape = Shape.of(args)
    found = tilings(shape, gpu_of(args.x.device), args.add is not None)
    if found is None or not all(tiling.fits for tiling in found):
        return False
    if not shape.channels_last:
        return found[0].ranks > 1
    least_row = min(_MIN_ROW_BYTES, shape.channels * shape.itemsize)
    return all(t.ranks <= PORTABLE_RANKS and t.width * shape.itemsize >= least_row for t in found)


def _launch(direction: str, args: NormArgs, tiling: Tiling, needs: Sequence[bool]) -> Launch:
    x = args.x
    shape = Shape.of(args)
    need_x, need_weight, need_bias, need_add, need_scale, need_shift = needs
    types = [_TYPES[None if t is None else t.dtype] for t in args.tensors]
    numbers = (
        *types, shape.channels_last, args.silu, args.center, shape.channels, shape.num_groups, tiling.width,
        tiling.vector, tiling.lanes, tiling.rows, tiling.fold, tiling.threads, tiling.ranks,
        tiling.limited(gpu_of(x.device), args.has_tables), tiling.thread_sums, tiling.fits, need_x,
        need_weight or need_bias or need_add or need_scale or need_shift, need_add,
    )  # fmt: skip
    strides = (0 if t is None else t.stride(0) for t in (args.add, args.scale, args.shift))
    held = (*tiling.held, 0)[:2]
    blocks = len(x) * (shape.channels // tiling.width) * tiling.ranks
    values = (len(x), *strides, args.eps, shape.positions, *held)
    constants = tuple(map(int, numbers))
    return Launch(direction, constants, blocks, tiling.threads, tiling.ranks, tiling.shared_bytes, tiling, values)


def _affine_launch(launch: Launch) -> Launch:
    """The launch that adds up the sums that a backward launch has stored for each sample."""
    channels = launch.constants[_CONSTANTS.index("CHANNELS")]
    # The other constants are 1 for all tilings, so that there is one kernel for all of them.
    of_sums = ("WEIGHT_TYPE", "BIAS_TYPE", "CHANNELS")
    constants = tuple(
        n if name in of_sums else channels if name == "NUM_GROUPS" else 1
        for name, n in zip(_CONSTANTS, launch.constants, strict=True)
    )
    threads = _CHANNELS_AT_ONCE * _SAMPLES_AT_ONCE
    blocks = -(-channels // _CHANNELS_AT_ONCE)
    return Launch("affine", constants, blocks, threads, 1, 8 * threads, None, launch.values)


def plan_forward(args: NormArgs) -> Plan:
    """The buffer holds the statistics of all groups."""
    launch = _launch("forward", args, _tilings(args)[0], [False] * 6)
    return Plan([launch], {"stats": (1 + args.center) * len(args.x) * args.num_groups})


def plan_backward(args: NormArgs, needs: Sequence[bool]) -> Plan:
    """The buffer holds the sums of each sample's channels."""
    launch = _launch("backward", args, _tilings(args)[1], needs)
    if len(args.x) == 1 or not (needs[1] or needs[2]):
        return Plan([launch], {"sums": 0})
    return Plan([launch, _affine_launch(launch)], {"sums": 2 * len(args.x) * args.x.shape[1]})


class _Executable:
    """Launches the kernels of a plan, which all take the same structure."""

    def __init__(self, launches: Sequence[Launch], names: tuple[str, ...], device: int | None) -> None:
        assert device is not None
        self.launches, self.device = launches, device
        pointers = _POINTERS[launches[0].name]
        self.pick = itemgetter(*(names.index(name) if name in names else len(names) for name in pointers))
        self.pack, self.values = struct.Struct(_FORMAT).pack_into, launches[0].values
        self.structure = ctypes.create_string_buffer(struct.calcsize(_FORMAT))
        self.lock = threading.Lock()  # from when the structure is filled until the last launch, which copies it
        self.read = [names.index(name) for name in ("x", "dy") if name in names]
        self.launchers: list[driver.Launcher] = []

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                self(tensors)
            return
        if not self.launchers:
            self.launchers = [self._launcher(launch) for launch in self.launches]
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        copies = []
        for i in self.read:
            if pointers[i] % _ALIGNMENT:
                copies.append(tensors[i].clone())  # type: ignore[union-attr]
                pointers[i] = copies[-1].data_ptr()
        pointers.append(0)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        with self.lock:
            self.pack(self.structure, 0, *self.pick(pointers), *self.values)
            for launcher in self.launchers:
                launcher(stream)

    def _launcher(self, launch: Launch) -> driver.Launcher:
        name, _, blocks, threads, ranks, shared_bytes, _, _ = launch
        function = _function(self.device, tuple(launch.options), f"group_norm_silu_{name}", shared_bytes, ranks)
        return driver.Launcher(self.device, function, self.structure, blocks, threads, ranks, shared_bytes)


@cache
def _function(device: int, options: tuple[str, ...], kernel: str, shared_bytes: int, ranks: int) -> ctypes.c_void_p:
    return driver.load(device, compiler.cubin(options, _arch(device)), kernel, shared_bytes, ranks)


PLANNER = Planner(plan_forward, plan_backward, _Executable)


_planned: dict[Hashable, PlannedOperator] = {}


def _plan(args: NormArgs) -> PlannedOperator:
    if len(_planned) >= _MAX_PLANNED:
        _planned.clear()
    key = args.signature()
    return _planned.get(key) or _planned.setdefault(key, PlannedOperator(args, PLANNER))


_operator = OperatorOfAnySignature(_plan)
compiled_group_norm_silu = library_operator("cuda_group_norm_silu", _operator, traceable=False)


def prepare(args: NormArgs) -> Callable[[NormArgs], Tensor]:
    """A differentiable function for arguments of this signature."""
    if args.x.numel() == 0:
        return eager.group_norm_silu
    _tilings(args)  # raises if the shape is not supported
    return partial(apply, PlannedOperator(args, PLANNER))


def unsupported_reason(x: Tensor) -> str | None:
    """Why the kernels do not support x, or None."""
    return "does not compute in float64" if x.dtype == torch.float64 else unsupported_device(x.device)


def unsupported_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs a tensor on a GPU, got one on {device}"
    return _missing(device.index)


@torch.compiler.assume_constant_result  # which a cached function itself cannot have
def _missing(device: int) -> str | None:
    return _find_missing(device)


@cache
def _find_missing(device: int) -> str | None:
    if torch.version.hip:
        return "needs a GPU of NVIDIA's"
    major, minor = torch.cuda.get_device_capability(device)
    if major < _MIN_CAPABILITY:
        return f"needs compute capability {_MIN_CAPABILITY}.0, this GPU has {major}.{minor}"
    problem = compiler.nvrtc_problem(_arch(device))
    if problem is None:
        try:
            _gpu(device)
            driver.load(device, compiler.probe(_arch(device)), "nothing", 0, 1)
        except (OSError, RuntimeError) as error:
            problem = f"needs a driver that loads what NVRTC compiles: {error}"
    return problem
