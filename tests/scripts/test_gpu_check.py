"""The GPU check: its time, what it leaves behind, what it says of claims; its rehearsal. Nothing here needs a GPU."""

import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from gpu_check import __main__ as program
from gpu_check import kernels
from gpu_check.claims import FAILED, NOT_REACHED, PASSED, claims, table
from gpu_check.packages import unmet_requirements
from gpu_check.parts import MARK, Part, limits, parts, run

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


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--compile", "x"), ("--rehearse", "--large")])
def test_usage(tmp_path, arguments):
    done = script(*arguments, folder=tmp_path, PYTHON="false")
    assert done.returncode == 2 and "usage" in done.stderr


def has_python_3_12() -> bool:
    return bool(shutil.which("python3.12") or shutil.which("pyenv"))


@pytest.mark.slow
@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64") or not has_python_3_12(),
    reason="needs Linux on x86-64 with Python 3.12",
)
def test_rehearsal(tmp_path):
    """Every part runs with the versions of the machine it is for, from what travels there alone."""
    done = script("--rehearse", "--small", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compiled here: 0 kernels, 0 graphs" in done.stdout


def test_a_record_without_a_commit_is_not_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(program, "origin", lambda *_: {"device": "a GPU", "commit": None})
    assert program.main([str(tmp_path / "out")]) == 2
    assert "GIT_COMMIT" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_results_of_another_run_are_not_taken_for_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(program, "origin", lambda *_: {"device": "a GPU", "commit": "1"})
    (tmp_path / "tests.jsonl").touch()
    assert program.main([str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_the_time_of_a_part_is_never_another_ones():
    todo = [Part("a", 100, []), Part("b", 200, []), Part("c", 300, [])]
    left = {"at first": 600.0, "a": 600.0, "b": 570.0, "c": 300.0}  # a leaves 70 seconds, which b may have
    times = iter(left.values())
    assert [limit for _, limit in limits(todo, lambda: next(times))] == [100, 270, 300]
    assert next(limits(todo, lambda: 60))[1] == 10  # in proportion where there is less


def test_parts_of_the_check_fit_its_call(tmp_path):
    full = parts(tmp_path, small=False, fake=False, compiling=False)
    assert sum(part.seconds for part in full) <= 590 - 30  # setup and table
    for part in full:
        for command in part.commands:
            assert "gpu_check.no_numbers" not in command


def test_what_only_a_gpu_shows_is_tested_first(request):
    fast = [item.path.name for item in request.session.items if item.get_closest_marker("slow") is None]
    assert fast == sorted(fast, key=lambda name: name != "test_on_gpu.py")


class TestRun:
    def run(self, seconds: float, *programs: str) -> tuple[str, list[str]]:
        lines: list[str] = []
        part = Part("part", 1, [["-c", program] for program in programs])
        return run(part, seconds, os.environ, lines.append), lines

    def test_programs_one_after_the_other(self):
        assert self.run(60, "print(1)", "import sys; sys.exit(3)", "print(2)") == ("exit status 3", ["1", "2"])
        assert self.run(60, "print(1)") == ("ended", ["1"])

    def test_a_part_that_takes_too_long_is_asked_to_end_and_keeps_what_it_said(self):
        program = """
import time
print("begun")
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("written")
"""
        assert self.run(2, program, "print('never')") == ("stopped after 2 s", ["begun", "written"])

    @pytest.mark.parametrize("seconds", [60, 1.5])
    def test_no_process_is_left_behind(self, seconds):
        """Ranks of tests lead a session of their own, and may not heed a signal."""
        program = f"""
import signal, subprocess, sys, time
rank = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", rank], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep({0 if seconds == 60 else 60})
"""
        _, (pid, *_) = self.run(seconds, program)
        for _ in range(100):
            if not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(0.1)
        raise AssertionError(f"process {pid} goes on")

    def test_only_its_own_processes_are_ended(self):
        other = subprocess.Popen(
            [sys.executable, "-c", "input()"], env={**os.environ, MARK: "1"}, stdin=subprocess.PIPE
        )
        self.run(60, "print(1)")
        assert other.poll() is None
        other.kill()


class TestClaims:
    def test_every_claim_has_a_verdict(self, tmp_path):
        lines = [
            {"collected": [f"tests/test_a.py::test_bits[{case}]" for case in "abc"] + ["tests/test_a.py::test_later"]},
            {"test": "tests/test_a.py::test_bits[a]", "outcome": "passed"},
            {"test": "tests/test_a.py::test_bits[b]", "outcome": "failed"},
            {"test": "tests/test_a.py::test_bits[b]", "outcome": "passed"},  # its teardown
        ]
        (tmp_path / "tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        targets = [
            {"target": "cases of 2 that are right, >= 2", "value": 2, "met": True, "cases": 2, "at": None},
            {"target": "ratio, least, >= 1.3", "value": 1.2, "met": False, "cases": 2, "at": "a case"},
            {"target": "share, least, >= 0.85", "value": None, "met": None, "cases": 0, "at": None},
        ]
        (tmp_path / "2026-01-01-gpu-operator.json").write_text(json.dumps({"targets": targets}))
        found = claims(tmp_path, ["tests", "trainer", "operator"])
        assert [(claim.part, claim.what, claim.value, claim.bar, claim.verdict) for claim in found] == [
            ("tests", "bits", "1 of 3", "all", FAILED),
            ("tests", "later", "0 of 1", "all", NOT_REACHED),
            ("trainer", "", "", "", NOT_REACHED),
            ("operator", "cases of 2 that are right", "2 over 2 cases", ">= 2", PASSED),
            ("operator", "ratio, least", "1.2 over 2 cases, at a case", ">= 1.3", FAILED),
            ("operator", "share, least", "", ">= 0.85", NOT_REACHED),
        ]
        assert [claim.is_number for claim in found] == [False] * 4 + [True] * 2
        assert len(table(found).splitlines()) == 1 + len(found)

    @pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "workers"])
    def test_a_run_of_tests_that_is_killed_leaves_what_was_found(self, tmp_path, workers):
        (tmp_path / "in").mkdir()
        (tmp_path / "in/test_it.py").write_text("""
import os, signal, time
def test_first(): pass
def test_second():
    while "test_first" not in open("../progress").read().partition("outcome")[0]:
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(int(os.environ["CONTROLLER"]), signal.SIGKILL)
    time.sleep(60)
def test_third(): pass
""")
        (tmp_path / "run.py").write_text("""
import os, sys, pytest
os.environ["CONTROLLER"] = str(os.getpid())
sys.exit(pytest.main(sys.argv[1:]))
""")
        command = [sys.executable, str(tmp_path / "run.py"), "-p", "gpu_check.progress", "--progress", "../progress"]
        command += ["-p", "no:cacheprovider", *workers]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
        subprocess.run(command, cwd=tmp_path / "in", env=environment, stdout=subprocess.DEVNULL)
        shutil.copy(tmp_path / "progress", tmp_path / "tests.jsonl")
        verdicts = {claim.what: claim.verdict for claim in claims(tmp_path, ["tests"])}
        assert verdicts["first"] == PASSED and verdicts["second"] == NOT_REACHED and "third" in verdicts


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
    (inductors / "triton_poi_0.cubin").write_text("in the graph")
    (inductors / "__grp__triton_poi_0.json").write_text("{}")
    (caches / "triton/C").mkdir()
    (caches / "triton/C/launcher.so").write_text("launcher")
    graph.write_bytes(pickle.dumps("a graph"))
    (caches / "inductor/aa").mkdir()
    (caches / "inductor/aa/x.best_config").write_text("a choice made on no GPU")
    kernels.pack(caches, tmp_path / "wheels/kernels.tar.xz")
    shutil.rmtree(caches)

    there = tmp_path / "there"
    kernels.unpack(tmp_path / "wheels/kernels.tar.xz", there)
    found = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert found == {
        "triton/A/tile.cubin", "triton/A/tile.json", "triton/A/__grp__tile.json", "triton/C/launcher.so",
        "inductor/fxgraph/aa/key/entry",
    }  # fmt: skip
    group = json.loads((there / "triton/A/__grp__tile.json").read_text())["child_paths"]
    assert group == {name: str(there / "triton/A" / name) for name in names[:2]}
    # What is then compiled, beyond what has travelled, can be told from it.
    assert kernels.count(there) == {"kernels": 0, "graphs": 1}
    (there / "triton/A/other.ttir").touch()
    assert kernels.count(there)["kernels"] == 1


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
