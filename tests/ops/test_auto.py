"""Which backend "auto" is."""

import logging
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gnunet.ops import group_norm_silu
from gnunet.ops.arguments import NormArgs
from gnunet.ops.cuda import launch as cuda_launch
from gnunet.ops.cuda.tiling import H100, Gpu

module = sys.modules[group_norm_silu.__module__]
MISSING = {"cuda": "needs NVRTC", "triton": "needs the package triton"}


@pytest.fixture
def chosen(monkeypatch, caplog):
    """`chosen(shape, missing, gpu)`: the backend of a tensor on a GPU, and what the log says of it."""
    monkeypatch.setattr(module, "_announced", set())
    caplog.set_level(logging.INFO)

    def choose(shape, missing=(), gpu=H100, num_groups=32, channels_last=False):
        monkeypatch.setattr(module, "unsupported_reason", lambda name, x: MISSING[name] if name in missing else None)
        monkeypatch.setattr(cuda_launch, "gpu_of", lambda device: gpu)
        with FakeTensorMode():
            layout = torch.channels_last if channels_last else torch.contiguous_format
            x = torch.empty(shape, device="cuda", dtype=torch.bfloat16, memory_format=layout)
        args = NormArgs(x, None, None, None, None, None, num_groups, 1e-5, True, True)
        return module._auto_backend(args), caplog.text

    return choose


def test_on_cpus_and_without_data_it_is_eager():
    for device in ("cpu", "meta"):
        args = NormArgs(torch.empty(2, 4, 3, 3, device=device), None, None, None, None, None, 2, 1e-5, True, True)
        assert module.select_backend(args, "auto") is module.BACKENDS["eager"]


def test_cuda_where_clusters_hold_what_they_read(chosen):
    assert chosen((8, 320, 64, 64))[0] == "cuda"
    assert chosen((8, 512, 8, 8), channels_last=True)[0] == "cuda"
    assert chosen((1, 128, 1024, 1024))[0] == "triton"
    assert chosen((8, 512, 128, 128), gpu=Gpu(99 * 1024, 1))[0] == "triton"
    assert chosen((8, 512, 8, 8), gpu=Gpu(99 * 1024, 1), channels_last=True)[0] == "cuda"


def test_triton_where_one_of_its_programs_holds_contiguous_channels_and_where_rows_are_short(chosen):
    assert chosen((8, 512, 8, 8))[0] == "triton"
    assert chosen((4, 256, 256, 256), channels_last=True)[0] == "triton"
    assert chosen((8, 16384, 2, 2), num_groups=1)[0] == "triton"
    assert chosen((2, 32, 0, 4))[0] == chosen((0, 32, 4, 4))[0] == "eager"


def test_it_does_not_depend_on_the_batch(chosen):
    for channels, size in ((320, 64), (128, 1024), (512, 256)):
        assert len({chosen((n, channels, size, size))[0] for n in (1, 2, 64)}) == 1


def test_what_is_missing_is_said_once(chosen):
    name, text = chosen((8, 320, 64, 64), missing=("cuda",))
    assert name == "triton" and text.count("backend 'auto' is 'triton' on cuda: 'cuda' needs NVRTC") == 1
    assert chosen((8, 640, 64, 64), missing=("cuda",))[1] == text
    name, text = chosen((8, 320, 64, 64), missing=("cuda", "triton"))
    assert name == "eager" and "'cuda' needs NVRTC; 'triton' needs the package triton" in text
