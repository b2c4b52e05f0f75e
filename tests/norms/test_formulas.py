"""Every kind against its published formula in float64: values and gradients, in training and in evaluation."""

import copy

import pytest
import torch

from gnunet.norms import NORMS, make_conv, make_norm

TABLES = ("add", "scale", "shift")
CASES = [  # spatial sizes, what is given, and the activation
    ((), TABLES, "silu"),
    ((9,), TABLES, None),
    ((4, 3), TABLES, "silu"),
    ((2, 3, 2), TABLES, None),
    ((4, 3), (), None),
    ((4, 3), ("add",), "silu"),
    ((4, 3), ("scale",), None),
    ((4, 3), ("shift",), "silu"),
]


def upstream(y, dtype):
    """A gradient for y: cos(0), cos(1), ..., rounded to dtype."""
    return torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape).to(dtype)


def run(layer, x, tables):
    """y and the gradients of x, the tables and the parameters."""
    x = x.clone().requires_grad_()
    tables = {name: table.clone().requires_grad_() for name, table in tables.items()}
    y = layer(x, **tables)
    inputs = {"x": x, **tables, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(y, list(inputs.values()), upstream(y, y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}}


@pytest.fixture
def expect(exact):
    def values_and_gradients(kind, layer, x, tables, activation):
        leaves = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
        leaves |= {name: table.double().requires_grad_() for name, table in tables.items()}
        buffers = {name: buffer.double() for name, buffer in layer.named_buffers()}
        dtype, x = x.dtype, x.double().requires_grad_()
        y = exact(kind, x, {**leaves, **buffers}, activation=activation, training=layer.training)
        grads = torch.autograd.grad(y, [x, *leaves.values()], upstream(y, dtype).double())
        return {"y": y.detach(), **{f"d{name}": g for name, g in zip(["x", *leaves], grads, strict=True)}}

    return values_and_gradients


def assert_close(found, expected, tolerance, case=""):
    """By the root mean square of the difference, relative to that of the expected value."""
    assert found.keys() == expected.keys(), case
    for name, value in expected.items():
        assert found[name].shape == value.shape, (name, case)
        error = float((found[name].double() - value).square().mean().sqrt())
        # Some gradients are 0 but for rounding, as that of `add` where every channel is centred.
        size = 1 + float(value.square().mean().sqrt())
        assert error <= tolerance * size, (name, case)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_float64(make_layer, draw, expect, kind, training):
    for spatial, given, activation in CASES:
        layer = make_layer(kind, activation=activation).train(training)
        tables = {name: draw(5, 12, seed=seed) for seed, name in enumerate(given, 1)}
        x = draw(5, 12, *spatial, mean=0.5)
        expected = expect(kind, layer, x, tables, activation)
        assert_close(run(layer, x, tables), expected, 1e-9, (spatial, given, activation))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", NORMS)
def test_lower_precision_far_from_zero(make_layer, draw, expect, kind, dtype, tolerance, training):
    """x in dtype, parameters and tables in fp32, under an autocast that must not reach the statistics."""
    layer = make_layer(kind).float().train(training)
    tables = {name: draw(5, 12, seed=seed).float() for seed, name in enumerate(TABLES, 1)}
    x = draw(5, 12, 4, 3, mean=3.0).to(dtype)
    expected = expect(kind, layer, x, tables, "silu")
    with torch.autocast("cpu", torch.bfloat16):
        found = run(layer, x, tables)
    assert found["y"].dtype == found["dx"].dtype == dtype
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("kind", NORMS)
def test_layouts(make_layer, draw, kind):
    layer = make_layer(kind)
    for x, memory_format in (
        (draw(4, 12, 3, 2), torch.channels_last),
        (draw(4, 12, 2, 3, 2), torch.channels_last_3d),
    ):
        y = copy.deepcopy(layer)(x)
        assert y.is_contiguous()
        other = copy.deepcopy(layer)(x.contiguous(memory_format=memory_format))
        assert other.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(other, y)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_meta_device(make_layer, kind, training):
    layer = make_layer(kind).to("meta").train(training)
    x = torch.empty(4, 12, 3, 5, dtype=torch.bfloat16, device="meta", requires_grad=True)
    y = layer(x, add=torch.empty(4, 12, device="meta"))
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    conv = make_conv({"kind": kind, "groups": 4}, 12, 6, 3).to("meta")
    assert conv(x.float()).shape == (4, 6, 1, 3)


@pytest.mark.parametrize("kind", NORMS)
def test_compiles_in_one_graph(make_layer, draw, kind):
    torch._dynamo.reset()
    layer = make_layer(kind).float()
    compiled = copy.deepcopy(layer)
    compiled.compile(fullgraph=True, backend="aot_eager")
    x, tables = draw(4, 12, 3, 2).float(), {name: draw(4, 12, seed=seed).float() for seed, name in enumerate(TABLES)}
    for training in (True, False):
        found, expected = run(compiled.train(training), x, tables), run(layer.train(training), x, tables)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled.state_dict(), layer.state_dict())


@pytest.mark.parametrize("kind", NORMS)
def test_has_second_derivatives(make_layer, draw, kind):
    layer = make_layer(kind, 4, groups=2).eval()
    x = draw(2, 4, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x), x)


def test_wrong_shapes_of_conditioning_are_errors():
    layer = make_norm({"kind": "rms"}, 12, activation="silu")
    with pytest.raises(ValueError, match=r"scale must have shape \(2, 12\); got \(12,\)"):
        layer(torch.randn(2, 12, 3), scale=torch.zeros(12))
    with pytest.raises(ValueError, match="'gelu'"):
        make_norm({"kind": "rms"}, 12, activation="gelu")
