"""These tests run on a GPU where there is one, and are marked as GPU tests there; else on a CPU.

On a CPU Triton's interpreter runs the Triton kernels, and tests/ops/cuda/cuda_emulation.py those in CUDA C++.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gnunet.ops.group_norm_silu import unsupported_reason


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_gpu = torch.cuda.is_available()
    # A Triton whose interpreter cannot run the kernels is not a fault of theirs.
    reasons = {name: None if has_gpu else unsupported_reason(name, torch.empty(0)) for name in ("triton", "cuda")}
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if has_gpu:
            item.add_marker(pytest.mark.gpu)
            continue
        given = getattr(item, "callspec", None)
        params = given.params if given else {}
        name = params.get("backend", params.get("how", "").partition(" ")[0])
        if reasons.get(name) is not None:
            item.add_marker(pytest.mark.skip(reason=f"backend {name!r} {reasons[name]}"))


@pytest.fixture(autouse=True)
def clean_device() -> Iterator[None]:
    """Release the device's memory for other workers; exit after an error of CUDA, upon which all later calls fail."""
    yield
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:  # whose controller reports the test and starts another worker
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            raise
