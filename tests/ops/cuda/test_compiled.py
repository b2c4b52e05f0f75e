"""The CUDA kernels compiled for GPUs that are not here, by NVRTC, and read."""

import os
import sys
from unittest import mock

import pytest
import torch

from gnunet.ops.cuda import compiler

pytestmark = [
    pytest.mark.skipif(compiler.nvrtc_problem(90) is not None, reason="needs NVRTC"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs Triton's cuobjdump"),
]
SOME = ("a level of DDPM's U-Net", "odd sizes")
EACH_TILING = (*SOME, "groups of 10 channels, large", "one group", "a decoder's last level", "no spatial dimensions")
"""Rows that are folded or not, ranks of 1 to 16, blocks that shared memory holds or not."""


@pytest.fixture
def inspect_kernels(monkeypatch, tmp_path):
    pytest.importorskip("triton")  # which has a cuobjdump
    import inspect_kernels

    monkeypatch.setenv("GNUNET_KERNEL_CACHE", str(tmp_path))
    return inspect_kernels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "center", "names"),
    [
        (80, torch.float16, True, SOME),
        (90, torch.bfloat16, True, EACH_TILING),
        (90, torch.bfloat16, False, SOME),
        (100, torch.float32, True, SOME),
    ],
    ids=["80-float16", "90-bfloat16", "90-bfloat16-rms", "100-float32"],
)
def test_no_spills_and_wide_loads(inspect_kernels, arch, dtype, center, names):
    seen = set()
    for name in names:
        shape, groups = inspect_kernels.SHAPES[name]
        for layout in ("contiguous", "channels_last"):
            args = inspect_kernels.arguments_of(shape, groups, dtype, layout, center)
            for launch in inspect_kernels.BACKENDS["cuda"].launches(args, arch):
                if launch in seen:
                    continue
                seen.add(launch)
                code, tiling = inspect_kernels.compile_launch(("cuda", launch, arch)), launch.tiling
                of = (name, layout, launch.name, tiling)
                assert code.stack == code.spills == 0, of
                assert code.registers * launch.threads <= 65536, of
                if tiling is None:
                    continue
                assert (code.cluster_barriers > 0) == (tiling.ranks > 1) and (arch > 80 or tiling.ranks == 1), of
                # Every vector of x (and dy) comes by one copy to shared memory; y (or dx) goes by one store.
                width = tiling.vector * dtype.itemsize
                assert width == (2 * dtype.itemsize if name == "odd sizes" and layout == "channels_last" else
                                 dtype.itemsize if name == "odd sizes" else 16), of  # fmt: skip
                assert width == 2 or code.loads[f"copy {width}"] >= len(tiling.held), of
                assert code.stores[str(width)] >= 1, of


def test_a_wrong_source_says_what_is_wrong(monkeypatch, tmp_path):
    (tmp_path / "wrong.cu").write_text("int f( {")
    monkeypatch.setattr(compiler, "SOURCE", tmp_path / "wrong.cu")
    monkeypatch.setenv("GNUNET_KERNEL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=r"NVRTC cannot compile wrong.cu .*sm_90.*\n.*error"):
        compiler.cubin(["WIDTH=8"], 90)
    assert not (tmp_path / "cache").exists()


def test_what_is_compiled_is_kept_and_an_unwritable_cache_does_not_matter(monkeypatch, tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text('extern "C" __global__ void f(int* x) { *x = NUMBER; }')
    monkeypatch.setattr(compiler, "SOURCE", source)
    monkeypatch.setenv("GNUNET_KERNEL_CACHE", str(tmp_path / "cache"))
    first = compiler.cubin(["NUMBER=1"], 90)
    assert compiler.cubin(["NUMBER=1"], 90) == first != compiler.cubin(["NUMBER=2"], 90)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    descriptors = len(os.listdir("/proc/self/fd"))
    compiler.cubin(["NUMBER=3"], 90)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    monkeypatch.setenv("GNUNET_KERNEL_CACHE", str(source / "no folder"))
    assert compiler.cubin(["NUMBER=1"], 90) == first
    for name in ("GNUNET_KERNEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiler.Path, "home", mock.Mock(side_effect=RuntimeError))
    assert compiler.cubin(["NUMBER=1"], 90) == first


def test_an_architecture_that_nvrtc_does_not_know_runs_the_code_of_an_older_one(monkeypatch, tmp_path):
    monkeypatch.setenv("GNUNET_KERNEL_CACHE", str(tmp_path))
    assert compiler.probe(87) and compiler._arch_flag(compiler._nvrtc(), 129).endswith("sm_121")
    assert "NVRTC cannot compile" in compiler.nvrtc_problem(990)
