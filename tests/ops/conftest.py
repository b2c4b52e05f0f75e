"""Inputs of the operator, and the formula in float64 to measure against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cuda_emulation
from gnunet.ops import group_norm_silu

if not torch.cuda.is_available():
    cuda_emulation.install()


def _lay_out(x: Tensor, layout: str) -> Tensor:
    """x's values in another memory layout."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":  # dense, but neither contiguous nor channels_last
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "sliced":  # not dense, and not at the start of its storage
        return torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]]
    return x.contiguous()


@dataclass
class Case:
    """Arguments of one call, whose tensors are leaves that require gradients, and the gradient of y."""

    x: Tensor
    dy: Tensor
    num_groups: int
    eps: float = 1e-5
    activation: str | None = "silu"
    center: bool = True
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def run(self, backend: str = "auto") -> Tensor:
        options = {"eps": self.eps, "activation": self.activation, "center": self.center, "backend": backend}
        return group_norm_silu(self.x, self.num_groups, **options, **self.tensors)

    def run_with_gradients(self, backend: str = "auto", compiled: bool = False) -> dict[str, Tensor]:
        """y and the gradients, as dx, dweight, ..."""
        run = torch.compile(self.run, fullgraph=True, backend="aot_eager") if compiled else self.run
        y = run(backend)
        inputs = {"x": self.x, **self.tensors}
        grads = torch.autograd.grad(y, list(inputs.values()), self.dy)
        return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}}

    def exact(self) -> dict[str, Tensor]:
        """What `run_with_gradients` returns, by the formula in float64."""
        return self.double().run_with_gradients("reference")

    def assert_right(self, results: dict[str, Tensor], tolerances: dict[torch.dtype, float]) -> None:
        """Compare results of `run_with_gradients` with the exact ones. The tolerance is that of x's dtype or the
        result's, the larger one, because either is rounded."""
        exact = self.exact()
        for name, value in results.items():
            tolerance = max(tolerances[self.x.dtype], tolerances[value.dtype])
            assert _relative_error(value, exact[name], self.floor(name)) < tolerance, name
            like = self.x if name in ("y", "dx") else self.tensors[name[1:]]
            assert (value.dtype, value.shape) == (like.dtype, like.shape), name

    def floor(self, name: str, least: float = 0.5) -> float:
        """What the error of a result is relative to at least. A gradient may be exactly zero; that of add, a sum over
        the positions, is where a group is one channel and centred."""
        return least * self.x.shape[2:].numel() ** 0.5 if name == "dadd" else least

    def double(self) -> Case:
        tensors = {name: t.detach().double().requires_grad_() for name, t in self.tensors.items()}
        x = self.x.detach().double().requires_grad_()
        return Case(x, self.dy.double(), self.num_groups, self.eps, self.activation, self.center, tensors)

    def opcheck(self, operator: str) -> None:
        """Check gnunet::OPERATOR and gnunet::OPERATOR_backward."""
        tensors = (self.x, *map(self.tensors.get, ("weight", "bias", "add", "scale", "shift")))
        inputs = (*tensors, self.num_groups, self.eps, self.activation == "silu", self.center, "")
        torch.library.opcheck(getattr(torch.ops.gnunet, operator), inputs)
        detached = [t.detach() if isinstance(t, Tensor) else t for t in inputs]
        _, stats = getattr(torch.ops.gnunet, operator)(*detached)
        needs = [t is not None for t in tensors]
        backward = getattr(torch.ops.gnunet, f"{operator}_backward")
        torch.library.opcheck(backward, (self.dy, stats, needs, *detached))


def _make_case(
    shape: tuple[int, ...],
    num_groups: int,
    *,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    given: tuple[str, ...] = ("weight", "bias"),
    activation: str | None = "silu",
    center: bool = True,
    mean: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Random values; `given` names the optional tensors that are not None."""
    generator = torch.Generator().manual_seed(seed)
    x = _lay_out((torch.randn(shape, generator=generator) + mean).to(device, dtype), layout).requires_grad_()
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).to(device, dtype)
    tensors = {}
    for name in given:
        size = shape[1:2] if name in ("weight", "bias") else shape[:2]
        values = torch.randn(size, generator=generator).to(device, parameter_dtype or dtype)
        tensors[name] = values.requires_grad_()
    return Case(x, dy, num_groups, activation=activation, center=center, tensors=tensors)


def _norm_of_torch(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, center: bool = True
) -> Tensor:
    """By PyTorch's own layers; x: (N, C, *spatial) with at least one spatial dimension."""
    if center:
        return F.group_norm(x, num_groups, weight, bias, eps)
    groups = x.reshape(len(x), num_groups, -1)
    weight, bias = (p.reshape(-1, *(1,) * (x.dim() - 2)) for p in (weight, bias))
    return F.rms_norm(groups, groups.shape[2:], eps=eps).view(x.shape) * weight + bias


def _relative_error(value: Tensor, exact: Tensor, floor: float = 1e-12) -> float:
    """Root mean square of the difference over that of the exact value, or over `floor` if that is larger."""
    value, exact = value.detach(), exact.detach()
    difference = (value.double() - exact).square().mean().sqrt()
    return float(difference / exact.square().mean().sqrt().clamp_min(floor))


# Test modules cannot import from here under pytest's importlib mode, so the helpers are fixtures.


@pytest.fixture(scope="session")
def lay_out() -> Callable[[Tensor, str], Tensor]:
    return _lay_out


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    return _make_case


@pytest.fixture(scope="session")
def norm_of_torch() -> Callable[..., Tensor]:
    return _norm_of_torch


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    return _relative_error
