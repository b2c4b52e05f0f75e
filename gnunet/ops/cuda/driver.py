"""The few calls of NVIDIA's driver that launch a kernel, in clusters of thread blocks."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from .tiling import PORTABLE_RANKS

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NON_PORTABLE_CLUSTERS = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    ]


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()} ({status})")


def _enter(device: int) -> None:
    """Make PyTorch's context current: a thread that has not called CUDA yet, as autograd's, has none."""
    context = ctypes.c_void_p()
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    _check(_driver().cuCtxSetCurrent(context))


def load(device: int, cubin: bytes, name: str, shared_bytes: int, ranks: int) -> ctypes.c_void_p:
    """A kernel of a cubin, allowed this much shared memory and clusters of this size; it is never unloaded."""
    _enter(device)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin))
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes))
    if ranks > PORTABLE_RANKS:
        _check(_driver().cuFuncSetAttribute(function, _NON_PORTABLE_CLUSTERS, 1))
    return function


def max_active_clusters(function: ctypes.c_void_p, threads: int, ranks: int, shared_bytes: int) -> int:
    """How many clusters of a kernel the device runs at a time; 0 if it cannot hold one."""
    attribute, count = _Attribute(_CLUSTER_DIMENSION, 0, (ranks, 1, 1)), ctypes.c_int()
    config = _Config((ranks, 1, 1), (threads, 1, 1), shared_bytes, None, ctypes.addressof(attribute), 1)
    status = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), function, ctypes.byref(config))
    return 0 if status else count.value


class Launcher:
    """Launches a kernel that takes one structure, by value, always on the same number of thread blocks."""

    def __init__(
        self,
        device: int,
        function: ctypes.c_void_p,
        structure: ctypes.Array[ctypes.c_char],
        blocks: int,
        threads: int,
        ranks: int,
        shared_bytes: int,
    ) -> None:
        self._device = device
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(structure))
        self._attribute = _Attribute(_CLUSTER_DIMENSION, 0, (ranks, 1, 1))
        attributes = ctypes.addressof(self._attribute)
        self._config = _Config((blocks, 1, 1), (threads, 1, 1), shared_bytes, None, attributes, int(ranks > 1))
        self._given: Any = (ctypes.byref(self._config), function, self._arguments, None)
        self._launch = _driver().cuLaunchKernelEx

    def __call__(self, stream: int) -> None:
        self._config.stream = stream
        status = self._launch(*self._given)
        if status == _INVALID_CONTEXT:
            _enter(self._device)
            status = self._launch(*self._given)
        if status:
            _check(status)
