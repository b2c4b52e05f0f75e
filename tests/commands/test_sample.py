"""`gnunet sample`: which images it writes."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gnunet
from gnunet.commands import evaluate, sample


@pytest.fixture
def run_sample(finished, tmp_path, capfd) -> Callable[..., str]:
    """`run_sample(out, *flags, source=RUN, status=0)`: write two images to tmp_path/out; returns what is printed."""

    def run(out: str, *flags: str, source: Path = finished, status: int = 0) -> str:
        found = sample.main([str(source), "--num_images", "2", "--out", str(tmp_path / out), *flags])
        output = "".join(capfd.readouterr())
        assert found == status, output
        return output

    return run


@pytest.fixture
def image(tmp_path) -> Callable[..., np.ndarray]:
    """`image(out, i)`: image i in tmp_path/out."""
    return lambda out, i=0: np.asarray(Image.open(tmp_path / out / f"{i:06d}.png"), int)


def test_images_are_the_training_grids(finished, run_sample, image, tmp_path):
    grid = np.asarray(Image.open(finished / "samples/000000064.png"))
    run_sample("same", "--num_images", "6")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "same/grid.png")), grid)
    assert np.array_equal(gnunet.sample(finished, 6)[5], image("same", 5))
    run_sample("other", "--num_images", "5", "--batch_size", "5", source=finished / "checkpoints/000000064")
    flags = ["--num_images", "5", "--batch_size", "4", "--num_inference_steps", "4"]
    run_sample("model", *flags, source=finished / "model")
    for i in range(5):
        assert np.abs(image("same", i) - image("other", i)).max() <= 1  # 1e-4 in [-1, 1] moves a rounding by at most 1
        assert np.array_equal(image("same", i), image("model", i))


def test_classes_are_names_or_numbers_assigned_in_turn(run_sample, image):
    for out, classes in {"dark": ["dark"], "light": ["light"], "number": ["1"], "turns": ["light", "dark"]}.items():
        run_sample(out, "--classes", *classes)
    assert not np.array_equal(image("dark"), image("light"))
    assert np.array_equal(image("light"), image("number"))
    assert np.array_equal(image("turns", 0), image("light", 0)) and np.array_equal(image("turns", 1), image("dark", 1))


@pytest.mark.parametrize("flags", ["--guidance_scale 3", "--seed 7", "--weights raw", "--sampler heun"])
def test_settings_change_the_images(run_sample, image, flags):
    run_sample("plain", "--classes", "dark")
    run_sample("changed", "--classes", "dark", *flags.split())
    assert not np.array_equal(image("plain"), image("changed"))


@pytest.mark.parametrize("command", [sample, evaluate])
@pytest.mark.parametrize(("old", "new"), [("--steps=5", "--num_inference_steps"), ("--guidance 2", "--guidance_scale")])
def test_former_flag_is_an_error_of_one_line_that_names_the_new_one(command, old, new, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["runs/x", *old.split()])
    [line] = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and re.split("[= ]", old)[0] in line and line.endswith(new)


def test_invalid_arguments_are_named(finished, run_sample, tmp_path):
    assert "'grey'" in (out := run_sample("x", "--classes", "grey", status=2)) and "dark, light" in out
    assert "heun" in run_sample("x", "--sampler", "nosuch", status=2)
    assert "run/none" in run_sample("x", source=finished / "none", status=2)
    (tmp_path / "file").touch()
    assert "--out" in run_sample("file/below", status=2)
