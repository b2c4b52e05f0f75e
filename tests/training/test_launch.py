"""train.py and scripts/sample.py as their users start them: plain, under accelerate launch, and stopped by signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def start(*command: str, cwd: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def run(*command: str, cwd: Path, status: int = 0) -> str:
    process = start(*command, cwd=cwd)
    out, err = process.communicate(timeout=280)
    assert process.returncode == status, f"{out}\n{err}"
    return out + err


def plain(script: str, *flags: str, cwd: Path, status: int = 0) -> str:
    return run(sys.executable, str(ROOT / script), *flags, cwd=cwd, status=status)


def launched(processes: int, script: str, *flags: str, cwd: Path) -> str:
    return run(
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes),
        str(ROOT / script), *flags, cwd=cwd,
    )  # fmt: skip


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


STEPS20 = ["--train.images", "160", "--train.log_every", "8", "--train.checkpoint_every", "0"]


def test_two_processes_train_as_one_does(tiny_flags, tmp_path):
    """The same examples (the losses agree), the same validation, the same image in every place."""
    plain("train.py", *tiny_flags("one", *STEPS20), cwd=tmp_path)
    launched(2, "train.py", *tiny_flags("two", *STEPS20), cwd=tmp_path)
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    pictures = [np.asarray(Image.open(tmp_path / n / "samples/000000160.png"), dtype=int) for n in ("one", "two")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_running_statistics_are_those_of_all_processes(tiny_flags, tmp_path):
    """Each process has seen other images; what one of them writes is what all of them go on from."""
    flags = tiny_flags("run", "--model.norm.kind", "batch")
    launched(2, "train.py", *flags, cwd=tmp_path)
    final = tmp_path / "run/checkpoints/000000064"
    before = {path.name: path.read_bytes() for path in final.iterdir()}
    shutil.rmtree(final)
    assert "resuming" in launched(2, "train.py", *flags, cwd=tmp_path)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before


def test_a_run_moves_between_launch_sizes(tiny_flags, tmp_path):
    """Stopped on two processes by a signal to the launcher, finished on one; then sampled by two."""
    flags = tiny_flags(
        "run", "--train.images", "4000", "--train.checkpoint_every", "0", "--train.sample_every", "0"
    )  # fmt: skip
    process = start(
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(ROOT / "train.py"),
        *flags, cwd=tmp_path,
    )  # fmt: skip
    wait_for_losses(tmp_path / "run", process)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    images = int(checkpoint.name)
    assert 0 < images < 4000 and images % 8 == 0
    out = plain("train.py", *flags, cwd=tmp_path)
    assert f"resuming {checkpoint}" in out and "done: 4000 images" in out

    sample = [str(tmp_path / "run"), "--num_images", "10", "--batch_size", "2"]
    plain("scripts/sample.py", *sample, "--out", "one", cwd=tmp_path)
    launched(2, "scripts/sample.py", *sample, "--out", "two", cwd=tmp_path)
    for i in range(10):
        name = f"{i:06d}.png"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(tiny_flags, tmp_path):
    flags = ["--evaluate.every", "32", "--evaluate.num_images", "10", "--evaluate.keep_best", "kid_efficientnet_lite0"]
    plain("train.py", *tiny_flags("one", *flags), cwd=tmp_path)
    launched(2, "train.py", *tiny_flags("two", *flags), cwd=tmp_path)

    def scores(folder: Path) -> list[dict]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "evaluation_num_images" in line]

    one, two = scores(tmp_path / "one"), scores(tmp_path / "two")
    assert [line["images"] for line in one] == [line["images"] for line in two] == [32, 64]
    for ours, theirs in zip(one, two, strict=True):
        assert theirs.keys() == ours.keys()
        assert theirs["fd_efficientnet_lite0"] == pytest.approx(ours["fd_efficientnet_lite0"], rel=1e-2)
    best = [json.loads((tmp_path / name / "checkpoints/best").read_text()) for name in ("one", "two")]
    assert best[0]["checkpoint"] == best[1]["checkpoint"]


def test_a_signal_breaks_off_an_evaluation_on_two_processes(tiny_flags, tmp_path):
    """Within a batch of samples; what belongs to that number of images is left to the resumed run."""
    flags = tiny_flags("run", "--evaluate.every", "32", "--evaluate.num_images", "100000", "--train.log_every", "8")
    process = start(
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(ROOT / "train.py"),
        *flags, cwd=tmp_path,
    )  # fmt: skip
    for _ in range(1200):
        if process.poll() is not None or list((tmp_path / "cache").glob("reference-*.safetensors")):
            break
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "stopped at 32 images, checkpoint written; the same command resumes the run" in out, err
    assert (tmp_path / "run/checkpoints/000000032/manifest.json").is_file()
    assert losses(tmp_path / "run") and "32," not in (tmp_path / "run/metrics.jsonl").read_text()


def test_without_a_launcher_a_program_can_become_several_processes(tmp_path):
    """Each with one thread; the status of the first to fail is the program's."""
    (tmp_path / "program.py").write_text(
        "import os, sys\n"
        "from gnunet.training.launch import run_as_processes\n"
        "if (status := run_as_processes(2)) is not None:\n"
        "    sys.exit(status)\n"
        "print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], os.environ['OMP_NUM_THREADS'])\n"
        "sys.exit(int(sys.argv[1]) if os.environ['RANK'] == '1' else 0)\n"
    )
    assert "rank 1 of 2 1" in run(sys.executable, "program.py", "7", cwd=tmp_path, status=7)


def wait_for_losses(folder: Path, process: subprocess.Popen) -> None:
    """Until the run has logged twice."""
    for _ in range(1200):
        if process.poll() is not None:
            raise AssertionError("".join(process.communicate()))
        if (folder / "metrics.jsonl").exists() and len(losses(folder)) >= 2:
            return
        time.sleep(0.05)
    raise AssertionError("the run logs nothing")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_in_a_checkpoint_and_says_how_to_resume(tiny_flags, tmp_path, number):
    flags = tiny_flags("run", "--train.images", "100000", "--train.sample_every", "0", "--data.num_workers", "1")
    process = start(sys.executable, str(ROOT / "train.py"), *flags, cwd=tmp_path)
    wait_for_losses(tmp_path / "run", process)
    os.killpg(process.pid, number)  # as a terminal does: the loader's processes get it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "the same command resumes" in out
    assert "Traceback" not in err
    newest = max(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"stopped at {int(newest)} images" in out


def test_plain_output_is_lines_of_text(tiny_flags, tmp_path):
    out = plain("train.py", *tiny_flags("run"), cwd=tmp_path)
    (line,) = [text for text in out.splitlines() if text.startswith("images 32/64") and "loss" in text and "lr" in text]
    assert "images/s" in line and "MiB" in line and "left" in line
    assert "\x1b" not in out


def test_user_errors_are_one_message_and_status_2(tiny_flags, tmp_path):
    out = plain("train.py", *tiny_flags("run", "--train.learning_rat", "1"), cwd=tmp_path, status=2)
    assert "train.learning_rate" in out and "Traceback" not in out
    out = plain("train.py", "--data.source", "/nowhere/at/all", cwd=tmp_path, status=2)
    assert "/nowhere/at/all" in out and "Traceback" not in out


def test_sample_py_gives_the_training_grids_images(tiny_flags, tmp_path):
    plain("train.py", *tiny_flags("run"), cwd=tmp_path)
    grid = np.asarray(Image.open(tmp_path / "run/samples/000000064.png"))
    plain("scripts/sample.py", "run", "--num_images", "6", "--out", "same", cwd=tmp_path)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "same/grid.png")), grid)
    plain("scripts/sample.py", "run/checkpoints/000000064", "--num_images", "5", "--batch_size", "5", "--out", "other",
          cwd=tmp_path)  # fmt: skip
    plain("scripts/sample.py", "run/model", "--num_images", "5", "--batch_size", "4", "--steps", "4", "--out", "model",
          cwd=tmp_path)  # fmt: skip
    for i in range(5):
        files = [tmp_path / folder / f"{i:06d}.png" for folder in ("same", "other", "model")]
        images = [np.asarray(Image.open(file), int) for file in files]
        assert np.abs(images[0] - images[1]).max() <= 1  # 1e-4 in [-1, 1] moves a rounding by one at most
        assert np.array_equal(images[0], images[2])


def test_sample_py_classes_guidance_seeds_and_errors(tiny_flags, tmp_path):
    plain("train.py", *tiny_flags("run"), cwd=tmp_path)

    def sample(out: str, *flags: str, status: int = 0) -> str:
        return plain("scripts/sample.py", "run", "--num_images", "2", "--out", out, *flags, cwd=tmp_path, status=status)

    def image(out: str, i: int = 0) -> np.ndarray:
        return np.asarray(Image.open(tmp_path / out / f"{i:06d}.png"))

    sample("dark", "--classes", "dark")
    sample("light", "--classes", "light")
    sample("number", "--classes", "1")
    sample("turns", "--classes", "light", "dark")
    assert not np.array_equal(image("dark"), image("light"))
    assert np.array_equal(image("light"), image("number"))
    assert np.array_equal(image("turns", 0), image("light", 0)) and np.array_equal(image("turns", 1), image("dark", 1))
    sample("guided", "--classes", "dark", "--guidance", "3")
    assert not np.array_equal(image("guided"), image("dark"))
    sample("seed", "--classes", "dark", "--seed", "7")
    assert not np.array_equal(image("seed"), image("dark"))
    assert "'grey'" in (out := sample("x", "--classes", "grey", status=2)) and "dark, light" in out
    assert "heun" in sample("x", "--sampler", "nosuch", status=2)
    assert "run/none" in plain("scripts/sample.py", "run/none", cwd=tmp_path, status=2)


def test_the_exported_model_needs_no_gnunet(tiny_flags, tmp_path):
    flags = tiny_flags("run", "--diffusion.kind", "ddpm", "--data.class_conditional", "false")
    plain("train.py", *flags, cwd=tmp_path)
    code = (
        "import sys; sys.modules['gnunet'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('run/model')\n"
        "print(type(pipe).__name__, pipe(num_inference_steps=2, output_type='np').images.shape)"
    )
    assert "DDPMPipeline (1, 16, 16, 3)" in run(sys.executable, "-c", code, cwd=tmp_path)


def test_a_checkpoint_holds_only_safetensors_json_and_yaml(tiny_flags, tmp_path):
    plain("train.py", *tiny_flags("run"), cwd=tmp_path)
    checkpoint = tmp_path / "run/checkpoints/000000064"
    assert {p.suffix for p in checkpoint.iterdir()} == {".safetensors", ".json", ".yaml"}
    assert load_file(checkpoint / "ema.safetensors")["conv_in.weight"].shape == (8, 3, 3, 3)
