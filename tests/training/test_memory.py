"""What a run asks of the system's memory."""

import platform
from resource import RUSAGE_SELF, getrusage

import pytest
import torch

from gnunet.distributed.accelerator import keep_freed_memory


def page_faults() -> int:
    for _ in range(10):
        before = getrusage(RUSAGE_SELF).ru_minflt
        torch.ones(3 * 2**22)  # 48 MiB, more than glibc keeps
    return getrusage(RUSAGE_SELF).ru_minflt - before


def measure() -> int:
    print(page_faults())
    keep_freed_memory()
    print(page_faults())
    return 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.accelerator.is_available(), reason="glibc's, on a CPU")
def test_freed_memory_is_not_mapped_anew(run_ranks):
    """In a process of its own, since it cannot be undone."""
    returned, kept = map(int, run_ranks(1, measure)[0].split())
    assert 20 * kept < returned
