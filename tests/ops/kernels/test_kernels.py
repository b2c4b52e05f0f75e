"""The kernels, on a CPU where there is no GPU: numbers, bits, accuracy."""

import sys
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gnunet.ops import group_norm_silu
from gnunet.ops.cuda import launch as cuda_launch
from gnunet.ops.cuda import tiling as cuda_tiling
from gnunet.ops.cuda.tiling import Gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = ("weight", "bias", "add", "scale", "shift")
BACKENDS = ["cuda", "triton"]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.6e-3}
_DIRECTIONS = ("forward", "backward", "backward of tables")
# Sizes as if a GPU were tiny, so that small tensors are tiled in all ways, in several tiles, splits and channel splits.
_SPLIT = {
    "_SINGLE_PASS": dict.fromkeys(_DIRECTIONS, 0),
    "_TILE": {**dict.fromkeys(_DIRECTIONS, 64), "forward": 128},
    "_SPLITS": 3,
}
# So that a tensor is shared out among several ranks, and threads have several vectors; or in one thread block.
_SHARED = {
    "_PART_BYTES": 128, "_VECTORS": 2, "_FEW_VECTORS": 2, "_MIN_THREADS": 32, "_MIN_THREADS_OF_ROWS": 32,
    "_MIN_BLOCK": 256,
}  # fmt: skip
SIZES = {
    "triton SinglePass": {"_MIN_TILES": 1},
    "triton SplitReduction": _SPLIT,
    "cuda ThreadBlock": {"_PART_BYTES": 2**20},
    "cuda Cluster": _SHARED,
    "cuda ReadAgain": {**_SHARED, "gpu_of": lambda device: Gpu(16 * 1024, 2)},
    "cuda LargeCluster": {**_SHARED, "_VECTORS": 1, "_FEW_VECTORS": 1, "gpu_of": lambda device: Gpu(24 * 1024, 16)},
}
CUDA, TRITON = ([how for how in SIZES if how.startswith(backend)] for backend in BACKENDS)


@contextmanager
def tiled(how, **more):
    """A context in which tensors are tiled in one of the ways above; gives the name of the backend."""
    backend = how.partition(" ")[0]
    sizes = {**SIZES[how], **more}
    prepared = sys.modules["gnunet.ops.group_norm_silu"]._prepared
    gpu_of = sizes.pop("gpu_of", cuda_launch.gpu_of)
    if backend == "cuda":
        tiling = cuda_tiling
    else:
        from gnunet.ops.triton_kernels import tiling
    with mock.patch.multiple(tiling, **sizes), mock.patch.object(cuda_launch, "gpu_of", gpu_of):
        prepared.clear()
        yield backend
    prepared.clear()


def floor_and_rounding(backend):
    """Errors that count as none, and of bfloat16 over that of rounding: Triton's interpreter adds a column up one by
    one, and cuts bfloat16 off where GPUs round it."""
    return (1e-6, 2.5) if backend == "triton" and DEVICE == "cpu" else (5e-7, 1.05)


@st.composite
def cases(draw):
    groups = draw(st.sampled_from([1, 2, 3, 4, 12]))
    channels = groups * draw(st.sampled_from([1, 2, 3, 5, 6, 10]))
    spatial = draw(
        st.sampled_from([(), (7,), (16, 16), (5, 3), (13, 11), (1, 1), (2, 3, 7), (4, 4, 4), (2, 3, 1, 2, 4)])
    )
    spatial = spatial if channels // groups * torch.Size(spatial).numel() > 4 else (11,)
    spatial = spatial if channels * torch.Size(spatial).numel() <= 4096 else (3, 7)  # the interpreter takes its time
    return {
        "shape": (draw(st.sampled_from([1, 2])), channels, *spatial),
        "num_groups": groups,
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "parameter_dtype": draw(st.sampled_from([None, torch.float32, torch.bfloat16])),
        "layout": draw(st.sampled_from(["contiguous", "channels_last", "transposed", "sliced"])),
        "given": tuple(name for name in ALL if draw(st.booleans())),
        "activation": draw(st.sampled_from(["silu", None])),
        "center": draw(st.booleans()),
        "mean": draw(st.sampled_from([0.0, 3.0])),
        "seed": draw(st.integers(0, 99)),
    }


def assert_right_however_tiled(make_case, how, arguments):
    case = make_case(**arguments, device=DEVICE)
    with tiled(how) as backend:
        results = case.run_with_gradients(backend)
    case.assert_right(results, TOLERANCE)


@pytest.mark.parametrize("how", CUDA)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(arguments=cases())
def test_values_and_gradients(make_case, how, arguments):
    assert_right_however_tiled(make_case, how, arguments)


@pytest.mark.parametrize("how", TRITON)
@settings(max_examples=10, deadline=None, derandomize=True)  # the interpreter takes its time
@given(arguments=cases())
def test_values_and_gradients_by_triton(make_case, how, arguments):
    assert_right_however_tiled(make_case, how, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_positions_in_groups_of_one_channel(make_case, relative_error, layout, backend):
    """The gradient of add is zero, and as far from it as the rounding of so many terms takes it."""
    case = make_case((1, 2, 160, 160), 2, layout=layout, given=ALL, device=DEVICE)
    exact = case.exact()
    for name, value in case.run_with_gradients(backend).items():
        assert relative_error(value, exact[name], case.floor(name, 0.1)) < 1e-5, name


@pytest.mark.parametrize("how", SIZES)
@pytest.mark.parametrize(
    ("channels", "groups", "spatial", "center", "layout"),
    [
        (24, 4, (7, 5), True, "channels_last"),
        (10, 5, (4, 4, 5), True, "contiguous"),
        (4, 2, (40,), False, "channels_last"),
    ],
)
def test_alone_as_in_a_batch_of_three(lay_out, how, channels, groups, spatial, center, layout):
    """Each sample is computed twice, and has the same bits."""
    generator = torch.Generator().manual_seed(0)
    shared = {name: torch.randn(channels, generator=generator).to(DEVICE) for name in ("weight", "bias")}
    own = {name: torch.randn(3, channels, generator=generator).to(DEVICE) for name in ("add", "scale", "shift")}

    def run(x, dy, tensors):
        x = lay_out(x, layout).requires_grad_()
        y = group_norm_silu(x, groups, **tensors, center=center, backend=backend)
        return y.detach(), torch.autograd.grad(y, x, lay_out(dy, layout))[0]

    x, dy = (torch.randn(3, channels, *spatial, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2))
    with tiled(how) as backend:
        batch = run(x, dy, {**shared, **own})
        for i in (0, 2):
            alone = run(x[i : i + 1], dy[i : i + 1], {**shared, **{name: t[i : i + 1] for name, t in own.items()}})
            assert all(torch.equal(t[i : i + 1], single) for t, single in zip(batch, alone, strict=True)), i
        companions = x.clone()
        companions[[0, 2]] = torch.nan
        next_to_nan = run(companions, dy, {**shared, **own})
    assert all(torch.equal(t[1], other[1]) for t, other in zip(batch, next_to_nan, strict=True))


@pytest.mark.parametrize(
    ("mean", "center", "layout"),
    [
        (0.0, True, "contiguous"),
        (100.0, True, "channels_last"),
        (1000.0, True, "contiguous"),
        (1000.0, True, "channels_last"),
        (10.0, False, "channels_last"),
    ],
)
@pytest.mark.parametrize("how", SIZES)
def test_accuracy_at_a_large_mean(make_case, norm_of_torch, relative_error, mean, center, layout, how):
    """16-bit results as good as rounded ones; gradients and 32-bit results no worse than PyTorch's."""
    more = {"_TILE": dict.fromkeys(_DIRECTIONS, 1024)} if "_TILE" in SIZES[how] else {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        options = {"layout": layout, "mean": mean, "center": center, "device": DEVICE}
        case = make_case((1, 16, 16, 16), 4, dtype=dtype, parameter_dtype=torch.float32, **options)
        with tiled(how, **more) as backend:
            ours = case.run_with_gradients(backend)
        floor, rounded = floor_and_rounding(backend)
        exact = case.exact()
        plain = case.x.detach().contiguous().requires_grad_()
        y = F.silu(norm_of_torch(plain, 4, *(t.to(dtype) for t in case.tensors.values()), center=center))
        grads = torch.autograd.grad(y, [plain, *case.tensors.values()], case.dy)
        if dtype != torch.float32:
            allowed = (rounded if dtype == torch.bfloat16 else 1.05) * relative_error(exact["y"].to(dtype), exact["y"])
            assert relative_error(ours["y"], exact["y"]) <= allowed, dtype
        for name, torchs in zip(ours, (y, *grads), strict=True):
            if (name, dtype) != ("y", torch.bfloat16):
                error, allowed = (relative_error(value, exact[name]) for value in (ours[name], torchs))
                assert error <= max(1.1 * allowed, floor), (name, dtype)


@pytest.mark.parametrize("how", SIZES)
@pytest.mark.parametrize(("channels", "layout"), [(4, "contiguous"), *((n, "channels_last") for n in (1, 2, 4, 6))])
def test_a_group_next_to_one_with_another_mean(lay_out, layout, channels, how):
    """Channels of several groups are in one vector of channels_last."""
    x = torch.randn(2, 4 * channels, 6, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    alone = group_norm_silu(x.double(), 4, backend="reference")
    x[:, :channels] += 1e4
    with tiled(how) as backend:
        y = group_norm_silu(lay_out(x, layout), 4, backend=backend)
    torch.testing.assert_close(y[:, channels:], alone[:, channels:].float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("at", [0, 37, -1])
def test_an_element_that_is_far_off(lay_out, relative_error, at, layout, backend):
    x = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x.view(2, -1)[:, at] = 1e4
    y = group_norm_silu(lay_out(x, layout), 2, activation=None, backend=backend)
    exact = group_norm_silu(x.double(), 2, activation=None, backend="reference")
    is_near = x != 1e4
    assert relative_error(y[is_near], exact[is_near]) < 1e-5


@pytest.mark.parametrize("how", CUDA)
@pytest.mark.parametrize(("samples", "channels"), [(31, 6), (33, 6), (41, 40)])
def test_gradients_of_parameters_over_many_samples_and_several_times(make_case, relative_error, samples, channels, how):
    case = make_case((samples, channels, 3, 4), 2, layout="channels_last", device=DEVICE)
    leaves = list(case.tensors.values())
    with tiled(how) as backend:
        y = case.run(backend)
        results = [torch.autograd.grad(y, leaves, case.dy, retain_graph=True) for _ in range(3)]
    exact = case.exact()
    for name, first, *others in zip(case.tensors, *results, strict=True):
        assert all(torch.equal(first, again) for again in others)
        assert relative_error(first, exact[f"d{name}"]) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_in_float64(make_case, backend):
    case = make_case((2, 12, 5, 5), 3, parameter_dtype=torch.float64, given=ALL, device=DEVICE)
    case.assert_right(case.run_with_gradients(backend), {**TOLERANCE, torch.float64: 5e-6})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("how", SIZES)
def test_nan_is_seen_in_its_whole_group_and_nowhere_else(make_case, how, center, layout):
    case = make_case((1, 9, 3, 3), 3, center=center, layout=layout, device=DEVICE)
    case.x.data[0, 4, 0, 0] = torch.nan
    with tiled(how) as backend:
        results = case.run_with_gradients(backend)
    for name in ("y", "dx"):
        is_nan = results[name].isnan().unflatten(1, (3, 3))
        expected = torch.zeros_like(is_nan)
        expected[:, 1] = True
        assert torch.equal(is_nan, expected), name


@pytest.mark.parametrize("kernels", BACKENDS)
def test_halves_of_one_projection_are_read_in_place(kernels):
    x = torch.randn(3, 12, 5, 5, device=DEVICE, requires_grad=True)
    both = torch.randn(3, 24, device=DEVICE, requires_grad=True)
    results = []
    for backend in (kernels, "reference"):
        scale, shift = both.chunk(2, dim=1)
        y = group_norm_silu(x, 4, scale=scale, shift=shift, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, both])])
    for ours, formula in zip(*results, strict=True):
        torch.testing.assert_close(ours, formula, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_storage_offsets_of_real_models(relative_error, backend):
    """Channels_last at batch 1, attention's transposed input, a view into a larger tensor, an expanded gradient."""
    whole = torch.randn(4, 8, 6, 6)
    inputs = [
        torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 36, 8).transpose(1, 2),
        whole[2:],
        whole[:, :, 1:-1, 1:-1],
    ]
    for x in (x.to(DEVICE) for x in inputs):
        ours, formula = x.detach().requires_grad_(), x.detach().double().requires_grad_()
        y = group_norm_silu(ours, 4, backend=backend)
        y.sum().backward()
        group_norm_silu(formula, 4, backend="reference").sum().backward()
        assert y.stride() == torch.empty_like(x).stride()
        assert relative_error(y, group_norm_silu(formula, 4, backend="reference")) < 1e-6
        assert relative_error(ours.grad, formula.grad) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_an_error(backend):
    with pytest.raises(ValueError, match=f"'{backend}' does not compute in float64"):
        group_norm_silu(torch.randn(2, 4, 3, 3, dtype=torch.float64, device=DEVICE), 2, backend=backend)
