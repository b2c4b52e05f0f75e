"""The kernels among PyTorch's systems: the compiler, saved tensors, second derivatives."""

import pytest
import torch

from gnunet.ops import group_norm_silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["cuda", "triton"]
ALL = ("weight", "bias", "add", "scale", "shift")


@pytest.mark.parametrize(
    ("given", "center", "layout"),
    [((), True, "contiguous"), (ALL, True, "channels_last"), (ALL, False, "contiguous")],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(make_case, layout, given, center, backend):
    case = make_case((2, 6, 4, 5), 3, layout=layout, given=given, center=center, device=DEVICE)
    case.opcheck(f"{backend}_group_norm_silu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("center", [True, False])
def test_compiles_without_a_graph_break(make_case, center, backend):
    torch.compiler.reset()
    case = make_case((2, 16, 8, 8), 4, layout="channels_last", given=ALL, center=center, device=DEVICE)
    expected = case.run_with_gradients(backend)
    for name, value in case.run_with_gradients(backend, compiled=True).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("center", [True, False])
def test_second_derivatives_are_those_of_the_formula(center, kernels):
    x = torch.randn(2, 6, 4, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(6, device=DEVICE, requires_grad=True)
    results = []
    for backend in (kernels, "reference"):
        y = group_norm_silu(x, 3, weight, center=center, backend=backend)
        dx, dweight = torch.autograd.grad(y.square().sum(), [x, weight], create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum() + dweight.square().sum(), [x, weight]))
    for ours, formula in zip(*results, strict=True):
        torch.testing.assert_close(ours, formula, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("center", [True, False])
def test_unneeded_gradients_are_left_out(make_case, center, layout, backend):
    case = make_case((2, 4, 3, 3), 2, given=("weight", "bias", "add"), layout=layout, center=center, device=DEVICE)
    expected = case.run_with_gradients(backend)
    for t in (case.x, case.tensors["bias"]):
        t.requires_grad_(False)
    for needed in (("weight", "add"), ("weight",)):
        case.tensors["add"].requires_grad_("add" in needed)
        grads = torch.autograd.grad(case.run(backend), [case.tensors[name] for name in needed], case.dy)
        for name, grad in zip(needed, grads, strict=True):
            torch.testing.assert_close(grad, expected[f"d{name}"])
