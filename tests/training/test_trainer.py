"""Whole runs in this process: their files, and that a stopped and resumed run is bit-identical."""

import json
import shutil
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

import gnunet
from gnunet.errors import CheckpointError, ConfigError, DataError
from gnunet.norms import NORMS
from gnunet.training import fit
from tests.runs import FINAL, LITTLE, SHORT, assert_same_run, contents, fit_until, read_log


def test_files_of_a_finished_run(finished):
    run = finished
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints", "config.yaml", "curves.png", "data.json", "metrics.jsonl", "model", "samples", "timing.jsonl"
    ]  # fmt: skip
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["000000048", "000000064"]
    assert {p.suffix for p in (run / FINAL).iterdir()} == {".safetensors", ".json", ".yaml"}
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["000000032.png", "000000064.png"]
    assert Image.open(run / "curves.png").getcolors(1000) is not None
    losses = read_log(run, "loss")
    assert [line["images"] for line in losses] == [16, 32, 48, 64]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["nonfinite"] == 0 for line in losses)
    validations = read_log(run, "validation_loss")
    assert [line["images"] for line in validations] == [32, 64]
    assert all(len(line["validation_loss_by_log_snr"]) == 4 for line in validations)
    assert {"images_per_second", "memory_mib"} < json.loads((run / "timing.jsonl").read_text().splitlines()[0]).keys()


def test_running_a_finished_run_again_changes_nothing(tiny, run):
    before = contents(run)
    fit(tiny("run"))
    assert (
        contents(run) | {"config.yaml": before["config.yaml"]} == before
    )  # it names the folder that this is a copy of


@pytest.mark.parametrize("seen", [24, 40, 56])
def test_a_stopped_run_resumes_bit_identically(tiny, finished, tmp_path, seen):
    """At 24 (a step that ends on log, validation, samples), on a checkpoint, and in the last step."""
    fit_until(seen, tiny("stopped"))
    assert (tmp_path / "stopped" / "checkpoints" / f"{seen + 8:09d}").is_dir()
    fit(tiny("stopped"))
    assert_same_run(tmp_path / "stopped", finished)


def test_what_only_training_needs_resumes_and_is_not_exported(tiny, tmp_path):
    flags = [*LITTLE, "--train.loss_weighting", "learned", "--data.augment", "0.5"]
    flags += ["--diffusion.prediction_type", "sample", "--data.label_dropout", "0.2"]
    fit(tiny("whole", *flags))
    fit_until(40, tiny("stopped", *flags))
    fit(tiny("stopped", *flags))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / FINAL / "ema.safetensors")
    exported = UNet2DModel.from_pretrained(tmp_path / "whole/model/unet").state_dict()
    only_training = weights.keys() - exported.keys()
    assert only_training == {"loss_log_variance.weight", "augment_embedding.weight"}
    assert all(weights[name].any() for name in only_training)
    ours, theirs = (
        gnunet.sample(tmp_path / name, 2, batch_size=2, num_inference_steps=4, guidance_scale=2.0, cpu=True)
        for name in ("whole", "whole/model")
    )
    assert (ours == theirs).all()


def test_resume_from_an_older_checkpoint_rewrites_the_same_files(tiny, run, finished):
    (run / FINAL / "ema.safetensors").write_bytes(b"torn")
    fit(tiny("run"))
    assert_same_run(run, finished)


def test_loader_processes_change_nothing(tiny, finished, tmp_path):
    fit(tiny("run", "--data.num_workers", "2"))
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize(
    ("kind", "norm"),
    [*(("flow", norm) for norm in NORMS), ("ddpm", "group"), ("edm", "group"), ("ddpm", "batch"), ("edm", "scaled_ws")],
)
def test_every_process_and_norm_trains_and_learns(tiny, tmp_path, kind, norm):
    flags = ["--diffusion.kind", kind, "--model.norm.kind", norm, *LITTLE, "--train.log_every", "32",
             "--train.checkpoint_every", "0", "--train.sample_every", "0", "--train.validate_every", "0"]  # fmt: skip
    fit(tiny("run", *flags))
    first, second = (line["loss"] for line in read_log(tmp_path / "run", "loss"))
    assert second < first


def test_ema_is_not_the_model_but_near_it(finished):
    model = load_file(finished / FINAL / "model.safetensors")
    ema = load_file(finished / FINAL / "ema.safetensors")
    assert model.keys() == ema.keys()
    distance = sum((model[k] - ema[k]).square().sum() for k in model).sqrt()
    size = sum(v.square().sum() for v in model.values()).sqrt()
    assert 0 < distance < 0.1 * size


def test_another_configuration_is_rejected_naming_the_keys(tiny, run):
    before = contents(run)
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1(.|\n)*train\.weight_decay: 0\.0 -> 0\.1") as caught:
        fit(tiny("run", "--train.weight_decay", "0.1", "--seed", "1", "--train.log_every", "1"))
    assert "log_every" not in str(caught.value)
    assert contents(run) == before


def test_keys_that_do_not_change_the_run_may_change(tiny, tmp_path):
    fit_until(8, tiny("run", *LITTLE))
    fit(tiny("run", *LITTLE, "--train.micro_batch_size", "4", "--data.num_workers", "1"))


@pytest.mark.parametrize("new", ["dark/new.png", "more/0.png"], ids=["image", "class"])
def test_other_images_are_rejected(tiny, tmp_path, images, new):
    shutil.copytree(images, mine := tmp_path / "mine")
    source = ["--data.source", str(mine)]
    fit_until(8, tiny("run", *source))
    (mine / new).parent.mkdir(exist_ok=True)
    Image.new("RGB", (16, 16)).save(mine / new)
    with pytest.raises(DataError, match="not the images"):
        fit(tiny("run", *source))


def test_a_moved_data_folder_resumes(tiny, tmp_path, images, finished):
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(images, before / "train")
    shutil.copytree(images, before / "test")
    fit_until(40, tiny("run", "--data.source", str(before)))
    before.rename(after)
    flags = ["--data.source", str(after / "train"), "--data.split", "training"]
    fit(tiny("run", *flags))
    assert_same_run(tmp_path / "run", finished)
    assert str(after) in (tmp_path / "run/config.yaml").read_text()


def test_what_is_trained_on_is_said_before_training(tiny, tmp_path, images, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(images, mine)
    (mine / "light/0.png").write_bytes(b"no image")
    (mine / "light/1.png").rename(mine / "light/1.heic")
    fit(tiny("run", "--data.source", str(mine), "--data.on_error", "skip"))
    record = json.loads((tmp_path / "run/data.json").read_text())
    classes = record["classes"]
    assert set(classes) == {"dark", "light"} and sum(classes.values()) == record["images"] == 14
    assert (record["held_out"], record["skipped"], record["unread"]) == (4, 1, {".heic": 1})
    out = capsys.readouterr().out
    said = out[: out.index("images 16/64")]
    assert all(what in said for what in ("14 images", "2 classes", "4 held out", "1 corrupted", "1 .heic"))


def test_checkpoints_without_their_configuration_are_rejected(tiny, run):
    (run / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match="no config.yaml"):
        fit(tiny("run"))


def test_a_broken_image_stops_before_training_or_is_skipped(tiny, tmp_path, images):
    shutil.copytree(images, mine := tmp_path / "mine")
    (mine / "dark" / "broken.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(DataError, match="broken.png"):
        fit(tiny("stop", "--data.source", str(mine)))
    assert not (tmp_path / "stop").exists()
    fit(tiny("skip", *SHORT, "--data.source", str(mine), "--data.on_error", "skip"))


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--train.micro_batch_size", "3"], "train.micro_batch_size"),
        (["--train.trackers", "nosuch"], "nosuch"),
        (["--train.trackers", "wandb"], "wandb is not installed"),
        (["--train.mixed_precision", "fp16"], "train.mixed_precision: given fp16 on a CPU"),
    ],
)
def test_unavailable_settings_are_rejected_before_anything_is_written(tiny, tmp_path, flags, key):
    with pytest.raises(ConfigError, match=key):
        fit(tiny("run", *flags))
    assert not (tmp_path / "run").exists()


def test_a_run_dir_below_a_file_is_rejected(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run_dir"):
        fit(tiny("file/run"))


def test_a_missing_export_is_written_again(tiny, run):
    before = (run / "model/unet/diffusion_pytorch_model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    fit(tiny("run"))
    assert (run / "model/unet/diffusion_pytorch_model.safetensors").read_bytes() == before


def sample_without_gnunet(model: str) -> int:
    for name in [name for name in sys.modules if name.split(".")[0] == "gnunet"]:
        del sys.modules[name]
    sys.modules["gnunet"] = None
    pipeline = DiffusionPipeline.from_pretrained(model)
    images = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    print(type(pipeline).__name__, type(pipeline.unet).__name__, images.shape, abs(images).max() < 2)
    return 0


def test_ddpm_exports_a_stock_pipeline_that_needs_no_gnunet(tiny, run_ranks, tmp_path):
    size = ("--data.resolution", "[16, 24]", "--data.resize", "pad")
    fit(tiny("run", "--diffusion.kind", "ddpm", "--data.class_conditional", "false", *size, *SHORT))
    model = str(tmp_path / "run" / "model")
    (said,) = run_ranks(1, partial(sample_without_gnunet, model))
    assert "DDPMPipeline UNet2DModel (2, 16, 24, 3) True" in said
    assert gnunet.sample(tmp_path / "run", 2).shape == gnunet.sample(model, 2).shape == (2, 16, 24, 3)


def test_bf16_trains(tiny, tmp_path):
    fit(tiny("run", "--train.mixed_precision", "bf16", *SHORT))
    weights = load_file(tmp_path / "run/checkpoints/000000016/model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_grids_have_the_images_that_sampling_gives(finished):
    grid = Image.open(finished / "samples" / "000000064.png")
    pixels, tiles = np.asarray(grid), json.loads(grid.info["tiles"])
    scale, side = tiles["scale"], 16 * tiles["scale"]
    assert scale == 8
    found = [pixels[top : top + side : scale, left : left + side : scale] for top, left in tiles["corners"]]
    np.testing.assert_array_equal(found, gnunet.sample(finished, num_images=6))


def test_tensorboard_gets_numbers_and_grids_once_though_the_run_resumes(tiny, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny("run", "--train.trackers", "tensorboard", *LITTLE)
    fit_until(40, config)
    shutil.rmtree(tmp_path / "run/checkpoints/000000048")  # as a crash before it would
    fit(config)
    events = accumulator.EventAccumulator(str(tmp_path / "run/gnunet")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [16, 32, 48, 64]
    assert [event.step for event in events.Images("samples")] == [32, 64]


def test_wandb_continues_its_run_in_the_runs_folder(tiny, tmp_path, monkeypatch):
    """A module in its place, since it needs an account."""
    calls: list = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, *values)), finish=lambda: None)
    module = ModuleType("wandb")
    module.init = lambda **options: calls.append(options) or run
    module.config = SimpleNamespace(update=lambda values, **options: None)
    module.Image = lambda array: array.shape
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])
    config = tiny("run", "--train.trackers", "wandb", *LITTLE)
    fit_until(24, config)
    fit(config)
    first, second = (call for call in calls if isinstance(call, dict))
    assert first == second and first["resume"] == "allow" and first["dir"] == str(tmp_path / "run")
    assert first["id"] == (tmp_path / "run/wandb_id").read_text() and first["name"] == "run"
    assert [call[0] for call in calls if "samples" in call] == [32, 64]
    module.init = lambda **options: 1 / 0
    with pytest.raises(ConfigError, match="train.trackers: given wandb"):
        fit(config)
