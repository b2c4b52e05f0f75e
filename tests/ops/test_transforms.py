"""The operator under what only torch's own operations know: torch.func, forward mode, torch.jit.trace, fake tensors."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

from gnunet.ops import GroupNormSiLU, group_norm_silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["auto", "eager", "reference", "cuda", *(["triton"] if importlib.util.find_spec("triton") else [])]


@pytest.fixture(params=BACKENDS)
def functions(request):
    """The operator, and PyTorch's own."""

    def ours(x, weight, bias):
        return group_norm_silu(x, 3, weight, bias, backend=request.param)

    return ours, lambda x, weight, bias: F.silu(F.group_norm(x, 3, weight, bias))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(DEVICE) for size in ((4, 12, 5, 5), (12,), (12,))]


def by_grad(function, x, weight, bias):
    return grad(lambda w: function(x, w, bias).square().sum())(weight)


def by_vmap_of_grad(function, x, weight, bias):
    return vmap(grad(lambda w, image: function(image[None], w, bias).square().sum()), (None, 0))(weight, x)


def by_vmap_over_channels_last(function, x, weight, bias):
    return vmap(lambda w: function(x.contiguous(memory_format=torch.channels_last), w, bias))(weight.expand(2, -1))


def by_jacrev(function, x, weight, bias):
    return jacrev(lambda b: function(x, weight, b))(bias)


def by_jvp(function, x, weight, bias):
    return jvp(lambda x, w: function(x, w, bias), (x, weight), (x.flip(0), weight.flip(0)))[1]


def by_dual(function, x, weight, bias):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.flip(0)), weight, bias)).tangent


def by_batched_gradients(function, x, weight, bias):
    x = x.clone().requires_grad_()
    y = function(x, weight, bias)
    return torch.autograd.grad(y, x, torch.stack([y.detach(), torch.ones_like(y)]), is_grads_batched=True)[0]


WAYS = [by_grad, by_vmap_of_grad, by_vmap_over_channels_last, by_jacrev, by_jvp, by_dual, by_batched_gradients]


@pytest.mark.parametrize("way", WAYS)
def test_transforms_give_what_they_give_of_pytorchs_operators(functions, inputs, way):
    ours, pytorchs = functions
    torch.testing.assert_close(way(ours, *inputs), way(pytorchs, *inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [by_grad, by_jvp])
def test_transforms_inside_the_compiler(functions, inputs, way):
    torch.compiler.reset()
    ours, pytorchs = functions
    compiled = torch.compile(lambda *inputs: way(ours, *inputs), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), way(pytorchs, *inputs), rtol=1e-4, atol=1e-4)


def test_a_compiled_function_in_forward_mode(functions, inputs):
    torch.compiler.reset()
    ours, pytorchs = functions
    compiled = torch.compile(ours, backend="aot_eager")
    compiled(*inputs)
    torch.testing.assert_close(by_dual(compiled, *inputs), by_dual(pytorchs, *inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("trace", [torch.jit.trace, lambda module, x: torch.fx.symbolic_trace(module)])
def test_a_traced_module_takes_other_sizes(trace):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3), GroupNormSiLU(3, 12)).to(DEVICE)
    traced = trace(module, torch.randn(2, 3, 8, 8, device=DEVICE))
    x = torch.randn(3, 3, 9, 11, device=DEVICE)
    torch.testing.assert_close(traced(x), module(x), rtol=1e-4, atol=1e-5)


def test_fake_tensors(functions):
    with FakeTensorMode():
        x = torch.empty(2, 12, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
        y = functions[0](x, torch.empty(12), None)
        assert y.shape == x.shape and y.stride() == x.stride()
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
