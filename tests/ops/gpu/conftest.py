"""These tests run in Triton's interpreter where there is no GPU, and are GPU tests where there is one."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if torch.cuda.is_available() and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
