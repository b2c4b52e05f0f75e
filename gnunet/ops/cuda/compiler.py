"""Compiles the kernels by NVRTC, which comes with PyTorch.

The results are cached on disk by source, options and compiler, in GNUNET_KERNEL_CACHE or, if that is not set, in the
user's cache folder.
"""

from __future__ import annotations

import ctypes
import os
import site
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("group_norm_silu.cu")
_VERSIONS = ("13", "12")
"""Versions of NVRTC that know Hopper's instructions. That of torch's CUDA comes first: the driver can load its code."""
_MISSING = "needs NVRTC of CUDA 12 or 13, which CUDA builds of torch bring along (else pip install nvidia-cuda-nvrtc)"


def cubin(options: Sequence[str], arch: int) -> bytes:
    """The machine code for a GPU of compute capability arch / 10, with names defined as in ["WIDTH=32"]; a RuntimeError
    with NVRTC's log if that fails."""
    nvrtc = _nvrtc()
    flags = [_arch_flag(nvrtc, arch), "--std=c++17", *(f"-D{option}" for option in options)]
    version = (ctypes.c_int(), ctypes.c_int())
    nvrtc.nvrtcVersion(*map(ctypes.byref, version))
    source = SOURCE.read_text()
    path = _cache_path([*flags, *(str(number.value) for number in version), source], ".cubin")
    with suppress(OSError, AttributeError):
        return path.read_bytes()  # type: ignore[union-attr]
    code = _compile(nvrtc, source, flags)
    if path is not None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
            partial.write_bytes(code)
            partial.replace(path)
    return code


def nvrtc_problem(arch: int) -> str | None:
    """Why nothing can be compiled for such a GPU, or None."""
    try:
        probe(arch)
    except RuntimeError as error:
        return str(error) if str(error) == _MISSING else f"needs an NVRTC that works: {error}"
    return None


@cache
def probe(arch: int) -> bytes:
    """A kernel that does nothing, called `nothing`."""
    nvrtc = _nvrtc()
    return _compile(nvrtc, 'extern "C" __global__ void nothing() {}', [_arch_flag(nvrtc, arch)])


def _arch_flag(nvrtc: ctypes.CDLL, arch: int) -> str:
    """For the newest architecture of the GPU's generation, and not newer than it, that NVRTC knows."""
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    newest = max((other for other in known if other <= arch and other // 10 == arch // 10), default=arch)
    return f"--gpu-architecture=sm_{newest}"


@cache
def _nvrtc() -> ctypes.CDLL:
    packages = [*site.getsitepackages(), site.getusersitepackages(), *filter(None, sys.path)]
    folders = [folder for package in packages for folder in Path(package).glob("nvidia/*/lib")]
    folders += [Path(sys.prefix, "lib"), Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "lib64")]
    of_torch = (torch.version.cuda or "").partition(".")[0]
    for version in sorted(_VERSIONS, key=lambda version: version != of_torch):
        name = f"libnvrtc.so.{version}"
        for library in [*dict.fromkeys(folder / name for folder in folders if (folder / name).exists()), name]:
            with suppress(OSError):
                if isinstance(library, Path):
                    for builtins in library.parent.glob(f"libnvrtc-builtins.so.{version}*"):
                        ctypes.CDLL(str(builtins))  # which it looks for where no package puts it
                return ctypes.CDLL(str(library))
    raise RuntimeError(_MISSING)


def _compile(nvrtc: ctypes.CDLL, source: str, flags: list[str]) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    name = SOURCE.name.encode()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name, 0, None, None)
    arguments = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    status = nvrtc.nvrtcCompileProgram(program, len(flags), arguments)
    kind = "ProgramLog" if status else "CUBIN"
    nvrtc[f"nvrtcGet{kind}Size"](program, ctypes.byref(size))
    result = ctypes.create_string_buffer(size.value)
    nvrtc[f"nvrtcGet{kind}"](program, result)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if status:
        raise RuntimeError(f"NVRTC cannot compile {SOURCE.name} ({' '.join(flags)}):\n{result.value.decode()}")
    return result.raw


def _cache_path(key: list[str], suffix: str) -> Path | None:
    """The path in the cache for a key; None without a cache folder."""
    try:
        cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        cache_home = None
    if not (folder := os.environ.get("GNUNET_KERNEL_CACHE") or cache_home and Path(cache_home, "gnunet/kernels")):
        return None
    return Path(folder, sha256("\0".join(key).encode()).hexdigest()[:32] + suffix)
