"""The CUDA kernels on a CPU: group_norm_silu.cu compiled by g++ with host_shim.h in the place of CUDA."""

import ctypes
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from gnunet.ops.cuda import compiler, launch
from gnunet.ops.cuda.tiling import Gpu
from gnunet.ops.planned import FORWARD_TENSORS

GPU = Gpu(48 * 1024, 16)
SHIM = Path(__file__).with_name("host_shim.h")
HAS_COMPILER = bool(shutil.which("g++"))


def install(sanitizer: str | None = None) -> None:
    """Make the backend "cuda" run on CPUs, and there alone, in this process.

    sanitizer: as g++'s -fsanitize takes it; "address" must have been preloaded.
    """
    launch.gpu_of = lambda device: GPU
    launch.unsupported_device = unsupported_device
    launch.PLANNER = launch.PLANNER._replace(executable=partial(Emulation, sanitizer))


def unsupported_device(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "is emulated, on CPUs alone"
    return None if HAS_COMPILER else "is emulated by what g++ compiles: install it"


class Emulation:
    """Runs the kernels of a plan, after filling what they must write with NaN."""

    def __init__(
        self, sanitizer: str | None, launches: Sequence[launch.Launch], names: tuple[str, ...], device: int | None
    ) -> None:
        self.sanitizer, self.launches, self.names = sanitizer, launches, names

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        first = self.launches[0]
        given = dict(zip(self.names, tensors, strict=True))
        for name in ("x", "dy"):
            t = given.get(name)
            if t is not None and t.data_ptr() % launch._ALIGNMENT:
                given[name] = t.clone()
        read = {*FORWARD_TENSORS[:-1], "dy", "" if first.name == "forward" else "stats"}
        for name, t in given.items():
            if t is not None and name not in read:
                t.detach().fill_(torch.nan)
        found = (given.get(name) for name in launch._POINTERS[first.name])
        pointers = [0 if t is None else t.data_ptr() for t in found]
        run = _library(self.sanitizer).run
        for kernel in self.launches:
            constants = (ctypes.c_int * len(launch._CONSTANTS))(*kernel.constants)
            parameters = struct.pack(launch._FORMAT + "Q", *pointers, *kernel.values, ctypes.addressof(constants))
            which, shared_bytes = list(launch._POINTERS).index(kernel.name), ctypes.c_size_t(kernel.shared_bytes)
            run(which, kernel.blocks, kernel.threads, kernel.ranks, shared_bytes, parameters)


@cache
def _library(sanitizer: str | None) -> ctypes.CDLL:
    """Compiled once, with the constants in the parameters of each launch, and cached next to the kernels."""
    flags = ["-O1", "-g", "-std=c++17", "-shared", "-fPIC", "-DHOST_SHIM", f"-I{SHIM.parent}"]
    flags += [f"-D{name}=(p.constants[{i}])" for i, name in enumerate(launch._CONSTANTS)]
    flags += [f"-fsanitize={sanitizer}"] if sanitizer else []
    path = compiler._cache_path([*flags, compiler.SOURCE.read_text(), SHIM.read_text()], ".so")
    path = path or Path(tempfile.mkdtemp(), "host.so")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial_file:
            command = ["g++", *flags, "-Wno-unknown-pragmas", "-x", "c++", str(compiler.SOURCE)]
            subprocess.run([*command, "-o", partial_file.name], check=True)
        Path(partial_file.name).replace(path)
    return ctypes.CDLL(str(path))
