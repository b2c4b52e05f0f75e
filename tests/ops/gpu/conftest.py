"""These tests run in Triton's interpreter where there is no GPU, and are GPU tests where there is one."""

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
