"""These tests run in Triton's interpreter where there is no GPU, and are GPU tests where there is one."""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gnunet.ops.group_norm_silu import unsupported_reason

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_gpu = torch.cuda.is_available()
    # A Triton whose interpreter cannot run the kernels is not a fault of theirs.
    reason = None if has_gpu else unsupported_reason("triton", torch.empty(0))
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if has_gpu:
            item.add_marker(pytest.mark.gpu)
        elif reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"backend 'triton' {reason}"))


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
