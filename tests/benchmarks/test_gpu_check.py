"""The GPU check: its time, what it leaves behind, what it says of claims. Nothing here needs a GPU.

`bash scripts/gpu_check.sh --rehearse --small` runs all of it, on a device that computes nothing, in minutes.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest

from gpu_check import kernels
from gpu_check.claims import FAILED, NOT_REACHED, PASSED, claims, table
from gpu_check.packages import unmet_requirements
from gpu_check.parts import Part, limits, run

ROOT = Path(__file__).parents[2]


def script(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """gpu_check.sh, called in a folder."""
    return subprocess.run(
        ["bash", str(ROOT / "scripts/gpu_check.sh"), *arguments], capture_output=True, text=True, cwd=folder,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_says_that_there_is_no_gpu(tmp_path):
    done = script("out", folder=tmp_path, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "needs a GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_parts_do_not_take_each_others_time():
    todo = [Part("a", 100, []), Part("b", 200, []), Part("c", 300, [])]
    left = {"at first": 600.0, "a": 600.0, "b": 570.0, "c": 300.0}  # a leaves 70 seconds, which b may have
    times = iter(left.values())
    assert [limit for _, limit in limits(todo, lambda: next(times))] == [100, 270, 300]
    assert next(limits(todo, lambda: 60))[1] == 10  # in proportion where there is less


class TestRun:
    def run(self, seconds: float, *programs: str) -> tuple[str, list[str]]:
        lines: list[str] = []
        part = Part("part", 1, [["-c", program] for program in programs])
        return run(part, seconds, os.environ, lines.append), lines

    def test_programs_one_after_the_other(self):
        assert self.run(60, "print(1)", "import sys; sys.exit(3)", "print(2)") == ("exit status 3", ["1", "2"])
        assert self.run(60, "print(1)") == ("ended", ["1"])

    def test_a_part_that_takes_too_long_is_interrupted_and_can_still_write(self):
        program = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
print("begun")
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("written")
"""
        assert self.run(5, program, "print('never')") == ("stopped after 5 s", ["begun", "written"])

    @pytest.mark.parametrize("seconds_at_work", [0, 60], ids=["ended", "stopped"])
    def test_no_process_is_left_behind(self, seconds_at_work):
        """Ranks of tests lead sessions of their own, and a signal may not reach or end them."""
        program = f"""
import signal, subprocess, sys, time
rank = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", rank], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep({seconds_at_work})
"""
        outcome, lines = self.run(5, program)
        assert outcome == ("stopped after 5 s" if seconds_at_work else "ended")
        assert is_gone(int(lines[0]))


def is_gone(pid: int) -> bool:
    """Nobody may have waited for it yet."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


class TestClaims:
    def test_every_claim_has_a_verdict(self, tmp_path):
        lines = [
            {"collected": [f"tests/test_a.py::test_bits[{case}]" for case in "abc"] + ["tests/test_a.py::test_later"]},
            {"test": "tests/test_a.py::test_bits[a]", "outcome": "passed"},
            {"test": "tests/test_a.py::test_bits[b]", "outcome": "failed"},
            {"test": "tests/test_a.py::test_bits[b]", "outcome": "passed"},  # its teardown
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "tests.jsonl").write_text(text + '{"test": "tests/test_a')  # where it was killed
        targets = [
            {"target": "cases of 2 that are right, >= 2", "value": 2, "met": True, "at": None, "is_timing": False},
            {"target": "ratio, least, >= 1.3", "value": 1.2, "met": False, "cases": 2, "at": "a case"},
            {"target": "share, least, >= 0.85", "value": None, "met": None, "cases": 0, "at": None},
        ]
        (tmp_path / "2026-01-01-gpu-operator.json").write_text(json.dumps({"targets": targets}))
        (tmp_path / "2026-01-01-gpu-overhead.json").write_text(json.dumps({"targets": []}))
        run_parts = [
            Part("tests", 1, []), Part("trainer", 1, []), Part("operator", 1, [], ("operator",)),
            Part("training", 1, [], ("training",)),
        ]  # fmt: skip
        found = claims(tmp_path, run_parts)
        assert [(claim.part, claim.what, claim.value, claim.bar, claim.verdict) for claim in found] == [
            ("tests", "bits", "1 of 3", "all", FAILED),
            ("tests", "later", "0 of 1", "all", NOT_REACHED),
            ("trainer", "", "", "", NOT_REACHED),
            ("operator", "cases of 2 that are right", "2", ">= 2", PASSED),
            ("operator", "ratio, least", "1.2 over 2 cases, at a case", ">= 1.3", FAILED),
            ("operator", "share, least", "", ">= 0.85", NOT_REACHED),
            ("training", "record training", "", "", NOT_REACHED),
        ]
        assert [claim.is_timing for claim in found] == [False] * 4 + [True] * 2 + [False]
        assert len(table(found).splitlines()) == 1 + len(found)


def test_kernels_are_found_where_they_are_unpacked(tmp_path):
    caches = tmp_path / "here"
    kernel, inductors = caches / "triton/A", caches / "triton/B"
    graph = caches / "inductor/fxgraph/aa/key/entry"
    for folder in (kernel, inductors, graph.parent):
        folder.mkdir(parents=True)
    names = ["tile.cubin", "tile.json", "tile.ptx", "tile.ttir"]
    for name in names:
        (kernel / name).write_text(name)
    (kernel / "__grp__tile.json").write_text(json.dumps({"child_paths": {name: str(kernel / name) for name in names}}))
    (inductors / "triton_poi_0.cubin").write_text("by inductor")
    (inductors / "__grp__triton_poi_0.json").write_text("{}")
    (caches / "triton/C").mkdir()
    (caches / "triton/C/launcher.so").write_text("launcher")
    graph.write_bytes(b"of torch.compile")
    (caches / "inductor/aa").mkdir()
    (caches / "inductor/aa/x.best_config").write_text("a choice made on no GPU")
    kernels.pack(caches, tmp_path / "wheels/kernels.tar.xz")
    shutil.rmtree(caches)

    there = tmp_path / "there"
    kernels.unpack(tmp_path / "wheels/kernels.tar.xz", there)
    found = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert found == {
        "triton/A/tile.cubin", "triton/A/tile.json", "triton/A/__grp__tile.json", "triton/C/launcher.so",
    }  # fmt: skip
    group = json.loads((there / "triton/A/__grp__tile.json").read_text())["child_paths"]
    assert group == {name: str(there / "triton/A" / name) for name in names[:2]}
    # What is then compiled, beyond what has travelled, can be told from it.
    assert kernels.count(there) == 0
    (there / "triton/A/other.ttir").touch()
    assert kernels.count(there) == 1


def test_what_project_and_wheels_require_must_be_there(tmp_path):
    pytest.importorskip("tomllib")
    with zipfile.ZipFile(tmp_path / "it-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "it-1.dist-info/METADATA",
            """Name: it
Version: 1
Requires-Dist: pytest>=7
Requires-Dist: pytest<1
Requires-Dist: no-such-package>=2
Requires-Dist: also-missing; extra == "more"
Requires-Dist: also-missing; python_version < "3"
""",
        )
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\ndependencies = ["pytest>=7", "absent>=3"]\n')
    assert [line.partition(", has")[0] for line in unmet_requirements(tmp_path, project)] == [
        "gnunet needs absent>=3", "it needs pytest<1", "it needs no-such-package>=2"
    ]  # fmt: skip
