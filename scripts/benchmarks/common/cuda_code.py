"""The kernels of group_norm_silu.cu compiled for a GPU that is not here, by NVRTC."""

from __future__ import annotations

from unittest import mock

import torch

from common.sass import KernelCode
from gnunet.ops.arguments import NormArgs
from gnunet.ops.cuda import compiler
from gnunet.ops.cuda import launch as op
from gnunet.ops.cuda.tiling import Gpu
from gnunet.ops.planned import Shape

GPUS = {80: Gpu(163 * 1024, 1), 90: Gpu(227 * 1024, 16), 100: Gpu(227 * 1024, 16)}
"""What the tiling depends on, of GPUs of these compute capabilities, times 10."""


def launches(args: NormArgs, arch: int = 90) -> list[op.Launch]:
    """What forward and backward launch on arguments, which are on the meta device; nothing runs. Nothing where the
    kernels do not take them."""
    with torch.device("meta"), mock.patch.object(op, "gpu_of", lambda device: GPUS[arch]):
        if op.tilings(Shape.of(args), GPUS[arch], args.add is not None) is None:
            return []
        backward = op.plan_backward(args, [t is not None for t in args.tensors])
        return [*op.plan_forward(args).launches, *backward.launches]


def compile_launch(launch: op.Launch, arch: int) -> KernelCode:
    """The machine code for a GPU of compute capability arch / 10."""
    return KernelCode.read(
        compiler.cubin(launch.options, arch),
        kernel=launch.name,
        warps=launch.threads // 32,
        shared=launch.shared_bytes,
        tile=launch.threads * (launch.tiling.vector if launch.tiling else 1),
    )
