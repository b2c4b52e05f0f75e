"""`gnunet sample`: which images it writes."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

import gnunet
from gnunet.checkpoint.trained_model import load_trained_model
from gnunet.commands import ablate, conditions, evaluate, sample
from gnunet.commands.evaluate_inputs import open_subject
from gnunet.config import SamplingConfig
from gnunet.data import Condition, FloatLabels
from gnunet.diffusion import make_process
from gnunet.errors import CheckpointError, ConfigError, DataError
from gnunet.training import fit
from tests.runs import SHORT, contents


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


def test_another_start_gives_the_same_images_and_their_labels(finished, run_sample, image, tmp_path):
    whole = gnunet.sample(finished, 10)
    run_sample("out", "--start", "5", "--num_images", "3")
    assert {"samples.json", "grid.png", "000005.png", "000006.png", "000007.png"} == set(contents(tmp_path / "out"))
    assert all(np.array_equal(image("out", i), whole[i]) for i in (5, 6, 7))
    assert open_subject(tmp_path / "out", None, 1, None, {}).num_images == 3
    assert "--start" in run_sample("out", "--start", "6", "--num_images", "9", status=2)  # without image 5
    assert "3 of which were there" in run_sample("out", "--start", "4", "--num_images", "6")
    run_sample("whole", "--num_images", "10")
    record, every = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("out", "whole"))
    assert (record["start"], record["num_images"], record["labels"]) == (4, 6, every["labels"][4:])
    assert all(np.array_equal(image("out", i), whole[i]) for i in range(4, 10))
    [four, first] = (np.asarray(Image.open(tmp_path / name / "grid.png"), int) for name in ("out", "whole"))
    assert four.shape[1] <= first.shape[1]
    tiles = json.loads(Image.open(tmp_path / "out/grid.png").info["tiles"])
    top, left = tiles["corners"][1]
    found = four[top:, left:][: 16 * tiles["scale"] : tiles["scale"], : 16 * tiles["scale"] : tiles["scale"]]
    assert np.array_equal(found, whole[5])


def test_another_resolution(finished, run_sample, image, tmp_path):
    run_sample("wide", "--resolution", "24", "32")
    assert image("wide").shape == (24, 32, 3)
    record = json.loads((tmp_path / "wide/samples.json").read_text())
    assert record["settings"]["resolution"] == [24, 32]
    run_sample("square", "--resolution", "24")
    assert image("square").shape == (24, 24, 3) and gnunet.sample(finished, 1, resolution=[8, 4]).shape == (1, 8, 4, 3)
    run_sample("same", "--resolution", "16")
    run_sample("same")
    for given, nearest in (("25", "24 or 26"), ("24 31", "30 or 32"), ("1", "2"), ("16 16 16", "multiples of 2")):
        printed = run_sample("x", "--resolution", *given.split(), status=2)
        assert f"resolution: given {given}; valid:" in printed and nearest in printed


def test_guide(finished, tiny, run_sample, image, tmp_path, monkeypatch):
    """A checkpoint guides a later one, also where labels were not dropped in training; it must fit."""
    [early] = [path for path in (finished / "checkpoints").iterdir() if path.name != "000000064"]
    flags = ["--classes", "dark", "--guidance_scale"]
    for scale in ("0", "1", "3"):
        guide = [] if scale == "1" else ["--guide", str(early)]
        run_sample(scale, *flags, scale, *guide)
    run_sample("early", "--classes", "dark", source=early)
    assert np.abs(image("0") - image("early")).max() <= 1
    assert not np.array_equal(image("1"), image("0")) and not np.array_equal(image("3"), image("1"))
    settings = json.loads((tmp_path / "3/samples.json").read_text())["settings"]
    assert settings["guide"] == json.loads((tmp_path / "early/samples.json").read_text())["settings"]["checkpoint"]
    assert "guide" in run_sample("3", *flags, "3", "--guide", str(finished / "model"), status=2)  # of another guide
    subject = open_subject(finished, 4, 1, None, {"guide": early, "guidance_scale": 3.0, "guidance_interval": (0, 1)})
    assert {"guide": settings["guide"], "guidance_interval": [0.0, 1.0]}.items() <= subject.metadata.items()
    assert "guidance_scale" in run_sample("x", "--guide", str(early), status=2)
    smaller = ["--model.block_out_channels", "[4, 8]", "--data.label_dropout", "0"]
    run_sample("by_small", *flags, "3", "--guide", str(fit(tiny("small", *smaller, *SHORT))))
    assert not np.array_equal(image("by_small"), image("3"))
    other = fit(tiny("other", "--diffusion.kind", "edm", "--data.class_conditional", "false", *SHORT))
    assert "kind edm, not flow" in run_sample("x", *flags, "3", "--guide", str(other), status=2)
    model = load_trained_model(finished)
    for difference, changes in {
        "shift 2.0, not 1.0": {"process": make_process("flow", shift=2.0)}, "classes None": {"class_names": None},
        "labels": {"float_labels": FloatLabels([0.0, 1.0], True)}, "condition": {"condition": Condition("grey", 1)},
    }.items():  # fmt: skip
        monkeypatch.setattr(conditions, "load_model", lambda path: replace(model, **changes))  # noqa: B023
        with pytest.raises(ConfigError, match=f"guide: .* has {difference}"):
            conditions.load_guide(replace(model, sampling=SamplingConfig(guidance_scale=2.0)), "other")


def test_strip_and_gif(run_sample, image, tmp_path):
    run_sample("plain", "--num_images", "3")
    shutil.copytree(tmp_path / "plain", tmp_path / "out")
    before = contents(tmp_path / "out")
    run_sample("out", "--num_images", "3", "--strip", "3", "--gif")
    written = contents(tmp_path / "out")
    assert before.items() <= written.items() and written.keys() - before == {"denoising.png", "denoising.gif"}
    strip, tile = np.asarray(Image.open(tmp_path / "out/denoising.png"), int), 8 * 16  # enlarged 8 times
    assert strip.shape == (3 * tile + 4, 3 * tile + 4, 3)
    for i in range(3):
        last = strip[i * (tile + 2) :, 2 * (tile + 2) :][:tile:8, :tile:8]
        assert np.array_equal(last, image("plain", i))
    gif, grid = Image.open(tmp_path / "out/denoising.gif"), Image.open(tmp_path / "out/grid.png")
    assert (gif.n_frames, gif.size) == (3, grid.size)
    assert "3 of which were there" in run_sample("out", "--num_images", "3")
    assert open_subject(tmp_path / "out", None, 1, None, {}).num_images == 3
    (tmp_path / "out/samples.json").unlink()
    assert len(contents(tmp_path / "out")) == 6 and "denoising" not in run_sample("out", status=2)


@pytest.mark.parametrize("flags", ["--guidance_scale 3", "--seed 7", "--weights raw", "--sampler heun"])
def test_settings_change_the_images(run_sample, image, flags):
    run_sample("plain", "--classes", "dark")
    run_sample("changed", "--classes", "dark", *flags.split())
    assert not np.array_equal(image("plain"), image("changed"))


@pytest.mark.parametrize(
    ("command", "flags", "hint"),
    [
        *((command, *case) for command in (sample, evaluate) for case in (
            ("--steps=5", "--num_inference_steps"), ("--guidance 2", "--guidance_scale"), ("--device cuda", "--cpu"),
            ("--num-image 3", "--num_images"), ("--resume", "same command"), ("--gpus 2", "accelerate launch"),
            ("--batchsize 3", "--batch_size"), ("--output_dir x", "--out"), ("--zzz", "--help"),
        )),
        (ablate, "--epochs 3", "--train.total_images"), (ablate, "--dryrun", "--dry_run"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.rpartition(".")[2],
)  # fmt: skip
def test_unknown_flag_is_an_error_of_one_line_with_what_does_it_here(command, flags, hint, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["runs/x", *flags.split()])
    [line] = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and line.startswith(f"error: {re.split('[= ]', flags)[0]}: ") and hint in line


@pytest.mark.parametrize("command", [sample, evaluate])
@pytest.mark.parametrize(
    "flags",
    ["--num_images 0", "--num_images -3", "--num_images 1e3", "--num_images ²", "--num_images 9999999999999",
     "--seed -1", "--seed 18446744073709551616", "--guidance_scale nan", "--guidance_scale inf", "--guidance_scale -1",
     "--num_inference_steps 0", "--batch_size x"],
)  # fmt: skip
def test_number_out_of_range_is_refused_with_its_flag(command, flags, capsys):
    flag, value = flags.split()
    with pytest.raises(SystemExit):
        command.main(["runs/x", flag, value])
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{flag}: given {value}; valid:" in line


@pytest.mark.parametrize("command", [sample, evaluate])
@pytest.mark.parametrize("given", ["runs/portaits", "portraits", "run/portraits/model"])
def test_misspelt_source_suggests_its_neighbour(command, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/portraits").mkdir(parents=True)
    assert command.main([given]) == 2
    assert re.search(r"did you mean runs(/portraits)?\?", capsys.readouterr().err)


def test_invalid_arguments_are_named(finished, run_sample, tmp_path):
    assert "'grey'" in (out := run_sample("x", "--classes", "grey", status=2)) and "'dark', 'light'" in out
    assert "heun" in run_sample("x", "--sampler", "nosuch", status=2)
    (tmp_path / "file").touch()
    assert "--out" in run_sample("file/below", status=2)


class TestFolder:
    """Which images a folder may hold, by its samples.json."""

    def test_record_has_settings_classes_and_seed(self, run_sample, finished, tmp_path):
        run_sample("out", "--num_images", "5", "--seed", "3", "--classes", "1", "dark")
        record = json.loads((tmp_path / "out/samples.json").read_text())
        expected = {"sampler": "euler", "steps": 4, "guidance": 1.0, "seed": 3, "classes": ["light", "dark"]}
        assert expected.items() <= record["settings"].items() and record["gnunet"] == gnunet.__version__
        assert record["labels"] == [1, 0, 1, 0, 1] and record["num_images"] == 5 and record["source"] == str(finished)

    def test_more_images_or_a_killed_job_are_finished(self, run_sample, tmp_path):
        run_sample("whole", "--num_images", "10")
        run_sample("part", "--num_images", "6")
        (tmp_path / "part/000001.png").unlink()
        (tmp_path / "part/000002.png").write_bytes((tmp_path / "part/000002.png").read_bytes()[:70])
        kept = (tmp_path / "part/000005.png").stat().st_mtime_ns
        record = json.loads((tmp_path / "part/samples.json").read_text())
        for name in ("start", "guide", "guidance_interval"):  # which an earlier version did not write
            del (record if name in record else record["settings"])[name]
        (tmp_path / "part/samples.json").write_text(json.dumps(record))
        assert "10 images, 4 of which were there" in run_sample("part", "--num_images", "10")
        assert contents(tmp_path / "part") == contents(tmp_path / "whole")
        assert (tmp_path / "part/000005.png").stat().st_mtime_ns == kept

    def test_wide_samples_are_continued(self, run_sample, tiny, tmp_path):
        fit(tiny("run", "--data.resolution", "[16, 24]", "--train.total_images", "8"))
        run_sample("out", source=tmp_path / "run")
        assert "2 of which were there" in run_sample("out", "--num_images", "3", source=tmp_path / "run")
        assert open_subject(tmp_path / "out", None, 1, None, {}).size == (16, 24)

    def test_folder_of_other_samples_or_pictures_is_refused(self, run_sample, finished, tmp_path):
        run_sample("out", "--num_images", "4", "--classes", "light")
        before = contents(tmp_path / "out")
        for flags in ("--seed 1", "--num_inference_steps 3", "--weights raw", "--num_images 3"):
            printed = run_sample("out", "--num_images", "4", "--classes", "light", *flags.split(), status=2)
            assert str(tmp_path / "out") in printed and "--out" in printed
        run_sample("out", status=2)  # drawn classes
        run_sample("out", "--num_images", "4", "--classes", "1")  # the same class
        assert contents(tmp_path / "out") == before
        with FileLock(tmp_path / "out/.lock"):
            assert "in use" in run_sample("out", "--num_images", "4", "--classes", "light", status=2)
        Image.new("RGB", (8, 8)).save(tmp_path / "out/mine.png")
        assert "mine.png" in run_sample("out", "--num_images", "4", "--classes", "light", status=2)
        assert "mine.png" in str(pytest.raises(DataError, open_subject, tmp_path / "out", None, 1, None, {}).value)
        run_sample("begun", "--num_images", "4")
        for file in (tmp_path / "begun").glob("*.png"):
            file.unlink()
        run_sample("begun", "--seed", "1")
        (tmp_path / "below/own").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "below/own/a.jpg")
        assert "a.jpg" in run_sample("below", status=2)

    def test_default_folder_is_fresh_for_other_settings_and_other_runs(self, finished, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        shutil.copytree(finished, "other")
        for arguments in ([finished], [finished, "--seed", "1"], [finished], ["other/model"], [finished / "model"]):
            assert sample.main([*map(str, arguments), "--num_images", "1", "--num_inference_steps", "1"]) == 0
        names = ["other-model", "run-000000064", "run-000000064-2", "run-model"]
        assert sorted(path.name for path in Path("samples").iterdir()) == names

    def test_incomplete_or_foreign_record_is_an_error_of_evaluate(self, run_sample, tmp_path):
        run_sample("out")
        written = (tmp_path / "out/samples.json").read_text()
        (tmp_path / "out/000001.png").unlink()
        for missing in (1, 2):
            with pytest.raises(DataError, match=f"lacks {missing} of the 2"):
                open_subject(tmp_path / "out", None, 1, None, {})
            (tmp_path / "out/000000.png").unlink(missing_ok=True)
        for text in (
            "{",
            "[]",
            "{}",
            '{"num_images": 1e400}',
            written.replace('"num_images": 2,', '"num_images": 99999999,'),
        ):
            (tmp_path / "out/samples.json").write_text(text)
            with pytest.raises(CheckpointError, match=r"samples\.json"):
                open_subject(tmp_path / "out", None, 1, None, {})
            assert "samples.json" in run_sample("out", status=2)

    @pytest.mark.parametrize("number", [1, 2, 4])
    def test_full_disk_is_named_and_the_same_command_finishes(self, run_sample, tmp_path, monkeypatch, number):
        """At the record, an image or the grid."""
        replace, written = os.replace, []

        def full(source, target):
            written.append(target)
            if len(written) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)
        printed = run_sample("out", status=2)
        assert "No space left" in printed and str(tmp_path / "out") in printed and "Traceback" not in printed
        run_sample("out")
        assert {"samples.json", "grid.png", "000000.png", "000001.png"} == set(contents(tmp_path / "out"))
