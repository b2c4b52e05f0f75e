"""The kernels' source compiled: for a GPU by NVRTC, which comes with PyTorch, for a CPU by g++, for tests.

What is compiled is kept on disk, by source, options and compiler, in GNUNET_KERNEL_CACHE or, where that is not set, in
the user's cache folder.
"""

from __future__ import annotations

import ctypes
import os
import site
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("group_norm_silu.cu")
SHIM = Path(__file__).with_name("host_shim.h")
_VERSIONS = ("13", "12")
"""Of NVRTC, that know Hopper's instructions. That of torch's CUDA comes first: the driver can load what it compiles."""


def cubin(options: Sequence[str], arch: int) -> bytes:
    """The machine code for a GPU of compute capability arch / 10, with names defined as in ["WIDTH=32"].

    Raises:
        RuntimeError: NVRTC is missing, or cannot compile it; the text has its messages.
    """
    nvrtc = _nvrtc()
    if nvrtc is None:
        raise RuntimeError(MISSING)
    flags = [f"--gpu-architecture=sm_{arch}", "--std=c++17", *(f"-D{option}" for option in options)]
    version = (ctypes.c_int(), ctypes.c_int())
    nvrtc.nvrtcVersion(*map(ctypes.byref, version))
    key = [*flags, *(str(number.value) for number in version), SOURCE.read_text()]
    return _kept(key, ".cubin", lambda path: path.write_bytes(_compile(nvrtc, flags))).read_bytes()


MISSING = "needs NVRTC, which CUDA builds of torch bring along (else pip install nvidia-cuda-nvrtc)"


def has_nvrtc() -> bool:
    return _nvrtc() is not None


@cache
def _nvrtc() -> ctypes.CDLL | None:
    folders = [*site.getsitepackages(), site.getusersitepackages(), *sys.path]
    of_torch = (torch.version.cuda or "").partition(".")[0]
    for version in sorted(_VERSIONS, key=lambda version: version != of_torch):
        name = f"libnvrtc.so.{version}"
        found = [path for folder in folders for path in Path(folder or ".").glob(f"nvidia/*/lib/{name}")]
        for library in (*dict.fromkeys(map(str, found)), name):
            with suppress(OSError):
                for builtins in Path(library).parent.glob("libnvrtc-builtins.so*"):
                    ctypes.CDLL(str(builtins))  # which it looks for where no package puts it
                return ctypes.CDLL(library)
    return None


def _compile(nvrtc: ctypes.CDLL, flags: list[str]) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = SOURCE.read_bytes()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, SOURCE.name.encode(), 0, None, None)
    arguments = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    status = nvrtc.nvrtcCompileProgram(program, len(flags), arguments)
    get_size, get = (
        (nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        if status
        else (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    )
    get_size(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    get(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if status:
        raise RuntimeError(f"NVRTC cannot compile {SOURCE.name} ({' '.join(flags)}):\n{text.value.decode()}")
    return text.raw


def host_library(options: Sequence[str], sanitizer: str | None = None) -> Path:
    """The source as a library for this CPU, of which `run` launches a kernel. Needs g++.

    Args:
        sanitizer: of -fsanitize, as in "address".
    """
    flags = ["-O1", "-g", "-std=c++17", "-shared", "-fPIC", "-DHOST_SHIM", *(f"-D{option}" for option in options)]
    flags += [f"-fsanitize={sanitizer}"] if sanitizer else []

    def build(path: Path) -> None:
        command = ["g++", *flags, "-Wno-unknown-pragmas", "-x", "c++", str(SOURCE), "-o", str(path)]
        subprocess.run(command, check=True)

    return _kept([*flags, SOURCE.read_text(), SHIM.read_text()], ".so", build)


def _kept(key: list[str], suffix: str, make: Callable[[Path], object]) -> Path:
    """The file of a key, made if it is not there. Where no cache can be written it is made in a temporary folder."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("GNUNET_KERNEL_CACHE") or cache_home / "gnunet/kernels")
    path = folder / (sha256("\0".join(key).encode()).hexdigest()[:32] + suffix)
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkstemp(suffix=suffix, dir=folder)[1])
    except OSError:
        partial = path = Path(tempfile.mkstemp(suffix=suffix)[1])
    try:
        make(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path
