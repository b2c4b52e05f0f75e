"""The operator's numbers, against the formula in float64."""

import math
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gnunet.ops import fusible, group_norm_silu
from gnunet.ops.group_norm_silu import BACKENDS, Backend

OPTIONAL = ("weight", "bias", "add", "scale", "shift")
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.6e-3, torch.float64: 1e-12}


@pytest.fixture(scope="module", autouse=True)
def fusible_as_a_backend():
    """Without a compiler, what one is given."""
    with patch.dict(BACKENDS, fusible=Backend(lambda args: fusible.group_norm_silu, fusible.group_norm_silu)):
        yield


@st.composite
def cases(draw):
    """Keyword arguments of make_case."""
    groups = draw(st.sampled_from([1, 2, 3, 5, 8]))
    channels = groups * draw(st.sampled_from([1, 2, 3, 6, 10]))
    spatial = draw(st.lists(st.sampled_from([1, 2, 3, 5, 7, 16]), max_size=5).filter(lambda s: math.prod(s) <= 4096))
    # A group of one element has no gradient but rounding errors.
    spatial = spatial if channels // groups * torch.Size(spatial).numel() > 4 else [7]
    return {
        "shape": (draw(st.sampled_from([1, 2, 5])), channels, *spatial),
        "num_groups": groups,
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "parameter_dtype": draw(st.sampled_from([None, torch.float32, torch.bfloat16])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "given": tuple(name for name in OPTIONAL if draw(st.booleans())),
        "activation": draw(st.sampled_from(["silu", None])),
        "center": draw(st.booleans()),
        "mean": draw(st.sampled_from([0.0, 3.0])),
        "seed": draw(st.integers(0, 99)),
    }


@pytest.mark.parametrize("backend", ["eager", "reference", "fusible"])
@settings(max_examples=160, deadline=None, derandomize=True)
@given(arguments=cases())
def test_values_and_gradients_are_those_of_the_formula(make_case, backend, arguments):
    case = make_case(**arguments)
    case.assert_right(case.run_with_gradients(backend), TOLERANCE)


@pytest.mark.parametrize("center", [True, False])
def test_is_torchs_norm_then_silu(norm_of_torch, center):
    x, weight, bias = torch.randn(2, 12, 9, 9) + 1, torch.randn(12), torch.randn(12)
    y = group_norm_silu(x, 4, weight, bias, 1e-3, center=center)
    torch.testing.assert_close(y, F.silu(norm_of_torch(x, 4, weight, bias, 1e-3, center)))
    y = group_norm_silu(x, 4, weight, bias, activation=None, center=center)
    torch.testing.assert_close(y, norm_of_torch(x, 4, weight, bias, center=center))


def test_conditioning_is_that_of_diffusers_resnet_blocks():
    x, t = torch.randn(2, 12, 5, 5), torch.randn(2, 24)
    scale, shift = t.chunk(2, dim=1)
    add_first = F.silu(F.group_norm(x + scale[:, :, None, None], 3))
    torch.testing.assert_close(group_norm_silu(x, 3, add=scale), add_first)
    modulated = F.silu(F.group_norm(x, 3) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    torch.testing.assert_close(group_norm_silu(x, 3, scale=scale, shift=shift), modulated)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("backend", ["auto", "fusible"])
def test_a_large_mean_costs_no_more_than_it_costs_torch(
    make_case, norm_of_torch, relative_error, mean, layout, center, backend
):
    shape = (4, 64, 32, 32)
    case = make_case(shape, 16, layout=layout, mean=mean, center=center)
    case.dy = torch.randn(shape)
    ours, exact = case.run_with_gradients(backend), case.exact()
    plain = make_case(shape, 16, mean=mean)
    y = F.silu(norm_of_torch(plain.x, 16, **plain.tensors, center=center))
    grads = torch.autograd.grad(y, [plain.x, *plain.tensors.values()], case.dy)
    for name, torchs in zip(ours, (y, *grads), strict=True):
        error, allowed = (relative_error(value, exact[name]) for value in (ours[name], torchs))
        assert error <= max(1.1 * allowed, 3e-7), name


@pytest.mark.parametrize("center", [True, False])
def test_large_planes_are_accurate(make_case, relative_error, center):
    for layout in ("contiguous", "channels_last"):
        case = make_case((1, 2, 700, 701), 1, layout=layout, mean=50.0, center=center)
        assert relative_error(case.run(), case.double().run()) < 1e-6


@pytest.mark.parametrize(("value", "center", "normalized"), [(1e4, True, 0), (1e4, False, 1), (0.0, False, 0)])
def test_constant_input(value, center, normalized):
    x, bias = torch.full((2, 6, 4, 4), value), torch.arange(6.0)
    y = group_norm_silu(x, 3, torch.ones(6), bias, activation=None, center=center)
    torch.testing.assert_close(y, (normalized + bias)[None, :, None, None].expand_as(y), rtol=0, atol=0.1)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("backend", ["eager", "reference", "fusible"])
def test_nan_is_seen_in_its_whole_group_and_nowhere_else(make_case, backend, center):
    case = make_case((1, 4, 3, 3), 2, center=center)
    case.x.data[0, 0, 0, 0] = torch.nan
    results = case.run_with_gradients(backend)
    for name in ("y", "dx"):
        assert results[name][:, :2].isnan().all() and results[name][:, 2:].isfinite().all(), name


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_empty_batch(make_case, layout, center):
    case = make_case((0, 6, 4, 4), 3, layout=layout, given=OPTIONAL, center=center)
    results = case.run_with_gradients()
    assert results["y"].shape == (0, 6, 4, 4)
    assert all(not grad.any() for name, grad in results.items() if name != "y")


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 8, 5, 7), torch.contiguous_format),
        ((2, 8, 5, 7), torch.channels_last),
        ((1, 8, 5, 7), torch.channels_last),
        ((2, 8, 3, 5, 7), torch.channels_last_3d),
    ],
)
def test_memory_format_is_kept(shape, memory_format, dtype, center):
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    for backend in ("eager", "reference"):
        y = group_norm_silu(x, 4, center=center, backend=backend)
        y.backward(torch.ones_like(y))
        assert y.stride() == x.stride() and y.is_contiguous(memory_format=memory_format)
        assert x.grad.is_contiguous(memory_format=memory_format)
        x.grad = None


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((1, 8, 2, 2), (8, 1, 16, 8)),
        ((2, 8, 1, 4), (32, 1, 8, 8)),
        ((2, 8, 1, 4), (32, 1, 1, 8)),
        ((2, 8, 1, 2, 2), (32, 1, 5, 16, 8)),
        ((2, 1, 3, 3), (9, 1, 3, 1)),
        ((1, 4, 3, 3), (7, 9, 3, 1)),
        ((2, 32, 49), (1568, 1, 32)),  # attention's transposed input
    ],
)
def test_strides_of_sizes_of_one_and_transposed_inputs(relative_error, shape, strides):
    x = torch.empty_strided(shape, strides).normal_().requires_grad_()
    groups = min(4, shape[1])
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    y = group_norm_silu(x, groups, weight, bias)
    dy = torch.randn(shape)
    exact = x.detach().double().requires_grad_()
    expected = group_norm_silu(exact, groups, weight, bias, backend="reference")
    assert y.stride() == torch.empty_like(x).stride()
    assert relative_error(y, expected) < 1e-6
    (dx,), (expected_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, exact, dy.double())
    assert relative_error(dx, expected_dx) < 1e-5


def test_weight_and_bias_of_any_strides():
    """PyTorch's CPU kernel reads them as if they were contiguous."""
    x, both = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    spaced, single = torch.randn(16, requires_grad=True), torch.randn(1, requires_grad=True)
    for leaves, make in (
        ([both], lambda: both.unbind(1)),
        ([spaced], lambda: (spaced[::2], spaced[1::2])),
        ([single], lambda: (single.expand(8), single.expand(8))),
    ):
        results = []
        for backend in ("eager", "reference"):
            y = group_norm_silu(x, 4, *make(), backend=backend)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *leaves])])
        for ours, formula in zip(*results, strict=True):
            torch.testing.assert_close(ours, formula, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_two_runs_are_bit_identical(make_case, layout):
    case = make_case((5, 48, 17, 19), 8, layout=layout, given=("weight", "bias", "add", "scale", "shift"))
    first, second = case.run_with_gradients(), case.run_with_gradients()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_sample_of_nan_does_not_affect_the_others(make_case, layout, center):
    case = make_case((3, 48, 17, 19), 8, layout=layout, center=center, given=("weight", "bias", "scale", "shift"))
    expected = case.run_with_gradients()
    with torch.no_grad():
        case.x[1] = torch.nan
    results = case.run_with_gradients()
    for name in ("y", "dx", "dscale", "dshift"):
        assert torch.equal(results[name][[0, 2]], expected[name][[0, 2]]), name
