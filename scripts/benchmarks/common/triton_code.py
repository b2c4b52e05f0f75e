"""The Triton kernels compiled for a GPU that is not here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from common.sass import KernelCode
from gnunet.ops.arguments import NormArgs
from gnunet.ops.triton_kernels import launch as op

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
WARP = 32
ALIGNMENT = 16  # bytes, of tensors, and divisor of numbers that Triton compiles another kernel for


@dataclass(frozen=True)
class Launch:
    """A kernel and all that decides how it is compiled."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


def launches(args: NormArgs, arch: int) -> list[Launch]:
    """What forward and backward launch on arguments, which are on the meta device; nothing runs."""
    with torch.device("meta"), mock.patch.object(op, "_is_nvidia", lambda x: True):
        plans = op.plan_forward(args), op.plan_backward(args, [t is not None for t in args.tensors])
    types: dict[str, torch.dtype | None] = {"y": args.x.dtype, "dy": args.x.dtype, "stats": torch.float32}
    for name, t in zip(("x", "weight", "bias", "add", "scale", "shift"), args.tensors, strict=True):
        types[name] = types[f"d{name}"] = None if t is None else t.dtype
    found = []
    for plan in plans:
        given = types | {name: torch.float32 if size else None for name, size in plan.buffers.items()}
        found += [_specialized(launch, given) for launch in plan.launches]
    return found


def _specialized(launch: op.Launch, dtypes: dict[str, torch.dtype | None]) -> Launch:
    """The arguments as Triton specializes them: by type, by divisibility by 16, by being 1 or None."""
    types, constants, aligned = [], [], []
    values = [*(dtypes[name] for name in launch.tensors), *launch.values]
    for i, (parameter, value) in enumerate(zip(launch.kernel.params, values, strict=True)):
        is_special = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_special and value == 1):
            constants.append((parameter.name, value))
            types.append((parameter.name, "constexpr"))
        elif isinstance(value, torch.dtype):
            types.append((parameter.name, TYPES[value]))
            aligned.append(i)
        elif isinstance(value, int):
            types.append((parameter.name, "i32" if value < 2**31 else "i64"))
            if is_special and value % ALIGNMENT == 0:
                aligned.append(i)
        else:
            types.append((parameter.name, "fp32"))
    return Launch(launch.kernel.__name__, tuple(types), tuple(constants), tuple(aligned), tuple(launch.options.items()))


def compile_launch(launch: Launch, arch: int) -> KernelCode:
    """The machine code for a GPU of compute capability arch / 10."""
    module = op.forward_kernels if launch.kernel.startswith("fwd") else op.backward_kernels
    attributes = {(i,): [["tt.divisibility", ALIGNMENT]] for i in launch.aligned}
    source = ASTSource(getattr(module, launch.kernel), dict(launch.signature), dict(launch.constants), attributes)
    options = dict(launch.options)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=options)
    constants = dict(launch.constants)
    tile = constants.get("BLOCK_S", constants.get("BLOCK_K", 0)) * constants["BLOCK_C"]
    return KernelCode.read(
        compiled.asm["cubin"],
        kernel=launch.kernel,
        warps=options["num_warps"],
        shared=compiled.metadata.shared,
        tile=tile,
    )
