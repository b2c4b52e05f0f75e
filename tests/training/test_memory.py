"""What a run asks of the system's memory."""

import platform
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import resource, sys
import torch
from gnunet.training.accelerator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(3 * 2**22)  # 48 MiB, more than glibc keeps
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or torch.accelerator.is_available(), reason="glibc's, on a CPU")
def test_freed_memory_is_not_mapped_anew():
    faults = [
        int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "return")
    ]
    assert 20 * faults[0] < faults[1], faults
