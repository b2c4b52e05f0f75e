"""The public function: checks its arguments, selects a backend and calls it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from . import eager, fusible, reference
from .arguments import NormArgs
from .cuda import launch as cuda_launch

logger = logging.getLogger(__name__)

Compute = Callable[[NormArgs], Tensor]


class Backend(NamedTuple):
    """A way to compute the operator."""

    prepare: Callable[[NormArgs], Compute]
    """Returns a differentiable function for all arguments with the signature of those given."""
    compiled: Compute  # the function for torch.compile and other tracers


# A new backend is one line here, one in `unsupported_reason` if it does not support every tensor, and one in
# `_auto_backend` if "auto" may take it. None stands for a backend whose package is not installed.
BACKENDS: dict[str, Backend | None] = {
    "eager": Backend(lambda args: eager.group_norm_silu, fusible.group_norm_silu),
    "reference": Backend(lambda args: reference.group_norm_silu, fusible.group_norm_silu),
    "triton": None,
    "cuda": Backend(cuda_launch.prepare, cuda_launch.compiled_group_norm_silu),
}
try:
    from .triton_kernels import launch as triton_launch
except ImportError:  # torch for a CPU comes without triton
    pass
else:
    BACKENDS["triton"] = Backend(triton_launch.prepare, triton_launch.compiled_group_norm_silu)
ACTIVATIONS = ("silu", None)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
_TENSORS = (Tensor, nn.Parameter)
_announced: set[tuple[str, str, str]] = set()
_prepared: dict[Hashable, Compute] = {}
"""By signature: the function of the selected backend. Arguments are checked once for each signature."""
_MAX_PREPARED = 4096


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
    center: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Group normalization, the conditioning around it and SiLU, in one differentiable operation.

        u = x + add[n, c]
        v = (u - mean) / sqrt(var + eps) * weight[c] + bias[c]     over each sample's groups of channels,
            or u / sqrt(mean(u^2) + eps) * weight[c] + bias[c] without center
        w = v * (1 + scale[n, c]) + shift[n, c]
        y = silu(w), or w where activation is None

    After Wu and He, Group Normalization (arXiv:1803.08494), as torch.nn.functional.group_norm defines it;
    `add` and `scale`/`shift` are the two ways in which diffusers' ResnetBlock2D applies a time embedding. Without
    center it is the root mean square normalization of Zhang and Sennrich (arXiv:1910.07467), over groups.

    Args:
        x: (N, C, *spatial) with any number of spatial dimensions, or none; float32, bfloat16, float16 or float64;
            any strides.
        num_groups: divides C. 1 is layer normalization over (C, *spatial), C instance normalization.
        weight, bias: (C,), of any of those dtypes.
        eps: added to the biased variance, or to the mean square.
        add, scale, shift: (N, C), of any of those dtypes.
        activation: "silu" or None.
        center: whether the groups' means are subtracted.
        backend: the implementation; "auto" takes the fastest that supports x. The choice changes the speed, not the
            formula. "cuda" and "triton" run on GPUs, the former on NVIDIA's alone, in all dtypes but
            float64; "eager" on any device; "reference" is the formula in torch ops. What torch.compile makes of the
            last two is the same.

    Returns:
        y of x's shape, dtype and memory format (contiguous, channels_last, channels_last_3d), without layout
        copies. Statistics are fp32 (float64 for float64), also under autocast, which changes nothing here.
        Backward keeps x, the groups' rstd and, if centred, mean, and the small tensors. Results are bit-identical in
        every run; with "cuda" and "triton" a sample's y and dx are bit-identical in every batch that it is part of.

    Raises:
        TypeError: an unsupported dtype; num_groups is not an integer, or eps not a number.
        ValueError: shapes do not match, num_groups does not divide C, an unknown activation or backend, a backend that
            does not support x.
    """
    args = NormArgs(x, weight, bias, add, scale, shift, num_groups, eps, activation == "silu", center)
    transformed = is_transformed()
    if transformed or torch.compiler.is_compiling() or _is_traced(x):
        if isinstance(x, fx.Proxy):
            options = {"add": add, "scale": scale, "shift": shift, "activation": activation, "center": center}
            call = (x, num_groups, weight, bias, eps), {**options, "backend": backend}
            proxy: Any = x.tracer.create_proxy("call_function", group_norm_silu, *call)
            return proxy
        _check(args, activation)
        selected = select_backend(args, backend)
        return reference.group_norm_silu(args) if transformed else selected.compiled(args)
    key = args.signature(), activation, backend
    compute = _prepared.get(key)
    if compute is None:
        _check(args, activation)
        compute = select_backend(args, backend).prepare(args)
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = compute
    return compute(args)


def select_backend(args: NormArgs, backend: str) -> Backend:
    """The backend of that name, or the one that "auto" takes for these arguments; a ValueError if it does not support
    x."""
    if backend not in backend_names():
        raise ValueError(f"backend must be one of {backend_names()}; got {backend!r}")
    name = _auto_backend(args) if backend == "auto" else backend
    reason = unsupported_reason(name, args.x)
    selected = BACKENDS[name]
    if selected is None or reason is not None:
        raise ValueError(f"backend {backend!r} {reason}; 'auto' takes one that does")
    return selected


def backend_names() -> list[str]:
    """The valid values of `backend`."""
    return ["auto", *BACKENDS]


def _auto_backend(args: NormArgs) -> str:
    """On a GPU "cuda" where it is worthwhile, else "triton"; when compiling always "triton"."""
    # This depends on a sample's shape, not on the batch or a measurement, so that neither do a sample's bits. The
    # compiler launches Triton's kernels itself, which takes less host time.
    x = args.x
    is_compiling = torch.compiler.is_compiling()
    if not x.is_cuda or (not is_compiling and x.numel() == 0):
        return _announced_backend(x, "eager", "")
    no_cuda = "is not launched by torch.compile" if is_compiling else unsupported_reason("cuda", x)
    if no_cuda is None and cuda_launch.is_worthwhile(args):
        return _announced_backend(x, "cuda", "")
    no_triton = unsupported_reason("triton", x)
    reasons = [f"'{name}' {why}" for name, why in (("cuda", no_cuda), ("triton", no_triton)) if why is not None]
    return _announced_backend(x, "eager" if no_triton else "triton", "; ".join(reasons))


def _announced_backend(x: Tensor, name: str, why: str) -> str:
    """The name; logs once which backend "auto" takes and why it is not a faster one."""
    if not torch.compiler.is_compiling() and (said := (x.device.type, name, why)) not in _announced:
        _announced.add(said)
        logger.info("group_norm_silu: backend 'auto' is %r on %s%s", name, x.device.type, why and f": {why}")
    return name


def unsupported_reason(name: str, x: Tensor) -> str | None:
    """Why a backend does not support x, or None."""
    if BACKENDS[name] is None:
        return "needs the package triton (pip install triton)"
    if name == "cuda":
        return cuda_launch.unsupported_reason(x)
    return triton_launch.unsupported_reason(x) if name == "triton" else None


def is_transformed() -> bool:
    """Whether torch.func, forward mode AD or torch.jit.trace is active, which support only torch's own operations."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def _is_traced(x: Tensor) -> bool:
    """Whether the call is recorded: x is a subclass, as FakeTensor, or a proxy, or a dispatch mode is active."""
    return torch._C._len_torch_dispatch_stack() > 0 or type(x) not in _TENSORS


def _check(args: NormArgs, activation: str | None) -> None:
    x, weight, bias, add, scale, shift, num_groups, eps, _, _ = args
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C, *spatial); got shape {tuple(x.shape)}")
    n, c = x.shape[:2]
    if not torch.compiler.is_compiling():  # where numbers may be symbols
        if not hasattr(num_groups, "__index__") or isinstance(num_groups, Tensor):
            raise TypeError(f"num_groups must be an integer; got {num_groups!r}")
        if not hasattr(eps, "__float__") or isinstance(eps, Tensor):
            raise TypeError(f"eps must be a number; got {eps!r}")
    if num_groups < 1 or c % num_groups:
        valid = [g for g in range(1, c + 1) if c % g == 0]
        raise ValueError(f"num_groups must divide x's {c} channels; got {num_groups}, valid are {valid}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}; got {activation!r}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be one of {_DTYPE_NAMES}; got {x.dtype}")
    for name, tensor, shape in (
        ("weight", weight, (c,)),
        ("bias", bias, (c,)),
        ("add", add, (n, c)),
        ("scale", scale, (n, c)),
        ("shift", shift, (n, c)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            given = f"{tuple(tensor.shape)} with x of {tuple(x.shape)}"
            raise ValueError(f"{name} must have shape {shape}; got {given}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be one of {_DTYPE_NAMES}; got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}; got {tensor.device}")
