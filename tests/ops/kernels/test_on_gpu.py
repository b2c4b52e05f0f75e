"""What only a GPU shows: sizes of real models, PyTorch's compiler, CUDA graphs, autocast, more than 2^31 elements."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gnunet.models import UNet2D
from gnunet.ops import GroupNormSiLU, group_norm_silu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BACKENDS = ["cuda", "triton"]
ALL = ("weight", "bias", "add", "scale", "shift")
REAL_SHAPES = [
    ((16, 128, 32, 32), 32),
    ((16, 512, 4, 4), 32),
    ((4, 256, 128, 128), 32),
    ((2, 320, 64, 64), 32),
    ((2, 1920, 32, 32), 32),
    ((1, 128, 512, 512), 32),
    ((1, 320, 14, 72, 128), 32),
    ((2, 192, 64, 64), 32),
    ((1, 768, 96, 96), 1),
    ((2, 96, 160, 160), 96),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("dtype", "center"), [(torch.bfloat16, True), (torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize(("shape", "groups"), REAL_SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_of_real_models(make_case, relative_error, backend, shape, groups, dtype, center, layout):
    options = {"layout": layout, "given": ALL, "center": center, "device": "cuda"}
    case = make_case(shape, groups, dtype=dtype, parameter_dtype=torch.float32, **options)
    ours, again, exact = case.run_with_gradients(backend), case.run_with_gradients(backend), case.exact()
    for name, value in ours.items():
        assert torch.equal(value, again[name]), name
        tolerance = 1e-5 if value.dtype == torch.float32 and dtype == torch.float32 else 6e-3
        assert relative_error(value, exact[name], case.floor(name, 0.1)) < tolerance, name


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), REAL_SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_alone_as_in_a_batch(lay_out, backend, shape, groups, layout, center):
    x = lay_out(torch.randn(3, *shape[1:], device="cuda", dtype=torch.bfloat16), layout).requires_grad_()
    dy = torch.randn(x.shape, device="cuda", dtype=torch.bfloat16)
    y = group_norm_silu(x, groups, center=center, backend=backend)
    (dx,) = torch.autograd.grad(y, x, dy)
    for i in range(3):
        alone = lay_out(x[i : i + 1].detach(), layout).requires_grad_()
        y_alone = group_norm_silu(alone, groups, center=center, backend=backend)
        (dx_alone,) = torch.autograd.grad(y_alone, alone, dy[i : i + 1])
        assert torch.equal(y_alone, y[i : i + 1]) and torch.equal(dx_alone, dx[i : i + 1])


def test_inductor(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.compiler.reset()
    torch.manual_seed(0)
    network = nn.Sequential(GroupNormSiLU(8, 32), nn.Conv2d(32, 32, 3, padding=1), GroupNormSiLU(8, 32)).cuda()
    network.to(memory_format=torch.channels_last)
    x = torch.randn(4, 32, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last).requires_grad_()
    compiled = torch.compile(network, fullgraph=True)
    results = []
    for run in (network, compiled):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *network.parameters()])])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graphs(backend, center):
    layer = GroupNormSiLU(32, 320, center=center, backend=backend).cuda()
    x = torch.randn(2, 320, 64, 64, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(layer(x), x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, dy)
    with torch.no_grad():
        x.normal_(3)
    graph.replay()
    expected = layer(x)
    assert torch.equal(y, expected)
    assert torch.equal(dx, torch.autograd.grad(expected, x, dy)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(make_case, backend):
    case = make_case((2, 32, 16, 16), 8, given=ALL, device="cuda")
    plain = case.run_with_gradients(backend)
    with torch.autocast("cuda", torch.bfloat16):
        under_autocast = case.run_with_gradients(backend)
    assert all(torch.equal(plain[name], under_autocast[name]) for name in plain)


@pytest.mark.parametrize("num_groups", [32, 1])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_elements_than_32_bits_count(backend, layout, num_groups):
    shape = (1, 128, 4112, 4096)  # 2.16e9
    if torch.cuda.mem_get_info()[0] < 25e9:
        pytest.skip("needs 25 GB of free memory")
    x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    x = x.normal_(mean=1).requires_grad_()
    y = group_norm_silu(x, num_groups, backend=backend)
    dy = torch.empty_like(x).normal_()
    (dx,) = torch.autograd.grad(y, x, dy)
    for channel in (0, 127):  # so many elements have the distribution's mean and variance, and no mean gradient
        normalized = (x[:, channel].detach().float() - 1).requires_grad_()
        expected = F.silu(normalized)
        (expected_dx,) = torch.autograd.grad(expected, normalized, dy[:, channel].float())
        torch.testing.assert_close(y[:, channel].float(), expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(dx[:, channel].float(), expected_dx, rtol=2e-2, atol=2e-2)


def test_more_rows_of_channels_than_32_bits_count():
    shape = (2_200_000, 1024)
    if torch.cuda.mem_get_info()[0] < 50e9:
        pytest.skip("needs 50 GB of free memory")
    x, add, dy = (torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(3))
    results = []
    for rows, backend in ((slice(None), "triton"), (slice(-4, None), "reference")):
        tensors = [t[rows].requires_grad_() for t in (x, add)]
        y = group_norm_silu(tensors[0], 32, add=tensors[1], backend=backend)
        results.append([t[-4:].clone() for t in (y, *torch.autograd.grad(y, tensors, dy[rows]))])
        x, add = x.detach(), add.detach()
    for ours, formula in zip(*results, strict=True):
        torch.testing.assert_close(ours, formula, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("time", ["default", "scale_shift"])
@pytest.mark.parametrize("kernels", BACKENDS)
def test_a_unet_trains_as_with_the_eager_backend(kernels, time):
    results = []
    for backend in (kernels, "eager"):
        torch.manual_seed(0)
        model = UNet2D(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, resnet_time_scale_shift=time,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm={"groups": 8, "backend": backend},
        ).cuda()  # fmt: skip
        x = torch.randn(2, 3, 16, 16, device="cuda")
        y = model(x, torch.tensor([3, 500], device="cuda")).sample
        y.square().mean().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    for ours, eager in zip(*results, strict=True):
        difference = (ours - eager).norm() / eager.norm().clamp_min(1e-3)
        assert difference < 1e-2
