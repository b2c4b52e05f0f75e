"""train.py and scripts/sample.py as their users start them: plain, under accelerate launch, and stopped by signals."""

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gnunet.commands import sample, train
from gnunet.distributed.launch import run_as_processes
from gnunet.training import fit
from tests.runs import ROOT, TORCHRUN, program_environment, read_log, wait_until


def start(*command: str, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=cwd, env=program_environment(), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def run(*command: str, cwd: Path) -> str:
    process = start(*command, cwd=cwd)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, f"{out}\n{err}"
    return out + err


@pytest.fixture
def program(tmp_path, monkeypatch, capfd) -> Callable[..., str]:
    """`program(main, *flags, status=0)`: run a script's `main` in this process and folder; gives what it prints."""
    monkeypatch.chdir(tmp_path)

    def run_main(main: Callable[[list[str]], int], *flags: str, status: int = 0) -> str:
        found = main(list(flags))
        output = "".join(capfd.readouterr())
        assert found == status, output
        return output

    return run_main


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder, "loss")]


def sample_script(*arguments: str) -> int:
    sys.argv = ["sample.py", *arguments]
    runpy.run_path(str(ROOT / "scripts/sample.py"), run_name="__main__")  # exits
    return -1


def test_two_processes_sample_what_one_does(finished, program, run_ranks, tmp_path):
    arguments = [str(finished), "--num_images", "10", "--batch_size", "2", "--out"]
    program(sample.main, *arguments, "one")
    run_ranks(2, partial(sample_script, *arguments, "two"))
    for i in range(10):
        name = f"{i:06d}.png"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_two_processes_train_sample_and_evaluate_as_one_does(tiny, run_ranks, tmp_path):
    flags = ["--evaluate.every", "16", "--evaluate.num_images", "10", "--evaluate.monitor", "kid_efficientnet_lite0"]
    flags += ["--train.total_images", "32"]
    fit(tiny("one", *flags))
    run_ranks(2, tiny("two", *flags))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    grids = [np.asarray(Image.open(tmp_path / n / "samples/000000032.png"), dtype=int) for n in ("one", "two")]
    assert np.abs(grids[0] - grids[1]).max() <= 2  # the same image in every place
    one, two = (read_log(tmp_path / name, "evaluation_num_images") for name in ("one", "two"))
    assert [line["images"] for line in one] == [line["images"] for line in two] == [16, 32]
    for ours, theirs in zip(one, two, strict=True):
        assert theirs.keys() == ours.keys()
        assert theirs["fd_efficientnet_lite0"] == pytest.approx(ours["fd_efficientnet_lite0"], rel=1e-2)
    best = [json.loads((tmp_path / name / "checkpoints/best").read_text()) for name in ("one", "two")]
    assert best[0]["checkpoint"] == best[1]["checkpoint"]


@pytest.mark.slow
def test_ctrl_c_breaks_off_an_evaluation_on_two_processes(tiny_flags, tmp_path):
    """Within a batch of samples; what belongs to that number of images is left to the resumed run."""
    flags = tiny_flags("run", "--evaluate.every", "32", "--evaluate.num_images", "100000", "--train.log_every", "8")
    process = start(*TORCHRUN, str(ROOT / "train.py"), *flags, cwd=tmp_path)
    wait_until(lambda: list((tmp_path / "cache").glob("reference-*.safetensors")), lambda: process.poll() is None)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "stopped at 32 images, checkpoint written; the same command resumes the run" in out, err
    assert (tmp_path / "run/checkpoints/000000032/manifest.json").is_file()
    assert losses(tmp_path / "run") and "32," not in (tmp_path / "run/metrics.jsonl").read_text()


def become_processes(program: Path, status: str) -> int:
    """As a program does that nobody has launched."""
    sys.argv = [str(program), status]
    return run_as_processes(2)


def test_without_a_launcher_a_program_can_become_several_processes(start_ranks, tmp_path, monkeypatch):
    """Each with one thread; the status of the first to fail is the program's."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"  # in one write, since both processes have the same output
        "os.write(1, 'rank {RANK} of {WORLD_SIZE} {OMP_NUM_THREADS}\\n'.format_map(os.environ).encode())\n"
        "sys.exit(int(sys.argv[1]) if os.environ['RANK'] == '1' else 0)\n"
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    first = start_ranks(1, partial(become_processes, program, "7"))
    assert first.ended() == [7], first.said
    assert "rank 1 of 2 1" in first.said[0]
    for joined in ("LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU"):
        with monkeypatch.context() as patch:
            patch.setenv(joined, "1")
            assert run_as_processes(2) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_in_a_checkpoint_and_says_how_to_resume(tiny_flags, start_ranks, tmp_path, number):
    flags = tiny_flags("run", "--train.total_images", "100000", "--train.sample_every", "0", "--data.num_workers", "1")
    processes = start_ranks(1, partial(train.main, flags))
    log = tmp_path / "run/metrics.jsonl"
    wait_until(lambda: log.exists() and len(losses(tmp_path / "run")) >= 2, processes[0].is_alive)
    os.killpg(processes[0].pid, number)  # as a terminal does: the loader's processes get it too
    assert processes.ended() == [128 + number], processes.said
    assert "the same command resumes" in processes.said[0] and "Traceback" not in processes.said[0]
    newest = max(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"stopped at {int(newest)} images" in processes.said[0]


def test_plain_output_is_lines_of_text(tiny_flags, tmp_path):
    out = run(sys.executable, str(ROOT / "train.py"), *tiny_flags("run"), cwd=tmp_path)
    (line,) = [text for text in out.splitlines() if text.startswith("images 32/64") and "loss" in text and "lr" in text]
    assert "images/s" in line and "MiB" in line and "left" in line
    assert "\x1b" not in out


def test_user_errors_are_one_message_and_status_2(tiny_flags, program):
    out = program(train.main, *tiny_flags("run", "--train.learning_rat", "1"), status=2)
    assert "train.learning_rate" in out and "Traceback" not in out
    out = program(train.main, "--data.source", "/nowhere/at/all", status=2)
    assert "/nowhere/at/all" in out and "Traceback" not in out
