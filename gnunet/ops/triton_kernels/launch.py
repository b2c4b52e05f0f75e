"""The backend "triton": which kernels are launched, with which arguments, and what is allocated for them.

It runs on a GPU and, for tests, on a CPU, where Triton interprets its kernels (TRITON_INTERPRET=1). In eager mode
everything that follows from shapes, strides and dtypes is computed once for each combination, and the compiled kernels
are launched directly: with few images per GPU a step is bound by the host. torch.compile traces the same launches and
launches the kernels itself.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from copy import copy
from functools import cache, partial
from importlib.metadata import version
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion
from triton import cdiv, next_power_of_2
from triton.runtime import JITFunction

from gnunet.ops import eager
from gnunet.ops.arguments import NormArgs
from gnunet.ops.autograd import apply, library_operator
from gnunet.ops.planned import Execute, OperatorOfAnySignature, Plan, PlannedOperator, Planner, Shape

from . import backward as backward_kernels
from . import forward as forward_kernels
from .tiling import Tiling, align_s, choose_tiling

IS_INTERPRETED = not isinstance(forward_kernels.fwd_single_pass, JITFunction)
"""Whether Triton's interpreter runs the kernels."""
INTERPRETER_FAILS = (
    IS_INTERPRETED and TorchVersion(triton.__version__) < "3.7" and TorchVersion(version("numpy")) >= "2.4"
)
"""Whether it cannot: up to Triton 3.6 it does not run loops with NumPy 2.4 and newer."""
HAS_COMPILER = IS_INTERPRETED or bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
"""Triton compiles the launchers of its kernels with the machine's C compiler."""
_REGISTERS = 65536  # registers of a multiprocessor, on every NVIDIA GPU that Triton supports
_COLUMNS = 8  # channels of a program that adds up rows of sums: a sector of memory
_ROWS = 256  # the most rows that it adds up at a time
_POINTER = "_ptr"


class Launch(NamedTuple):
    """A kernel, its number of programs, its options, the names of its tensors, and its other arguments in order."""

    kernel: Any
    programs: int
    options: dict[str, int]
    tensors: tuple[str, ...]
    values: tuple[Any, ...]


def _launch(kernel: Any, programs: int, options: dict[str, int], values: dict[str, Any]) -> Launch:
    pointers = tuple(name for name in kernel.arg_names if name.endswith(_POINTER))
    tensors = tuple(name.removesuffix(_POINTER) for name in pointers)
    return Launch(kernel, programs, options, tensors, tuple(values[n] for n in kernel.arg_names[len(pointers) :]))


def _options(num_warps: int, resident_warps: int) -> dict[str, int]:
    """Registers are limited so that a multiprocessor has this many warps, some of which wait for memory."""
    # No kernel spills, as inspect_kernels.py shows, but for a few loads and stores of fwd_single_pass in Triton 3.6.
    if torch.version.hip:
        return {"num_warps": num_warps}
    programs = cdiv(resident_warps, num_warps)
    return {"num_warps": num_warps, "maxnreg": min(255, _REGISTERS // (32 * num_warps * programs) // 8 * 8)}


def _tiling(args: NormArgs, direction: str) -> tuple[Tiling, dict[str, Any]]:
    """The tiling of x, and the kernels' arguments that follow from its shape and the options."""
    x = args.x
    shape = Shape.of(args)
    tiling = choose_tiling(shape, direction)
    width = tiling.groups * shape.group_channels
    values = {
        "positions": shape.positions // align_s(shape),
        "eps": args.eps,
        "stats_stride": len(x) * args.num_groups,
        "SILU": args.silu,
        "CENTER": args.center,
        "FAST": x.element_size() == 2 and _is_nvidia(x),
        "CHANNELS_LAST": shape.channels_last,
        "ALIGN_S": align_s(shape),
        "C": shape.channels,
        "G": args.num_groups,
        "GROUP": shape.group_channels,
        "GROUPS": tiling.groups,
        "GROUP_BLOCKS": tiling.group_blocks,
        "EVEN_S": shape.positions % tiling.block_s == 0,
        "EVEN_C": width == tiling.block_c * tiling.channel_splits and shape.channels % width == 0,
        "BLOCK_S": tiling.block_s,
        "BLOCK_C": tiling.block_c,
    }
    for name in ("add", "scale", "shift"):
        table = getattr(args, name)
        values[f"{name}_stride_n"] = 0 if table is None else table.stride(0)
    if tiling.split_size is not None:
        values |= {
            "SPLIT_SIZE": tiling.split_size,
            "CHANNEL_SPLITS": tiling.channel_splits,
            "BLOCK_K": next_power_of_2(tiling.num_splits),
            "position_splits": tiling.position_splits,
            "partial_stride": len(x) * args.num_groups * tiling.num_splits,
        }
    return tiling, values


def _is_nvidia(x: Tensor) -> bool:
    return x.is_cuda and not (torch.version.hip or IS_INTERPRETED)


def _is_wide(args: NormArgs, values: dict[str, Any]) -> bool:
    """Whether a thread needs a register for each element of x or for its address."""
    return args.x.element_size() > 2 or (not values["CHANNELS_LAST"] and values["ALIGN_S"] == 1)


def _is_plain(args: NormArgs, values: dict[str, Any]) -> bool:
    """Whether a thread needs no registers for tables, masks of positions and 32-bit tensors."""
    return bool(values["EVEN_S"]) and not args.has_tables and args.x.element_size() == 2


def _options_of_splits(args: NormArgs, num_warps: int, values: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """The options of kernels that hold much at a time, and of those that hold little."""
    much = _options(num_warps, 8 if _is_wide(args, values) else 16)
    return much, _options(num_warps, 24) if _is_plain(args, values) else much


def plan_forward(args: NormArgs) -> Plan:
    """The buffer holds the statistics of all groups, followed by those of their splits."""
    tiling, values = _tiling(args, "forward")
    blocks = len(args.x) * tiling.group_blocks
    much, little = _options_of_splits(args, tiling.num_warps, values)
    stats = (1 + args.center) * values["stats_stride"]
    if tiling.split_size is None:
        options = _options(tiling.num_warps, 32) if _is_plain(args, values) else much
        return Plan([_launch(forward_kernels.fwd_single_pass, blocks, options, values)], {"stats": stats})
    stats += 2 * values["partial_stride"]
    kernels = (forward_kernels.fwd_partial_stats, forward_kernels.fwd_normalize)
    return Plan([_launch(kernel, blocks * tiling.num_splits, little, values) for kernel in kernels], {"stats": stats})


def plan_backward(args: NormArgs, needs: Sequence[bool]) -> Plan:
    """The buffers hold sums of channels in each split (sums), sums of groups in each split (partial), mean_dy and
    mean_dy_xhat (means), and sums of channels in each sample (combined)."""
    need_x, need_weight, need_bias, need_add, need_scale, need_shift = needs
    need_tables, need_affine = need_add or need_scale or need_shift, need_weight or need_bias
    tiling, values = _tiling(args, "backward of tables" if args.has_tables else "backward")
    samples, channels, groups = len(args.x), values["C"], args.num_groups
    blocks = samples * tiling.group_blocks
    much, little = _options_of_splits(args, tiling.num_warps, values)
    partial = means = combined = 0
    if tiling.split_size is None:
        rows = samples
        sums = 2 * rows * channels if need_affine else 0
        values["sums_stride"] = rows * channels
        launches = [_launch(backward_kernels.bwd_single_pass, blocks, much, values)]
    else:
        rows = samples * tiling.position_splits
        sums = (3 if need_add else 2) * rows * channels
        partial = 2 * values["partial_stride"]
        means = 2 * samples * groups if need_add else 0
        combined = 2 * samples * channels if need_tables and need_affine else 0
        values |= {
            "sums_stride": rows * channels,
            "means_stride": samples * groups,
            "combined_stride": samples * channels,
            "NEED_D": need_add,
        }
        launches = [_launch(backward_kernels.bwd_partial_sums, blocks * tiling.num_splits, little, values)]
        if need_x or need_add:
            launches.append(_launch(backward_kernels.bwd_dx, blocks * tiling.num_splits, little, values))
    options = _options(num_warps=8, resident_warps=24)
    values["BLOCK_C"] = _COLUMNS
    if need_tables and tiling.split_size is not None:
        values["BLOCK_K"] = _block_of_rows(tiling.position_splits)
        programs = samples * cdiv(channels, _COLUMNS)
        launches.append(_launch(backward_kernels.bwd_combine_sums, programs, options, values))
        rows, values["sums_stride"] = samples, samples * channels
    if need_affine:
        values |= {"rows": rows, "rows_of_sample": rows // samples, "BLOCK_K": _block_of_rows(rows)}
        launch = _launch(backward_kernels.bwd_dweight_dbias, cdiv(channels, _COLUMNS), options, values)
        launches.append(launch._replace(tensors=("combined", *launch.tensors[1:])) if combined else launch)
    return Plan(launches, {"sums": sums, "partial": partial, "means": means, "combined": combined})


def _block_of_rows(rows: int) -> int:
    return int(min(_ROWS, next_power_of_2(rows)))


def _traceable(launches: Sequence[Launch], names: tuple[str, ...], device: int | None) -> Execute:
    def execute(tensors: tuple[Tensor | None, ...]) -> None:
        given = dict(zip(names, tensors, strict=True))
        for kernel, programs, options, wanted, values in launches:
            if not IS_INTERPRETED:
                kernel = torch.library.wrap_triton(_with_options(kernel, **options))
            kernel[(programs,)](*(given[name] for name in wanted), *values)

    return execute


@cache
def _with_options(kernel: Any, num_warps: int, maxnreg: int | None = None) -> Any:
    """The kernel with its options as an autotuner's configuration, the only form in which torch's tracers take them."""
    return triton.autotune([triton.Config({}, num_warps=num_warps, maxnreg=maxnreg)], key=[])(kernel)


class _Executable:
    """Launches the kernels of a plan: from the second call on, if tensors are aligned, by Triton's C function."""

    def __init__(self, launches: Sequence[Launch], names: tuple[str, ...], device: int | None) -> None:
        self.device = device
        self.launches = [(launch, itemgetter(*map(names.index, launch.tensors))) for launch in launches]
        self.compiled: list[tuple[LaunchCall, itemgetter[Any], tuple[Any, ...]]] = []

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                self(tensors)
            return
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        is_aligned = math.gcd(16, *pointers) == 16
        if not (self.compiled and is_aligned):
            self._launch_by_triton(tensors, is_aligned)
            return
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        for (launch, before, after, is_packed), pick, values in self.compiled:
            if is_packed:
                launch(*before, stream, *after, (*pick(pointers), *values))
            else:
                launch(*before, stream, *after, *pick(pointers), *values)

    def _launch_by_triton(self, tensors: tuple[Tensor | None, ...], is_aligned: bool) -> None:
        """Launch the kernels, compiled for these arguments if they are not yet."""
        compiled = [
            kernel[(programs,)](*pick(tensors), *values, **options)
            for (kernel, programs, options, _, values), pick in self.launches
        ]
        if is_aligned:
            self.compiled = [
                (launch_call(found, launch.programs, len(launch.kernel.arg_names)), pick, launch.values)
                for found, (launch, pick) in zip(compiled, self.launches, strict=True)
            ]


class LaunchCall(NamedTuple):
    """launch(*before, stream, *after, *arguments) launches a kernel; with the arguments as one tuple if is_packed."""

    launch: Callable[..., object]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    is_packed: bool


def launch_call(compiled: Any, programs: int, count: int) -> LaunchCall:
    """The C function that the launcher of a compiled kernel of `count` arguments calls, which takes half of its time.

    Its other arguments depend on Triton's release, so a call by the launcher is recorded. If the launcher allocates
    memory for each launch, or the call has an unknown form, the launcher itself is called.
    """
    given = (compiled.function, compiled.packed_metadata, None, None, None)
    by_launcher = LaunchCall(compiled.run, (programs, 1, 1), given, False)
    if getattr(compiled.run, "global_scratch_size", 1) or getattr(compiled.run, "profile_scratch_size", 1):
        return by_launcher
    stream, *arguments = (object() for _ in range(count + 1))
    seen: list[Any] = []
    watched = copy(compiled.run)
    watched.launch = lambda *args, **named: seen.extend(() if named else args)
    try:
        watched(programs, 1, 1, stream, *given, *arguments)
    except (AttributeError, TypeError):  # it looks at what only stands for the arguments
        return by_launcher
    at = seen.index(stream) if stream in seen else len(seen)
    for ending, is_packed in ((arguments, False), ([tuple(arguments)], True)):
        if seen[at + 1 :][-len(ending) :] == ending:
            after = seen[at + 1 : len(seen) - len(ending)]
            return LaunchCall(compiled.run.launch, tuple(seen[:at]), tuple(after), is_packed)
    return by_launcher


PLANNER = Planner(plan_forward, plan_backward, _Executable)
_TRACED = Planner(plan_forward, plan_backward, _traceable)
_operator = OperatorOfAnySignature(lambda args: PlannedOperator(args, _TRACED))
"""Plans in each call and launches through Triton's dispatch, for the interpreter and torch's tracers."""
compiled_group_norm_silu = library_operator("triton_group_norm_silu", _operator, traceable=not IS_INTERPRETED)


def prepare(args: NormArgs) -> Callable[[NormArgs], Tensor]:
    """A differentiable function for arguments of this signature."""
    if args.x.numel() == 0:
        return eager.group_norm_silu
    return partial(apply, _operator if IS_INTERPRETED else PlannedOperator(args, PLANNER))


def unsupported_reason(x: Tensor) -> str | None:
    """Why the kernels do not support x, or None."""
    if not x.is_cuda and not IS_INTERPRETED:
        return f"needs a tensor on a GPU, got one on {x.device} (or TRITON_INTERPRET=1, which is slow)"
    if INTERPRETER_FAILS:
        return "is interpreted by a Triton that cannot do so with this NumPy: install triton >= 3.7, or numpy < 2.4"
    if not HAS_COMPILER:
        return "needs a C compiler, with which Triton makes its launchers: install gcc or clang, or set CC"
    return "does not compute in float64" if x.dtype == torch.float64 else None
