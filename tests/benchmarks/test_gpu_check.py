"""The GPU check: its time, what it leaves behind, what it says of claims; its rehearsal. Nothing here needs a GPU."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from gpu_check import __main__ as program
from gpu_check import kernels
from gpu_check.claims import FAILED, NOT_REACHED, PASSED, Claim, claims, table
from gpu_check.packages import unmet_requirements
from gpu_check.parts import FULL_SECONDS, MARK, Part, limits, parts, run

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
    """On its own or by pyenv, as the script looks for it."""
    commands = (["python3.12", "--version"], ["pyenv", "latest", "3.12"])
    return any(
        shutil.which(command[0]) and not subprocess.run(command, capture_output=True).returncode for command in commands
    )


@pytest.mark.slow
@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64") or not has_python_3_12(),
    reason="needs Linux on x86-64 with Python 3.12",
)
def test_rehearsal(tmp_path):
    """Every part runs with a device machine's versions, in a copy of what is sent there, and finds its kernels."""
    done = script("--rehearse", "--small", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compiled in this run: 0 kernels" in done.stdout


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
    assert "the results of another run" in capsys.readouterr().err


def test_parts_do_not_take_each_others_time():
    todo = [Part("a", 100, []), Part("b", 200, []), Part("c", 300, [])]
    left = {"at first": 600.0, "a": 600.0, "b": 570.0, "c": 300.0}  # a leaves 70 seconds, which b may have
    times = iter(left.values())
    assert [limit for _, limit in limits(todo, lambda: next(times))] == [100, 270, 300]
    assert next(limits(todo, lambda: 60))[1] == 10  # in proportion where there is less


def test_parts_of_the_check_fit_its_call(tmp_path):
    full = parts(tmp_path)
    assert sum(part.seconds for part in full) <= FULL_SECONDS - 30  # for packages and kernels, before they begin
    assert {name for part in full for name in part.records} == {"operator", "overhead", "training", "operator-compiled"}
    assert not any("gpu_check.no_numbers" in command for part in full for command in part.commands)


def test_gpu_only_tests_run_first(request):
    hook = next(
        plugin.pytest_collection_modifyitems
        for plugin in request.config.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", None) == str(ROOT / "tests/conftest.py")
    )

    class Item:
        def __init__(self, name, is_slow=False):
            self.path, self.is_slow = Path(name), is_slow

        def get_closest_marker(self, name):
            return True if self.is_slow else None

    items = [Item("test_kernels.py"), Item("test_on_gpu.py"), Item("test_compiled.py", is_slow=True)]
    hook(items)
    assert [item.path.name for item in items] == ["test_compiled.py", "test_on_gpu.py", "test_kernels.py"]


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
        assert self.run(8, program, "print('never')") == ("stopped after 8 s", ["begun", "written"])

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
        outcome, lines = self.run(8, program)
        assert outcome == ("stopped after 8 s" if seconds_at_work else "ended")
        assert is_gone(int(lines[0]))

    @pytest.mark.parametrize("at_its_start", [False, True])
    def test_no_process_is_left_behind_by_a_check_that_is_interrupted(self, monkeypatch, at_its_start):
        def interrupted(line: str) -> None:
            pids.append(int(line))
            os.kill(os.getpid(), signal.SIGINT)

        pids: list[int] = []
        part = Part("part", 1, [["-c", "import os, time; print(os.getpid()); time.sleep(600)"]])
        if at_its_start:  # before the program is waited for
            start = threading.Thread.start
            monkeypatch.setattr(threading.Thread, "start", lambda thread: (start(thread), time.sleep(5)))
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background ignore it
        try:
            with pytest.raises(KeyboardInterrupt):
                run(part, 60, os.environ, interrupted)
        finally:
            signal.signal(signal.SIGINT, before)
        assert is_gone(pids[0])

    def test_only_its_own_processes_are_ended(self):
        environment = {**os.environ, MARK: "1"}
        other = subprocess.Popen([sys.executable, "-c", "input()"], env=environment, stdin=subprocess.PIPE)
        self.run(60, "print(1)")
        assert other.poll() is None
        other.kill()


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

    def test_what_misses_a_claim(self):
        passed, failed, lost = (Claim("", "", "", "", verdict, True) for verdict in (PASSED, FAILED, NOT_REACHED))
        assert [program.is_missed(one, is_fake=False, is_timed=True) for one in (passed, failed, lost)] == [0, 1, 1]
        assert [program.is_missed(one, is_fake=True, is_timed=True) for one in (passed, failed, lost)] == [0, 0, 1]
        assert [program.is_missed(one, is_fake=True, is_timed=False) for one in (passed, failed, lost)] == [0, 0, 0]
        assert program.is_missed(Claim("", "", "", "", FAILED), is_fake=True, is_timed=False)

    TESTS = """
import os, pathlib, pytest, signal, time

@pytest.fixture
def broken():
    yield
    raise OSError

def test_passes(): pass
def test_skips(): pytest.skip("no memory")
@pytest.mark.skipif(True, reason="no GPU")
def test_is_skipped(): pass
def test_breaks_in_teardown(broken): pass
def test_kills():
    pid, progress = os.environ["CONTROLLER"], pathlib.Path("../tests.jsonl")
    end = time.monotonic() + 60
    while progress.read_text().count('"test"') < EXPECTED and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(int(pid), signal.SIGKILL)
    time.sleep(60)
"""

    @pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "workers"])
    def test_a_run_of_tests_that_is_killed_leaves_what_was_found(self, tmp_path, workers):
        """Every outcome of pytest has its verdict."""
        (tmp_path / "in").mkdir()
        (tmp_path / "in/test_it.py").write_text(self.TESTS.replace("EXPECTED", "6"))
        (tmp_path / "run.py").write_text("""
import os, sys, pytest
os.environ["CONTROLLER"] = str(os.getpid())
sys.exit(pytest.main(sys.argv[1:]))
""")
        command = [sys.executable, str(tmp_path / "run.py"), "-p", "gpu_check.progress", "--progress", "../tests.jsonl"]
        command += ["-p", "no:cacheprovider", *workers]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts/benchmarks")}
        subprocess.run(command, cwd=tmp_path / "in", env=environment, stdout=subprocess.DEVNULL)
        found = claims(tmp_path, [Part("tests", 1, [])])
        assert {claim.what: (claim.value, claim.verdict) for claim in found} == {
            "passes": ("1 of 1", PASSED),
            "skips": ("0 of 1, 1 skipped", NOT_REACHED),
            "is skipped": ("0 of 1, 1 skipped", NOT_REACHED),
            "breaks in teardown": ("0 of 1", FAILED),
            "kills": ("0 of 1", NOT_REACHED),
        }


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
