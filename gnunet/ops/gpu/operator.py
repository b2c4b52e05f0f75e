"""The operator by Triton kernels: what is allocated and launched.

On a GPU, and on a CPU where Triton interprets its kernels (TRITON_INTERPRET=1, for tests).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from gnunet.ops.autograd import register
from gnunet.ops.layout import Layout

from . import backward as backward_kernels
from . import forward as forward_kernels
from .plan import Chunks, Loop, Shape, Tile, cut, power_of_two


def _interpreter_fails() -> bool:
    import numpy  # which the interpreter needs

    triton_release, numpy_release = (
        tuple(int(number) for number in package.__version__.split(".")[:2]) for package in (triton, numpy)
    )
    return triton_release < (3, 7) and numpy_release >= (2, 4)


IS_INTERPRETED = not isinstance(forward_kernels.tile, JITFunction)
"""Triton's interpreter runs the kernels, on a CPU too."""
INTERPRETER_FAILS = IS_INTERPRETED and _interpreter_fails()
"""The interpreter of Triton up to 3.6 cannot run a loop with NumPy 2.4 and newer."""
HAS_COMPILER = IS_INTERPRETED or bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
"""Triton compiles what launches its kernels with the machine's own C compiler."""
_MERGED = 1024  # numbers that a program which merges sums reads at once
_MERGING_WARPS = 4
_REGISTERS = 65536  # of a multiprocessor, of every NVIDIA GPU that Triton knows
_MAX_REGISTERS = 255  # of a thread


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y as x; mean and rstd of x + add, (N, G), fp32; without center no mean, (0, G)."""
    y = torch.empty_like(x)
    rstd = x.new_empty((len(x), num_groups), dtype=torch.float32)
    mean = torch.empty_like(rstd) if center else rstd.new_empty((0, num_groups))
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    samples, channels = x.shape[:2]
    layout = Layout(x, num_groups)
    plan, options = _plan(layout, x, "forward")
    results = layout.view(y)
    tensors = {"x_ptr": layout.view(x), "y_ptr": results, "mean_ptr": mean, "rstd_ptr": rstd}
    tables = _tables(weight, bias, add, scale, shift)
    with _device_of(x):
        if isinstance(plan, Chunks):
            chunk_mean, chunk_m2 = x.new_empty((2, samples, plan.chunks, channels), dtype=torch.float32)
            partial = {
                "chunk_mean_ptr": chunk_mean,
                "chunk_m2_ptr": chunk_m2,
                "chunk": plan.chunk,
                "chunks": plan.chunks,
            }
            _launch(
                forward_kernels.moments,
                samples * plan.chunks * plan.channel_blocks,
                plan.num_warps,
                x_ptr=tensors["x_ptr"],
                channel_blocks=plan.channel_blocks,
                **partial,
                **options,
            )
            _launch(
                forward_kernels.merge,
                samples * num_groups,
                _MERGING_WARPS,
                add_ptr=tables["add_ptr"],
                add_row=tables["add_row"],
                mean_ptr=mean,
                rstd_ptr=rstd,
                num_groups=num_groups,
                eps=eps,
                CENTER=center,
                BLOCK=_MERGED,
                **partial,
                **_sizes(options),
            )
            _launch(
                forward_kernels.elements,
                samples * plan.blocks * plan.channel_blocks,
                plan.num_warps,
                num_groups=num_groups,
                blocks=plan.blocks,
                channel_blocks=plan.channel_blocks,
                SILU=silu,
                CENTER=center,
                **tensors,
                **tables,
                **options,
            )
        else:
            _launch(
                forward_kernels.tile if isinstance(plan, Tile) else forward_kernels.loop,
                samples * plan.bundles,
                plan.num_warps,
                **_registers(plan),
                eps=eps,
                SILU=silu,
                CENTER=center,
                **tensors,
                **tables,
                **options,
            )
    layout.copy_back(results, y)
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    center: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """-> the gradients asked for by `needs`, in the order x, weight, bias, add, scale, shift."""
    inputs = (x, weight, bias, add, scale, shift)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t, need in zip(inputs, needs, strict=True) if t is not None and need]
    samples, channels = x.shape[:2]
    layout = Layout(x, num_groups)
    plan, options = _plan(layout, x, "backward")
    # x's gradient has x's strides; the others are dense, whatever theirs are.
    grads = [
        None if t is None or not need else torch.empty_like(t) if t is x else t.new_empty(t.shape)
        for t, need in zip(inputs, needs, strict=True)
    ]
    dx, dweight, dbias, dadd, dscale, dshift = grads
    results = None if dx is None else layout.view(dx)
    sum_dw, sum_dw_x_hat = None, None
    if dweight is not None or dbias is not None:
        sum_dw, sum_dw_x_hat = x.new_empty((2, samples, channels), dtype=torch.float32)
    small = {
        "sum_dw_ptr": sum_dw,
        "sum_dw_x_hat_ptr": sum_dw_x_hat,
        "dadd_ptr": dadd,
        "dscale_ptr": dscale,
        "dshift_ptr": dshift,
    }
    tensors = {"dy_ptr": layout.view(dy), "x_ptr": layout.view(x), "mean_ptr": mean, "rstd_ptr": rstd}
    tables = _tables(weight, bias, add, scale, shift)
    with _device_of(x):
        if isinstance(plan, Chunks):
            sums = x.new_empty((2 if dadd is None else 3, samples, plan.chunks, channels), dtype=torch.float32)
            level, slope = torch.empty_like(mean), torch.empty_like(rstd)
            partial = {"sums_ptr": sums, "stride": sums.stride(0), "chunks": plan.chunks, "num_groups": num_groups}
            _launch(
                backward_kernels.sums,
                samples * plan.chunks * plan.channel_blocks,
                plan.num_warps,
                chunk=plan.chunk,
                channel_blocks=plan.channel_blocks,
                NEED_D=dadd is not None,
                SILU=silu,
                CENTER=center,
                **partial,
                **tensors,
                **tables,
                **options,
            )
            block_c = min(64, power_of_two(channels // num_groups))
            _launch(
                backward_kernels.merge,
                samples * num_groups,
                _MERGING_WARPS,
                rstd_ptr=rstd,
                level_ptr=level,
                slope_ptr=slope,
                CENTER=center,
                BLOCK_CHUNKS=_MERGED // block_c,
                BLOCK_C=block_c,
                **{name: tables[name] for name in ("weight_ptr", "bias_ptr", "scale_ptr", "scale_row")},
                **partial,
                **small,
                **_sizes(options),
            )
            if results is not None:
                _launch(
                    backward_kernels.elements,
                    samples * plan.blocks * plan.channel_blocks,
                    plan.num_warps,
                    level_ptr=level,
                    slope_ptr=slope,
                    dx_ptr=results,
                    num_groups=num_groups,
                    blocks=plan.blocks,
                    channel_blocks=plan.channel_blocks,
                    SILU=silu,
                    CENTER=center,
                    **tensors,
                    **tables,
                    **options,
                )
        else:
            _launch(
                backward_kernels.tile if isinstance(plan, Tile) else backward_kernels.loop,
                samples * plan.bundles,
                plan.num_warps,
                **_registers(plan),
                dx_ptr=results,
                SILU=silu,
                CENTER=center,
                **tensors,
                **tables,
                **small,
                **options,
            )
        if sum_dw is not None:
            block_c = min(32, power_of_two(channels))
            _launch(
                backward_kernels.over_batch,
                -(-channels // block_c),
                _MERGING_WARPS,
                sum_dw_ptr=sum_dw,
                sum_dw_x_hat_ptr=sum_dw_x_hat,
                scale_ptr=tables["scale_ptr"],
                scale_row=tables["scale_row"],
                dweight_ptr=dweight,
                dbias_ptr=dbias,
                samples=samples,
                C=channels,
                BLOCK_N=_MERGED // block_c,
                BLOCK_C=block_c,
            )
    if results is not None and dx is not None:
        layout.copy_back(results, dx)
    return [grad for grad in grads if grad is not None]


def _launch(kernel: Any, programs: int, num_warps: int, **arguments: Any) -> None:
    # Said explicitly, since Triton's default, and with it bits and speed, changes with its version.
    kernel[(programs,)](num_warps=num_warps, enable_fp_fusion=True, **arguments)


def _plan(layout: Layout, x: Tensor, direction: str) -> tuple[Tile | Loop | Chunks, dict[str, Any]]:
    """How x is cut, and what the kernels must be told of it that follows from its shape."""
    return _plan_of(
        Shape(layout.positions, layout.channels, layout.num_groups, x.element_size(), layout.is_rows), direction
    )


@lru_cache(maxsize=1024)
def _plan_of(shape: Shape, direction: str) -> tuple[Tile | Loop | Chunks, dict[str, Any]]:
    plan = cut(shape, direction)
    align = shape.alignment
    options = {
        "positions": shape.positions // align["ALIGN_S"],
        "channels": shape.channels // align["ALIGN_C"],
        **align,
        "CHANNELS_LAST": shape.channels_last,
        "BLOCK_S": plan.block_s,
        "BLOCK_C": plan.block_c,
    }
    if not isinstance(plan, Chunks):
        options |= {
            "bundles": plan.bundles,
            "GROUP": shape.group_channels,
            "GROUPS": plan.groups,
            "PADDED_GROUPS": power_of_two(plan.groups),
        }
    return plan, options


def _registers(plan: Tile | Loop) -> dict[str, int]:
    """For a tile that is to stay in registers all there are: left to itself, ptxas spills some to have fewer in use."""
    if isinstance(plan, Loop) or torch.version.hip:
        return {}
    return {"maxnreg": min(_MAX_REGISTERS, _REGISTERS // (32 * plan.num_warps))}


def _sizes(options: dict[str, Any]) -> dict[str, Any]:
    """Of the options those that the merging kernels take, which see no tile."""
    return {name: options[name] for name in ("positions", "channels", "ALIGN_S", "ALIGN_C")}


def _tables(
    weight: Tensor | None, bias: Tensor | None, add: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> dict[str, Any]:
    """Their pointers and, for those that each sample has its own of, how far apart samples lie.

    Channels must lie side by side. Samples need not: scale and shift are often the halves of one projection.
    """
    given = {"weight": weight, "bias": bias, "add": add, "scale": scale, "shift": shift}
    dense = {name: t if t is None or t.stride(-1) == 1 else t.contiguous() for name, t in given.items()}
    pointers = {f"{name}_ptr": t for name, t in dense.items()}
    rows = {
        f"{name}_row": 0 if t is None else t.stride(0) for name, t in dense.items() if name in ("add", "scale", "shift")
    }
    return {**pointers, **rows}


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


group_norm_silu = register("triton_group_norm_silu", forward, backward)
