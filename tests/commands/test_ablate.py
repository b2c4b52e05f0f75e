"""`gnunet ablate`: plans, invalid arguments, kill -9 and resuming, several processes."""

import glob
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from gnunet.ablation.plan import Plan
from gnunet.ablation.progress import Display, TimeEstimate
from gnunet.ablation.records import read_records
from gnunet.ablation.runner import fork_server, pending_trials, run_in_process
from gnunet.ablation.study_runner import StudyRunner
from gnunet.commands import ablate as script
from gnunet.processes import single_threaded

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "ablate.py"


@pytest.fixture
def study(tiny_flags, tmp_path, monkeypatch):
    """`study(**keys)`: write study.yaml into the current folder: two variants of tiny runs on two seeds."""
    _, file, _, source, _, cache, *_ = tiny_flags("unused")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def write(**keys) -> Path:
        base = {"data.source": source, "data.cache_dir": cache, **keys.pop("base", {})}
        variants = {"group": {"model.norm.groups": 4}, "batch": {"model.norm.kind": "batch"}}
        study = {"title": "T", "question": "Q", "config": file, "base": base, "baseline": "group", "seeds": [0, 1]}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**study, "variants": variants, **keys}, sort_keys=False))
        return path

    return write


@pytest.fixture
def ablate(capsys) -> Callable[..., str]:
    """`ablate(*arguments, status=0)`: run the command in this process; returns its output."""

    def run(*arguments: str, status: int = 0) -> str:
        actual = script.main(["study.yaml", *arguments])
        output = "".join(capsys.readouterr())
        assert actual == status, output
        return output

    return run


def test_dry_run_prints_the_plan_and_runs_nothing(study, ablate, tmp_path):
    study(budgets={"large": {"train.total_images": 100_000}, "small": {}})
    out = ablate("--budget", "small", "--dry_run", "--only", "batch", "--jobs", "2")
    assert "2 trials: 0 done, 2 to run" in out and "group" not in out
    assert "expected time: " in out and "2 trials at a time, by a probe" in out
    assert not (tmp_path / "runs").exists()


def test_shipped_studies_are_found_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main(["nosuch", "--report"]) == 2
    assert "nosuch" in capsys.readouterr().err
    assert script.main(["smoke", "--report"]) == 2  # found; it has no records here
    assert "runs/ablations/smoke" in capsys.readouterr().err


def test_all_mistakes_are_in_one_message_with_status_2(study, ablate, tmp_path):
    study(variants={"group": {}, "batch": {"model.norm.kimd": "batch"}, "other": {"train.total_images": "many"}})
    out = ablate(status=2)
    assert "Traceback" not in out
    for named in ("study.yaml", "model.norm.kimd", "model.norm.kind?", "train.total_images: given many", "'other'"):
        assert named in out
    study()
    assert "train.imags" in ablate("--train.imags", "64", status=2)
    assert "--only: given nobody; valid: group, batch" in ablate("--only", "nobody", status=2)
    assert "--only: given nobody" in ablate("--report", "--only", "nobody", status=2)
    assert "--budget: given big" in ablate("--budget", "big", status=2)
    for arguments in (["--report", "--dry_run"], ["--jobs", "0"], ["--seed", "1"]):
        with pytest.raises(SystemExit) as exit:
            ablate(*arguments)
        assert exit.value.code == 2
    assert not (tmp_path / "runs").exists()


def run_script(server_address: str) -> None:
    """The script, whose trials are forked from this process's own server in place of another, which takes seconds."""
    server = forkserver._forkserver
    server._forkserver_address = server_address
    server.ensure_running = forkserver.ensure_running = lambda: None
    sys.argv = [str(SCRIPT), "study.yaml", "--jobs", "2"]
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def runner():
    """Starts the script in a process forked with everything imported; kills what is left at the end."""
    started = []

    def start_runner() -> ForkServerProcess:
        context = fork_server()
        process = context.Process(target=run_script, args=(forkserver._forkserver._forkserver_address,))
        process.start()
        started.append(process)
        return process

    yield start_runner
    for process in started:
        process.kill()
        process.join()


def wait_until(reached: Callable[[], object], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def at_work(folder: Path) -> list[psutil.Process]:
    """The processes with an open file in a folder, as trials have their logs."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(file.path.startswith(f"{folder}/") for file in process.open_files()):
                found.append(process)
        except psutil.Error:  # it has ended, or belongs to another user
            pass
    return found


def records_without_times(folder: Path) -> dict[str, str]:
    return {name: json.dumps({**record, "times": None}) for name, record in read_records(folder).items()}


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}


@pytest.mark.slow
def test_study_killed_and_run_again_has_the_same_records(study, runner, tmp_path):
    """kill -9 while a trial trains, while one is measured, between trials; compared with undisturbed trials."""
    path = study(base={"train.total_images": 80, "validation.num_examples": 4})
    folder = tmp_path / "runs" / "ablations" / "study"

    def unfinished() -> list[Path]:
        return [run for run in folder.glob("trials/*") if not (folder / "records" / f"{run.name}.json").exists()]

    moments = [
        lambda: any(any(run.glob("checkpoints/*/manifest.json")) for run in unfinished()),
        lambda: any((run / "samples" / "000000080.png").exists() for run in unfinished()),
        lambda: len(list(folder.glob("records/*.json"))) == 2 and unfinished(),
    ]
    for reached in moments:
        process = runner()
        wait_until(lambda process=process, reached=reached: reached() or not process.is_alive())
        assert process.is_alive()
        process.kill()
        wait_until(lambda: not at_work(folder))
        assert unfinished()  # its trials have ended with it
    process = runner()
    process.join()
    assert process.exitcode == 0

    study_runner = StudyRunner(path, budget=None, folder=tmp_path / "undisturbed", only=[], flags={})
    trials = pending_trials(study_runner.plan()[0].trials, study_runner.folder)
    display = Display(trials, study_runner.folder, TimeEstimate(Plan(), {}), at_a_time=1, enabled=False)
    with single_threaded():
        assert run_in_process(trials, study_runner.folder, display) == ([], None)
    records = records_without_times(folder)
    assert len(records) == 4 and records == records_without_times(study_runner.folder)
    assert pictures(folder) == pictures(study_runner.folder)


def test_two_processes_run_trials_together(study, run_ranks, tmp_path):
    study(seeds=[0])
    outputs = run_ranks(2, partial(script.main, ["study.yaml", "--train.total_images", "32"]))
    assert [text.count("2 trials: 0 done, 2 to run") for text in outputs] == [1, 0]  # the main process prints
    records = read_records(tmp_path / "runs" / "ablations" / "study").values()
    assert sorted(kind for record in records for kind in record["norm_kinds"]) == ["batch", "group"]
    for record in records:
        assert (record["outcome"], record["images"], record["environment"]["processes"]) == ("complete", 32, 2)
        assert (record["errors"]["batch"] is not None) == record["batch_dependent"]


@pytest.mark.slow
def test_signal_to_all_processes_stops_the_runner_after_checkpoints(study, tmp_path):
    study(base={"train.total_images": 100_000, "train.checkpoint_every": 0, "train.sample_every": 0})
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "study.yaml", "--jobs", "1"], text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    logs = f"{tmp_path}/runs/ablations/study/trials/*/metrics.jsonl"
    wait_until(lambda: glob.glob(logs) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "stopping: the running trials write their checkpoints" in out and "Traceback" not in out
    assert "stopped; the same command resumes" in out
    (checkpoint,) = tmp_path.glob("runs/ablations/study/trials/*/checkpoints/*")
    assert f"stopped at {int(checkpoint.name)} images" in (checkpoint.parents[1] / "log.txt").read_text()
    assert not at_work(tmp_path / "runs")
