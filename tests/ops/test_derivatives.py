"""First and second derivatives, against finite differences."""

import pytest
import torch

ALL = ("weight", "bias", "add", "scale", "shift")


def check(gradcheck, case, backend):
    names = list(case.tensors)

    def function(x, *tensors):
        case.x, case.tensors = x, dict(zip(names, tensors, strict=True))
        return case.run(backend)

    return gradcheck(function, (case.x, *case.tensors.values()))


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize(
    ("given", "center", "activation", "layout"),
    [
        ((), True, "silu", "contiguous"),
        (("weight", "bias"), True, None, "channels_last"),
        (("scale",), True, "silu", "channels_last"),
        (ALL, True, "silu", "contiguous"),
        (ALL, True, None, "channels_last"),
        ((), False, None, "channels_last"),
        (ALL, False, "silu", "channels_last"),
        (ALL, False, None, "contiguous"),
    ],
)
def test_against_finite_differences(make_case, given, center, activation, layout, backend):
    options = {"layout": layout, "given": given, "activation": activation, "center": center}
    case = make_case((2, 6, 3, 2), 3, dtype=torch.float64, **options)
    assert check(torch.autograd.gradcheck, case, backend)
    assert check(torch.autograd.gradgradcheck, case, backend)


@pytest.mark.parametrize("center", [True, False])
def test_gradient_penalty_reaches_the_inputs_history(make_case, center):
    """The gradient of a gradient's norm, through what x and the parameters were computed from."""
    case = make_case((2, 6, 4, 4), 3, dtype=torch.float64, given=ALL, center=center)

    def penalty(backend):
        case.x = leaf * leaf
        case.tensors = {name: 2 * t for name, t in leaves.items()}
        (grad,) = torch.autograd.grad(case.run(backend).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [leaf, *leaves.values()])

    leaf = case.x.detach().requires_grad_()
    leaves = {name: t.detach().requires_grad_() for name, t in case.tensors.items()}
    for ours, exact in zip(penalty("eager"), penalty("reference"), strict=True):
        torch.testing.assert_close(ours, exact)
