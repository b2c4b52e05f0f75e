"""The operator by the kernels of group_norm_silu.cu: what is compiled, allocated and launched.

On a GPU, and, where GNUNET_EMULATE_CUDA is set, for tests, on a CPU: by host_shim.h, with 1; with "address" under
AddressSanitizer too, which the process must have preloaded.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import struct
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gnunet.ops import eager
from gnunet.ops.arguments import NormArgs
from gnunet.ops.autograd import apply, library_operator
from gnunet.ops.planned import FORWARD_TENSORS, Plan, PlannedOperator, Planner, Shape

from . import compiler, driver
from .tiling import Gpu, Tiling, choose_tiling

EMULATION = os.environ.get("GNUNET_EMULATE_CUDA", "")
"""Empty on a GPU."""
_HAS_COMPILER = bool(shutil.which("g++"))
EMULATED = Gpu(48 * 1024, 16)
_TYPES = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}
"""As group_norm_silu.cu numbers them."""
_CONSTANTS = (
    "X_TYPE", "WEIGHT_TYPE", "BIAS_TYPE", "ADD_TYPE", "SCALE_TYPE", "SHIFT_TYPE", "CHANNELS_LAST", "SILU", "CENTER",
    "CHANNELS", "NUM_GROUPS", "WIDTH", "VECTOR", "LANES", "ROWS", "FOLD", "THREADS", "RANKS", "THREAD_SUMS", "FITS",
    "SPARE", "NEED_X", "NEED_SUMS", "NEED_D",
)  # fmt: skip
"""What is defined when the source is compiled; the emulation, compiled once, is told in each launch."""
_POINTERS = {
    "forward": ("x", "", "weight", "bias", "add", "scale", "shift", "y", "stats", *[""] * 6),
    "backward": (
        "x", "dy", "weight", "bias", "add", "scale", "shift", "dx", "stats", "dweight", "dbias", "dadd", "dscale",
        "dshift", "sums",
    ),
}  # fmt: skip
"""The tensors at the beginning of the kernels' parameters, `Params`."""
_FORMAT = "15Q4qf3i"
"""Of the parameters."""
_ALIGNMENT = 16
"""Bytes, of x, y and their gradients; torch.empty gives more."""
_MIN_CAPABILITY = 8
"""Of GPUs that copy to shared memory while they compute."""
_WORTH_HOLDING = 0.4
"""The least share; below it the gain is less than the error of the model that predicts it."""
_CLUSTERS = 9
"""Compute capability of the first GPUs with clusters."""
_LARGE_CLUSTER, _CLUSTER_THREADS = 16, 512
"""Thread blocks of a cluster that some GPUs have a place for, others not, and their threads."""
SPARE = 16
"""Rows of the statistics behind those of the samples."""
_MAX_PLANNED = 4096


class Launch(NamedTuple):
    """A kernel, what is defined for it, its size, and its parameters after the pointers."""

    direction: str
    constants: tuple[int, ...]
    blocks: int
    tiling: Tiling
    values: tuple[Any, ...]

    @property
    def kernel(self) -> str:
        return f"group_norm_silu_{self.direction}"

    @property
    def options(self) -> list[str]:
        defined = [f"{name}={value}" for name, value in zip(_CONSTANTS, self.constants, strict=True)]
        return [*defined, self.direction.upper()]


def gpu_of(device: torch.device) -> Gpu:
    return EMULATED if EMULATION else _gpu(device.index)


@cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    if properties.major < _CLUSTERS:
        return Gpu(shared, 1)
    nothing = driver.load(index, compiler.probe(_arch(index)), "nothing", shared, _LARGE_CLUSTER)
    has_place = driver.max_active_clusters(nothing, _CLUSTER_THREADS, _LARGE_CLUSTER, shared) > 0
    return Gpu(shared, _LARGE_CLUSTER if has_place else 8)


def _arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def tilings(shape: Shape, gpu: Gpu, has_add: bool) -> tuple[Tiling, Tiling] | None:
    """Forward's and backward's; None where the kernels do not take the shape."""
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
    """Whether the clusters of both directions hold enough of what they read to be faster than two passes."""
    found = tilings(Shape.of(args), gpu_of(args.x.device), args.add is not None)
    return found is not None and all(tiling.share_held >= _WORTH_HOLDING for tiling in found)


def _launch(direction: str, args: NormArgs, tiling: Tiling, needs: Sequence[bool]) -> Launch:
    x = args.x
    shape = Shape.of(args)
    need_x, need_weight, need_bias, need_add, need_scale, need_shift = needs
    types = [_TYPES[None if t is None else t.dtype] for t in args.tensors]
    numbers = (
        *types, shape.channels_last, args.silu, args.center, shape.channels, shape.num_groups, tiling.width,
        tiling.vector, tiling.lanes, tiling.rows, tiling.fold, tiling.threads, tiling.ranks, tiling.thread_sums,
        tiling.fits, SPARE, need_x, need_weight or need_bias or need_add or need_scale or need_shift, need_add,
    )  # fmt: skip
    strides = (0 if t is None else t.stride(0) for t in (args.add, args.scale, args.shift))
    held = (*tiling.held, 0)[:2]
    blocks = len(x) * (shape.channels // tiling.width) * tiling.ranks
    values = (len(x), *strides, args.eps, shape.positions, *held)
    return Launch(direction, tuple(map(int, numbers)), blocks, tiling, values)


def plan_forward(args: NormArgs) -> Plan:
    """Buffer: the statistics, mean and rstd, or rstd alone, of the groups of all samples, with spare rows behind."""
    launch = _launch("forward", args, _tilings(args)[0], [False] * 6)
    return Plan([launch], {"stats": math.prod(_stats_shape(args))})


def plan_backward(args: NormArgs, needs: Sequence[bool]) -> Plan:
    """Buffer: sums of channels."""
    samples = len(args.x)
    sums = 2 * samples * args.x.shape[1] if samples > 1 and (needs[1] or needs[2]) else 0
    return Plan([_launch("backward", args, _tilings(args)[1], needs)], {"sums": sums})


def _stats_shape(args: NormArgs) -> tuple[int, int, int]:
    return 1 + args.center, len(args.x) + SPARE, args.num_groups


class _Executable:
    """Launches a plan's kernel."""

    def __init__(self, launches: Sequence[Launch], names: tuple[str, ...], device: int | None) -> None:
        (self.launch,) = launches
        assert device is not None
        self.device = device
        pointers = _POINTERS[self.launch.direction]
        self.pick = itemgetter(*(names.index(name) if name in names else len(names) for name in pointers))
        self.pack = struct.Struct(_FORMAT).pack_into
        self.read = [names.index(name) for name in ("x", "dy") if name in names]
        self.launcher: driver.Launcher | None = None

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                self(tensors)
            return
        launcher = self.launcher or self._prepare()
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        copies = []
        for i in self.read:
            if pointers[i] % _ALIGNMENT:
                copies.append(tensors[i].clone())  # type: ignore[union-attr]
                pointers[i] = copies[-1].data_ptr()
        pointers.append(0)
        with launcher.lock:
            self.pack(launcher.structure, 0, *self.pick(pointers), *self.launch.values)
            launcher(torch._C._cuda_getCurrentRawStream(self.device))

    def _prepare(self) -> driver.Launcher:
        launch, tiling = self.launch, self.launch.tiling
        function = _function(self.device, tuple(launch.options), launch.kernel, tiling.shared_bytes, tiling.ranks)
        self.launcher = driver.Launcher(
            self.device, function, launch.blocks, tiling.threads, tiling.ranks, tiling.shared_bytes,
            struct.calcsize(_FORMAT),
        )  # fmt: skip
        return self.launcher


@cache
def _function(device: int, options: tuple[str, ...], kernel: str, shared_bytes: int, ranks: int) -> ctypes.c_void_p:
    """A kernel, loaded once."""
    return driver.load(device, compiler.cubin(options, _arch(device)), kernel, shared_bytes, ranks)


@cache
def _emulator() -> Any:
    options = [f"{name}=(p.constants[{i}])" for i, name in enumerate(_CONSTANTS)]
    return ctypes.CDLL(str(compiler.host_library(options, None if EMULATION == "1" else EMULATION))).run


class _Emulation:
    """Runs a plan's kernel on a CPU, after filling what it must write with NaN."""

    def __init__(self, launches: Sequence[Launch], names: tuple[str, ...], device: int | None) -> None:
        (self.launch,) = launches
        self.names = names

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        launch, tiling = self.launch, self.launch.tiling
        given = dict(zip(self.names, tensors, strict=True))
        for name in ("x", "dy"):
            t = given.get(name)
            if t is not None and t.data_ptr() % _ALIGNMENT:
                given[name] = t.clone()
        is_forward = launch.direction == "forward"
        read = {*FORWARD_TENSORS[:-1], "dy", "" if is_forward else "stats"}
        for name, t in given.items():
            if t is not None and name not in read:
                t.detach().fill_(torch.nan)
        found = (given.get(name) for name in _POINTERS[launch.direction])
        constants = (ctypes.c_int * len(_CONSTANTS))(*launch.constants)
        pointers = [0 if t is None else t.data_ptr() for t in found]
        parameters = struct.pack(_FORMAT + "Q", *pointers, *launch.values, ctypes.addressof(constants))
        _emulator()(
            int(not is_forward), launch.blocks, tiling.threads, tiling.ranks,
            ctypes.c_size_t(tiling.shared_bytes), parameters,
        )  # fmt: skip


PLANNER = Planner(plan_forward, plan_backward, _Emulation if EMULATION else _Executable)


class _Operator:
    """An `autograd.Operator` for any arguments, for the operators of torch.library."""

    def __init__(self) -> None:
        self.planned: dict[Hashable, PlannedOperator] = {}

    def forward(self, args: NormArgs) -> tuple[Tensor, Tensor]:
        if args.x.numel() == 0:
            return torch.empty_like(args.x), args.x.new_zeros(_stats_shape(args), dtype=torch.float32)
        y, stats = self._of(args).forward(args)
        return y, stats.view(_stats_shape(args))

    def backward(self, dy: Tensor, stats: Tensor, args: NormArgs, needs: Sequence[bool]) -> list[Tensor]:
        if args.x.numel() == 0:
            return eager.backward(dy, stats[:, :-SPARE], args, needs)
        return self._of(args).backward(dy, stats.contiguous(), args, needs)

    def _of(self, args: NormArgs) -> PlannedOperator:
        if len(self.planned) >= _MAX_PLANNED:
            self.planned.clear()
        key = args.signature()
        return self.planned.get(key) or self.planned.setdefault(key, PlannedOperator(args, PLANNER))


compiled_group_norm_silu = library_operator("cuda_group_norm_silu", _Operator(), traceable=False, extra_stats=SPARE)


def prepare(args: NormArgs) -> Callable[[NormArgs], Tensor]:
    """A function for arguments of this signature."""
    if args.x.numel() == 0:
        return eager.group_norm_silu
    _tilings(args)  # which says what they do not take
    return partial(apply, PlannedOperator(args, PLANNER))


def unsupported_reason(x: Tensor) -> str | None:
    """Why the kernels cannot be run on x, in words, or None."""
    if x.dtype == torch.float64:
        return "does not compute in float64"
    if EMULATION:
        if x.device.type != "cpu":
            return "is emulated, on CPUs alone (GNUNET_EMULATE_CUDA is set)"
        return None if _HAS_COMPILER else "is emulated by what g++ compiles: install it"
    if not x.is_cuda:
        return f"needs a tensor on a GPU, got one on {x.device}"
    return _lacking(x.device.index)


@torch.compiler.assume_constant_result  # which a cached function itself cannot be
def _lacking(device: int) -> str | None:
    return _find_lacking(device)


@cache
def _find_lacking(device: int) -> str | None:
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
