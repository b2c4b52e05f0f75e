"""The CUDA kernels under AddressSanitizer, in host_shim.h."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import cuda_emulation
import torch
from gnunet.ops import group_norm_silu
from gnunet.ops.cuda import launch, tiling

cuda_emulation.install("address")

def run(shape, groups, channels_last, dtype, given):
    x = torch.randn(shape).to(dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    tensors = {name: torch.randn(shape[1] if name in ("weight", "bias") else shape[:2]) for name in given}
    leaves = [x.requires_grad_(), *(t.requires_grad_() for t in tensors.values())]
    y = group_norm_silu(x, groups, **tensors, backend="cuda")
    torch.autograd.grad(y.float().sum(), leaves)

tiny = dict(_PART_BYTES=128, _VECTORS=2, _FEW_VECTORS=2, _MIN_THREADS=32, _MIN_THREADS_OF_ROWS=32)
for sizes, gpu in (({}, cuda_emulation.GPU), (tiny, tiling.Gpu(16384, 8))):
    vars(tiling).update(sizes)
    launch.gpu_of = lambda device: gpu
    for channels_last in (True, False):
        run((2, 30, 7, 5), 3, channels_last, torch.bfloat16, ("weight", "bias", "add", "scale", "shift"))
        run((3, 20, 11), 4, channels_last, torch.float32, ("weight", "bias"))
        run((1, 64, 9, 9), 8, channels_last, torch.float16, ("shift",))
        run((2, 24, 16, 16), 24, channels_last, torch.bfloat16, ())
        run((2, 320, 16, 16), 32, channels_last, torch.bfloat16, ("weight", "bias"))
print("no access out of bounds")
"""


def test_no_access_out_of_bounds():
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("needs g++'s AddressSanitizer")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0 and "no access out of bounds" in done.stdout, done.stderr[-4000:]
