"""On Windows, which this only imitates: without Triton and POSIX's modules, functions and signals."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import importlib.abc, os, signal, sys
import accelerate, datasets, diffusers, psutil, rich.live, torch  # which have code of their own for Windows

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ABSENT = ("fcntl", "grp", "pwd", "resource", "termios", "triton")
for name in list(sys.modules):
    if name.partition(".")[0] in ABSENT:
        del sys.modules[name]
sys.meta_path.insert(0, Absent())
for name in ("fork", "getpgid", "killpg", "setsid", "sched_getaffinity", "sched_setaffinity", "uname"):
    vars(os).pop(name, None)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGALRM", "pthread_sigmask"):
    vars(signal).pop(name, None)

import gnunet
from gnunet.__main__ import main

y = gnunet.group_norm_silu(torch.randn(1, 4, 2, 2), 2)
assert gnunet.fuse(torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.SiLU())) == 1
sys.exit(main())
"""


def test_operator_fuse_and_sampling(finished, tmp_path):
    command = [sys.executable, "-c", PROGRAM, "sample", str(finished), "--num_images", "2", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--cpu"], check=True, cwd=Path(__file__).parents[1], timeout=100, stderr=subprocess.PIPE, text=True
    )
    assert "Triton" not in done.stderr
    assert len(list(tmp_path.glob("0*.png"))) == 2
