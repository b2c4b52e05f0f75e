"""How the CUDA kernels are launched: what the driver is given."""

import ctypes
import struct
from types import SimpleNamespace

import pytest
import torch

from gnunet.ops.arguments import NormArgs
from gnunet.ops.cuda import compiler, driver, launch
from gnunet.ops.cuda.tiling import H100
from gnunet.ops.planned import FORWARD_TENSORS


class Driver:
    """NVIDIA's, but for doing anything."""

    def __init__(self):
        self.launched, self.attributes, self.entered, self.loaded, self.clusters = [], [], 0, 0, 8

    def cuDevicePrimaryCtxRetain(self, context, device):
        self.entered += 1
        return 0

    def cuCtxSetCurrent(self, context):
        return 0

    def cuModuleLoadData(self, module, cubin):
        self.loaded += 1
        return 0 if cubin == b"code" else 209

    def cuModuleGetFunction(self, function, module, name):
        assert name.startswith(b"group_norm_silu_") or name == b"nothing"
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        self.attributes.append((attribute, value))
        return 0

    def cuLaunchKernelEx(self, config, function, arguments, extra):
        config = config._obj
        cluster = driver._Attribute.from_address(config.attributes) if config.num_attributes else None
        parameters = ctypes.string_at(arguments[0], struct.calcsize(launch._FORMAT))
        self.launched.append(
            {
                "grid": tuple(config.grid), "block": tuple(config.block), "shared": config.shared_bytes,
                "stream": config.stream, "cluster": cluster and (cluster.id, tuple(cluster.value[:3])),
                "parameters": struct.unpack(launch._FORMAT, parameters),
            }
        )  # fmt: skip
        return 0

    def cuOccupancyMaxActiveClusters(self, count, function, config):
        count._obj.value = self.clusters
        return 0

    def cuGetErrorString(self, status, text):
        text._obj.value = b"out of luck"
        return 0


@pytest.fixture
def fake_driver(monkeypatch):
    fake = Driver()
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(launch, "gpu_of", lambda device: H100)
    monkeypatch.setattr(compiler, "cubin", lambda options, arch: b"code")
    monkeypatch.setattr(compiler, "probe", lambda arch: b"code")
    launch._function.cache_clear()
    launch._gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    return fake


def arguments(shape=(2, 320, 64, 64), offset=0, dtype=torch.bfloat16):
    size = torch.Size(shape).numel()
    x = torch.zeros(size + 64, dtype=dtype)[offset : offset + size].view(shape)
    weight, bias, table = torch.ones(shape[1]), torch.zeros(shape[1]), torch.zeros(shape[0], 2 * shape[1])
    scale, shift = table.chunk(2, dim=1)
    return NormArgs(x, weight, bias, None, scale, shift, 32, 1e-5, True, True)


def run_forward(args):
    plan = launch.plan_forward(args)
    execute = launch._Executable(plan.launches, (*FORWARD_TENSORS, *plan.buffers), 0)
    y, stats = torch.empty_like(args.x), torch.empty(plan.buffers["stats"])
    execute((*args.tensors, y, stats))
    return plan.launches[0], y, stats


def test_the_driver_is_given_the_tensors_the_sizes_and_the_cluster(fake_driver):
    args = arguments()
    planned, y, stats = run_forward(args)
    (given,) = fake_driver.launched
    tiling = planned.tiling
    assert given["grid"] == (2 * (320 // tiling.width) * tiling.ranks, 1, 1)
    assert given["block"] == (tiling.threads, 1, 1)
    assert given["cluster"] == (4, (tiling.ranks, 1, 1)) and tiling.ranks > 1
    assert given["shared"] == tiling.shared_bytes and given["stream"] == 77
    assert fake_driver.attributes == [(8, tiling.shared_bytes)]
    pointers = [0 if t is None else t.data_ptr() for t in (args.x, None, args.weight, args.bias, None, args.scale)]
    assert list(given["parameters"][:6]) == pointers
    assert given["parameters"][6:9] == (args.shift.data_ptr(), y.data_ptr(), stats.data_ptr())
    samples, *strides, eps, positions, held_x, held_dy = given["parameters"][15:]
    assert (samples, strides, positions) == (2, [0, 640, 640], 4096) and eps == pytest.approx(1e-5)
    assert (held_x, held_dy) == (tiling.steps, 0)


def test_a_small_block_needs_no_cluster(fake_driver):
    run_forward(arguments((2, 512, 4, 4)))
    assert fake_driver.launched[0]["cluster"] is None


def test_what_only_16_ranks_hold(fake_driver):
    planned, *_ = run_forward(arguments((1, 128, 512, 512)))
    assert planned.tiling.ranks == 16 and fake_driver.attributes[1] == (14, 1)


def test_a_tensor_that_is_not_aligned_is_copied(fake_driver):
    args = arguments(offset=1)
    run_forward(args)
    run_forward(arguments(offset=8))
    first, second = (given["parameters"][0] for given in fake_driver.launched)
    assert first % 16 == 0 and first != args.x.data_ptr() and second % 16 == 0


def test_a_thread_without_a_context_gets_one(fake_driver, monkeypatch):
    launched, statuses = fake_driver.cuLaunchKernelEx, [201, 0]
    monkeypatch.setattr(fake_driver, "cuLaunchKernelEx", lambda *a: launched(*a) or statuses.pop(0), raising=False)
    run_forward(arguments())
    assert fake_driver.entered == 2 and len(fake_driver.launched) == 2


def test_an_error_of_the_driver_is_raised(fake_driver, monkeypatch):
    monkeypatch.setattr(fake_driver, "cuLaunchKernelEx", lambda *args: 719, raising=False)
    with pytest.raises(RuntimeError, match=r"out of luck \(719\)"):
        run_forward(arguments())


def test_groups_too_wide_for_a_thread_block_are_an_error():
    from gnunet.ops import group_norm_silu

    with pytest.raises(ValueError, match="'cuda' does not take x of .* in 1 groups"):
        group_norm_silu(torch.zeros(1, 4096, 4, 4), 1, backend="cuda")


@pytest.mark.parametrize(("major", "clusters", "ranks"), [(8, 0, 1), (9, 8, 16), (9, 0, 8), (12, 0, 8)])
def test_how_large_clusters_may_be(fake_driver, monkeypatch, major, clusters, ranks):
    found = SimpleNamespace(major=major, shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    fake_driver.clusters = clusters
    assert launch._gpu(0) == (99 * 1024, ranks)
    launch._gpu.cache_clear()


def test_code_is_loaded_once_for_all_batch_sizes(fake_driver):
    for samples in (2, 2, 5):
        run_forward(arguments((samples, 320, 64, 64)))
    assert fake_driver.loaded == 1 and len(fake_driver.launched) == 3


def test_a_driver_that_does_not_load_the_code_is_a_reason(fake_driver, monkeypatch):
    monkeypatch.setattr(compiler, "nvrtc_problem", lambda arch: None)
    monkeypatch.setattr(launch, "_gpu", lambda index: H100)
    missing = launch._find_missing.__wrapped__  # without the cache
    assert missing(0) is None
    monkeypatch.setattr(compiler, "probe", lambda arch: b"code of the future")
    assert "needs a driver that loads what NVRTC compiles: CUDA driver: out of luck" in missing(0)
