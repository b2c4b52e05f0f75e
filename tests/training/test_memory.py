"""What a run asks of the system's memory."""

import platform
import subprocess
import sys

import pytest
import torch

PROGRAM = """
from resource import RUSAGE_SELF, getrusage
import torch
from gnunet.distributed.accelerator import keep_freed_memory

def page_faults():
    for _ in range(10):
        before = getrusage(RUSAGE_SELF).ru_minflt
        torch.ones(3 * 2**22)  # 48 MiB, more than glibc keeps
    return getrusage(RUSAGE_SELF).ru_minflt - before

print(page_faults())
keep_freed_memory()
print(page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.accelerator.is_available(), reason="glibc's, on a CPU")
def test_freed_memory_is_not_mapped_anew():
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    returned, kept = map(int, out.split())
    assert 20 * kept < returned
