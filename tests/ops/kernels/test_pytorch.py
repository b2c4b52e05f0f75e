"""The kernels among PyTorch's systems: the compiler, saved tensors, second derivatives."""

import pytest
import torch

from gnunet.ops import group_norm_silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["cuda", "triton"]
ALL = ("weight", "bias", "add", "scale", "shift")


@pytest.mark.parametrize(("given", "center"), [((), True), (("weight", "bias"), True), (ALL, True), (ALL, False)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(make_case, layout, given, center, backend):
    case = make_case((2, 6, 4, 5), 3, layout=layout, given=given, device=DEVICE)
    tensors = [case.tensors.get(name) for name in ALL]
    options = (True, center, "")
    operator = getattr(torch.ops.gnunet, f"{backend}_group_norm_silu")
    torch.library.opcheck(operator, (case.x, 3, *tensors[:2], 1e-5, *tensors[2:], *options))
    x, *tensors = (t if t is None else t.detach() for t in (case.x, *tensors))
    arguments = (x, 3, *tensors[:2], 1e-5, *tensors[2:], *options)
    _, stats = operator(*arguments)
    needs = [t is not None for t in (x, *tensors)]
    torch.library.opcheck(
        getattr(torch.ops.gnunet, f"{backend}_group_norm_silu_backward"),
        (torch.randn_like(x), stats, needs, *arguments),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("center", [True, False])
def test_compiles_without_a_graph_break(make_case, center, backend):
    torch.compiler.reset()
    case = make_case((2, 16, 8, 8), 4, layout="channels_last", given=ALL, center=center, device=DEVICE)
    dy = torch.randn(2, 16, 8, 8, device=DEVICE)
    expected = case.run_with_gradients(dy, backend)

    def function(x, tensors):
        return group_norm_silu(x, 4, center=center, backend=backend, **tensors)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    y = compiled(case.x, case.tensors)
    grads = torch.autograd.grad(y, [case.x, *case.tensors.values()], dy)
    for value, name in zip((y, *grads), expected, strict=True):
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("center", [True, False])
def test_unneeded_gradients_are_left_out(center, backend):
    x, weight = torch.randn(2, 4, 3, 3, device=DEVICE), torch.randn(4, device=DEVICE, requires_grad=True)
    add = torch.randn(2, 4, device=DEVICE, requires_grad=True)
    zeros = torch.zeros(4, device=DEVICE)
    group_norm_silu(x, 2, weight, zeros, add=add, center=center, backend=backend).sum().backward()
    assert x.grad is None and weight.grad.shape == (4,) and add.grad.shape == (2, 4)
