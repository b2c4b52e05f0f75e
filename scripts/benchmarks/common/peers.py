"""What benchmark_op.py compares: ways to compute silu(group_norm(x)), and how far each is from float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from common.shapes import Case
from gnunet.ops import group_norm_silu

EPS = 1e-5
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative error (root mean square) above which a result is wrong, not rounded. Several roundings stay below it."""
_REFERENCE_ELEMENTS = 2**25  # computed at once: several float64 tensors of this size fit on any GPU

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x, weight, bias -> y"""


class Unavailable(Exception):
    """This peer cannot compute this case; says why."""


@dataclass(frozen=True)
class Contender:
    """A function to time, and the memory layout in which it takes x and dy."""

    function: Function
    layout: str


def _formula(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias, EPS))


def gnunet(case: Case, backend: str = "auto") -> Contender:
    """The operator, by the backend named."""

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x, case.num_groups, weight, bias, EPS, backend=backend)

    return Contender(function, case.layout)


def _kernels(backend: str) -> Callable[[Case], Contender]:
    def contender(case: Case) -> Contender:
        if not torch.cuda.is_available():
            raise Unavailable("needs a GPU")
        return gnunet(case, backend)

    return contender


def _eager(layout: str) -> Callable[[Case], Contender]:
    return lambda case: Contender(lambda x, weight, bias: _formula(x, weight, bias, case.num_groups), layout)


def _compiled(case: Case) -> Contender:
    torch.compiler.reset()  # every case is compiled from nothing, far from any limit on recompilations
    # The compiler may otherwise plan to overwrite what a graph saved, and then refuses to run it backward twice.
    torch._functorch.config.donated_buffer = False
    formula = torch.compile(_formula, dynamic=False, fullgraph=True)
    return Contender(lambda x, weight, bias: formula(x, weight, bias, case.num_groups), case.layout)


def _apex(case: Case) -> Contender:
    try:
        from apex.contrib.group_norm import GroupNorm
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error
    if case.layout != "channels_last" or len(case.shape) != 4:
        raise Unavailable("4-D channels_last only")
    if case.shape[1] not in GroupNorm.SUPPORTED_CHANNELS or case.num_groups not in GroupNorm.SUPPORTED_GROUPS:
        raise Unavailable("passes these channels and groups on to PyTorch")
    module = GroupNorm(case.num_groups, case.shape[1], EPS, device="cuda", dtype=case.dtype, act="silu")

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        module.weight, module.bias = weight, bias
        return module(x)

    return Contender(function, case.layout)


def _liger(case: Case) -> Contender:
    try:
        from liger_kernel.ops.group_norm import LigerGroupNormFunction
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error
    if case.layout != "contiguous":
        raise Unavailable("contiguous only")
    channels = case.shape[1]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # With more dimensions than 3 its backward pass writes out of bounds (linkedin/Liger-Kernel#1375).
        y = LigerGroupNormFunction.apply(x.flatten(2), weight, bias, channels, case.num_groups, EPS)
        return F.silu(y).view(x.shape)

    return Contender(function, case.layout)


PEERS: dict[str, Callable[[Case], Contender]] = {
    "eager_contiguous": _eager("contiguous"),
    "eager_channels_last": _eager("channels_last"),
    "compile": _compiled,
    "apex": _apex,
    "liger": _liger,
    "gnunet_cuda": _kernels("cuda"),
    "gnunet_triton": _kernels("triton"),
}
"""The two eager peers take x in the layout they are named after, the others in the case's. The last two show whether
"auto" is the faster of them.

Weight and bias have x's dtype, and autocast, under which PyTorch's group_norm computes in fp32, is off: both favour
the peers.
"""


def exact(case: Case, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients in float64, by PyTorch's formula, some groups at a time."""
    y, dx = torch.empty_like(x, dtype=torch.float64), torch.empty_like(x, dtype=torch.float64)
    dweight, dbias = torch.empty_like(weight, dtype=torch.float64), torch.empty_like(bias, dtype=torch.float64)
    group_channels = case.shape[1] // case.num_groups
    groups = max(1, _REFERENCE_ELEMENTS * case.num_groups // case.numel)
    for start in range(0, case.num_groups, groups):
        part = slice(start * group_channels, (start + groups) * group_channels)
        inputs = [t.detach().double().requires_grad_() for t in (x[:, part], weight[part], bias[part])]
        y_part = _formula(inputs[0], inputs[1], inputs[2], inputs[0].shape[1] // group_channels)
        y[:, part] = y_part.detach()
        dx[:, part], dweight[part], dbias[part] = torch.autograd.grad(y_part, inputs, dy[:, part].double())
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square of the difference over that of the exact value, for each tensor."""
    return {
        name: float((found[name].detach().double() - value).norm() / value.norm()) for name, value in expected.items()
    }


def is_right(case: Case, error: dict[str, float]) -> bool:
    """Whether every error is within what rounding explains; NaN is not."""
    return all(value <= TOLERANCE[case.dtype] for value in error.values())
