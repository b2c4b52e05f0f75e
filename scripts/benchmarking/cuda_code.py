"""The kernels of group_norm_silu.cu compiled for a GPU that is not here, by NVRTC."""

from __future__ import annotations

from unittest import mock

import torch

from benchmarking.model import KernelCode, Work
from gnunet.ops.arguments import NormArgs
from gnunet.ops.cuda import compiler
from gnunet.ops.cuda import launch as op
from gnunet.ops.cuda.tiling import Gpu, Tiling, channels_at_once, sector_overhead
from gnunet.ops.planned import Shape

GPUS = {80: Gpu(163 * 1024, 1), 90: Gpu(227 * 1024, 16), 100: Gpu(227 * 1024, 16)}
"""What the tiling depends on, of GPUs of these compute capabilities, times 10."""
FEW_SAMPLES = 32
"""That group_norm_silu.cu adds up in one step."""


def launches(args: NormArgs, arch: int = 90) -> dict[str, list[tuple[op.Launch, Work]]]:
    """What forward and backward launch on arguments, which are on the meta device; nothing runs. Empty lists where the
    kernels do not take them."""
    with torch.device("meta"), mock.patch.object(op, "gpu_of", lambda device: GPUS[arch]):
        if op.tilings(Shape.of(args), GPUS[arch], args.add is not None) is None:
            return {"forward": [], "backward": []}
        plans = {
            "forward": op.plan_forward(args),
            "backward": op.plan_backward(args, [t is not None for t in args.tensors]),
        }
    return {direction: [(launch, _work(launch, args)) for launch in plan.launches] for direction, plan in plans.items()}


def _work(launch: op.Launch, args: NormArgs) -> Work:
    tiling, shape = launch.tiling, Shape.of(args)
    is_backward = launch.direction == "backward"
    overhead = sector_overhead(tiling.width, shape) if shape.channels_last else 1.0
    last_loads = _loads_over_samples(tiling, len(args.x)) if is_backward and len(args.x) > 1 else 0
    return Work(launch.blocks, tiling.steps, tiling.share_held, overhead, last_loads)


def _loads_over_samples(tiling: Tiling, samples: int) -> int:
    """Counting samples is as long as a load; then rows are added, several at a time: of a bundle, and of bundles."""
    size = 1 if samples <= FEW_SAMPLES else -(-samples // (op.SPARE - 1))
    channels = channels_at_once(tiling.width, tiling.threads)
    columns = min(tiling.threads, tiling.width // channels)
    turns = -(-tiling.width // (columns * channels))
    at_once = tiling.threads // columns * (8 if channels == 4 else 16)  # as the loop is unrolled
    steps = [size, -(-samples // size)] if size > 1 else [samples]
    return sum(1 + -(-rows // at_once) * turns for rows in steps)


def compile_launch(launch: op.Launch, arch: int) -> KernelCode:
    """The machine code for a GPU of compute capability arch / 10."""
    tiling = launch.tiling
    return KernelCode.read(
        compiler.cubin(launch.options, arch),
        kernel=launch.kernel.removeprefix("group_norm_silu_"),
        warps=tiling.threads // 32,
        shared=tiling.shared_bytes,
        tile=tiling.threads * tiling.vector,
        ranks=tiling.ranks,
        vector=tiling.vector,
    )
