"""The GPU check refuses a machine without a GPU, and goes on past a part that fails. Nothing here needs a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(tmp_path):
    """Runs the script in an empty folder with another Python; returns what came of it."""

    def check(*arguments: str, python: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(ROOT / "scripts/gpu_check.sh"), *arguments], capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "PYTHON": python, **environment},
        )  # fmt: skip

    return check


@pytest.fixture
def fake_python(tmp_path):
    """A Python that notes what it is to run and does nothing, except that pytest fails."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\necho "$*" | tee -a {tmp_path}/calls\ncase "$*" in *"-m pytest"*) exit 3;; esac\n')
    path.chmod(0o755)
    return str(path)


def test_says_that_there_is_no_gpu(check, tmp_path):
    done = check("out", python=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "needs a GPU" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("one", "two")])
def test_usage(check, fake_python, tmp_path, arguments):
    done = check(*arguments, python=fake_python)
    assert done.returncode == 2 and "usage" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_goes_on_past_a_failure_and_reports_it(check, fake_python, tmp_path):
    done = check("out", python=fake_python)
    assert done.returncode == 1
    calls = (tmp_path / "calls").read_text()
    assert "-m pytest -m gpu" in calls and "benchmark_op.py" in calls
    assert "benchmark_training.py" in calls and calls.count(f"--out {tmp_path}/out\n") == 2
    summary = done.stdout.split("== summary\n")[1].splitlines()
    verdicts = [line.split(" (")[0] for line in summary]
    failed = "failed, exit status 3"
    assert verdicts == [f"tests: {failed}", f"trainer: {failed}", "operator: passed", "training: passed"]
    assert "-m pytest" in (tmp_path / "out/tests.log").read_text()
