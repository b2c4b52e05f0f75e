"""Conditional runs from training to sampling."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

import gnunet
from gnunet.checkpoint.trained_model import load_trained_model
from gnunet.commands import sample
from gnunet.commands.conditions import with_conditions
from gnunet.errors import CheckpointError, ConfigError, DataError
from gnunet.training import fit
from tests.conftest import ROOT, flags_in, parse_args
from tests.runs import assert_same_run, fit_until

SHORT = ["--train.total_images", "16", "--train.checkpoint_every", "0", "--train.sample_every", "0"]
LOW = ["--data.condition.kind", "low_resolution", "--data.condition_dropout", "0.2", "--sampling.guidance_scale", "2"]


@pytest.fixture(scope="module")
def low(images, tmp_path_factory):
    """A finished run of super-resolution by 2, with guidance."""
    folder = tmp_path_factory.mktemp("low")
    fit(parse_args(flags_in(folder, images)("run", *LOW), default_config=ROOT / "none.yaml"))
    return folder / "run"


def test_resumes_bit_identically(tiny, low, tmp_path):
    fit_until(24, tiny("stopped", *LOW))
    fit(tiny("stopped", *LOW))
    assert_same_run(tmp_path / "stopped", low)


def test_sample_writes_the_images_of_the_training_grid_beside_their_conditions(low, tmp_path, capsys):
    out = tmp_path / "out"
    assert sample.main([str(low), "--num_images", "6", "--out", str(out)]) == 0
    grid = Image.open(low / "samples/000000064.png")
    assert np.array_equal(np.asarray(Image.open(out / "grid.png")), np.asarray(grid))
    scale, corners = json.loads(grid.info["tiles"]).values()
    model = with_conditions(load_trained_model(low), None)
    originals = model.conditions.images(model.conditions.entries(range(6)))
    held_out = model.conditions.count
    for i, (top, left) in enumerate(corners):
        row = np.asarray(grid)[top : top + 16 * scale : scale]
        assert np.array_equal(row[:, left : left + 16 * scale : scale], np.asarray(Image.open(out / f"{i:06d}.png")))
        assert np.array_equal(row[:, left + 16 * scale : left + 32 * scale : scale], originals[i])
    assert held_out == 4 and json.loads((out / "samples.json").read_text())["settings"]["conditions"]
    assert [int(label) for label in model.labels(range(6))][:2] == [int(label) for label in model.labels([4, 5])]


def test_conditions_are_small_pictures_or_those_that_they_are_made_of(low, images, tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "small").mkdir()
    for name in ("0.png", "1.png", "2.png"):
        shutil.copy(images / "dark" / name, tmp_path / "large" / name)
        Image.open(images / "dark" / name).reduce(2).save(tmp_path / "small" / name)
    large, small = (gnunet.sample(low, 4, conditions=tmp_path / name, classes=["dark"]) for name in ("large", "small"))
    assert np.array_equal(large, small) and not np.array_equal(large[0], large[3])
    assert not np.array_equal(large, gnunet.sample(low, 4, classes=["dark"]))
    # A diffusers folder knows its condition, but no images.
    exported = gnunet.sample(low / "model", 4, conditions=tmp_path / "small", classes=["dark"], guidance_scale=2,
                             num_inference_steps=4, batch_size=4)  # fmt: skip
    assert np.array_equal(exported, small)
    with pytest.raises(ConfigError, match="--conditions"):
        gnunet.sample(low / "model", 4)
    config = json.loads((low / "model/unet/config.json").read_text())
    assert (config["_class_name"], config["in_channels"], config["out_channels"]) == ("UNet2DModel", 6, 3)


def test_other_settings_of_conditions_do_not_mix(low, images, tmp_path, capfd):
    flags = [str(low), "--num_images", "2", "--out", str(tmp_path / "out")]
    assert sample.main([*flags, "--conditions", str(images / "dark")]) == 0
    assert sample.main([*flags, "--conditions", str(images / "light")]) == 2
    assert "conditions" in capfd.readouterr().err
    assert sample.main([*flags, "--conditions", str(images / "dark")]) == 0


@pytest.mark.parametrize("condition", ["null", "{kind: grey}", "{kind: low_resolution, factor: 4}", "{}", "[]"])
def test_an_exported_condition_that_does_not_fit_is_an_error(low, tmp_path, condition):
    model = tmp_path / "model"
    shutil.copytree(low / "model", model)
    metadata = json.loads((model / "gnunet.json").read_text())
    given = yaml.safe_load(condition)
    metadata["condition"] = given and {"condition": given}
    (model / "gnunet.json").write_text(json.dumps(metadata))
    if condition == "{kind: low_resolution, factor: 4}":  # as many channels
        assert load_trained_model(model).condition.factor == 4
        return
    with pytest.raises(CheckpointError, match="condition"):
        load_trained_model(model)


def test_grey_with_statistics_of_batches_and_without_classes(tiny, tmp_path):
    flags = ["--data.condition.kind", "grey", "--diffusion.kind", "ddpm", "--data.class_conditional", "false",
             "--model.norm.kind", "batch", "--train.bn_update_batches", "2"]  # fmt: skip
    fit(tiny("run", *SHORT, *flags))
    grid = np.asarray(Image.open(tmp_path / "run/samples/000000016.png"))
    assert (grid[:, :128] == grid[:, :128, :1]).all() and not (grid == grid[..., :1]).all()
    assert gnunet.sample(tmp_path / "run", 2, num_inference_steps=2).shape == (2, 16, 16, 3)


def test_maps_of_classes_beside_the_images(tiny, tmp_path, images):
    maps = tmp_path / "maps"
    for file in images.rglob("*.png"):
        (maps / file.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(file).convert("L")) // 86).save(maps / file.parent.name / file.name)
    flags = ["--data.condition", f"{{kind: paired, folder: {maps}, num_classes: 3}}", "--data.num_workers", "1"]
    fit(tiny("run", *SHORT, *flags))
    run = tmp_path / "run"
    assert load_trained_model(run / "model").condition.channels == 3
    assert str(maps) not in (run / "model/gnunet.json").read_text()
    assert gnunet.sample(run, 2).shape == (2, 16, 16, 3)
    one = gnunet.sample(run, 2, conditions=maps / "dark", classes=["dark"])
    assert np.array_equal(one, gnunet.sample(run / "model", 2, conditions=maps / "dark", classes=["dark"],
                                             num_inference_steps=4, batch_size=4))  # fmt: skip
    with pytest.raises(DataError, match="map of classes"):
        gnunet.sample(run, 2, conditions=images / "dark")


def picture(path, size=(16, 16), value=0):
    path.parent.mkdir(exist_ok=True)
    Image.new("L", size, value).save(path)


def test_masks_lie_beside_their_images(tiny, tmp_path):
    fit(tiny("run", *SHORT, "--data.condition.kind", "mask", "--diffusion.kind", "edm", "--data.resize", "pad"))
    folder, model = tmp_path / "masked", load_trained_model(tmp_path / "run")
    with pytest.raises(DataError, match="masked"):
        with_conditions(model, folder)
    picture(folder / "a.png", value=90)
    with pytest.raises(DataError, match="a_mask.png"):
        with_conditions(model, folder)
    picture(folder / "a_mask.png", size=(16, 8))
    with pytest.raises(DataError, match=r"a_mask.png.*16 x 8"):
        with_conditions(model, folder)
    picture(folder / "a.png", size=(16, 8))
    assert (with_conditions(model, folder).conditions.store([0])[..., 3] == 255).all()  # what is padded is known
    picture(folder / "a.png", value=90)
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 255
    Image.fromarray(mask).save(folder / "a_mask.png")
    stored = with_conditions(model, folder).conditions.store([0])
    assert (stored[0, :8, :, 3] == 0).all() and (stored[0, 8:, :, 3] == 255).all() and (stored[..., :3] == 90).all()
    picture(folder / "b_mask.png")
    with pytest.raises(DataError, match="b_mask.png"):
        with_conditions(model, folder)


def test_conditions_that_cannot_be_used(finished, low, tmp_path, images):
    with pytest.raises(ConfigError, match="no condition"):
        gnunet.sample(finished, 1, conditions=images)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no picture")
    for name in ("broken", "missing"):
        with pytest.raises(DataError, match=name):
            gnunet.sample(low, 1, conditions=tmp_path / name)
    with pytest.raises(DataError, match="--conditions"):
        with_conditions(replace(load_trained_model(low), fingerprint="another"), None)


def test_inpainting_keeps_known_pixels_and_depends_on_the_image_alone(finished, images, tmp_path, capfd):
    folder = tmp_path / "masked"
    folder.mkdir()
    shutil.copy(images / "dark/0.png", folder / "a.png")
    shutil.copy(images / "light/0.png", folder / "b.png")
    masks = np.zeros((2, 16, 16), np.uint8)
    masks[0, 4:12, :9] = masks[1, :, 3:] = 255
    for name, mask in zip("ab", masks, strict=True):
        Image.fromarray(mask).save(folder / f"{name}_mask.png")
    flags = [str(finished), "--out", str(tmp_path / "out"), "--inpaint", str(folder), "--resample", "2"]
    assert sample.main([*flags, "--num_images", "3"]) == 2  # the jumps of 10 do not fit into 4 steps
    errors = capfd.readouterr().err
    assert "--jump_length" in errors and "num_inference_steps 4" in errors
    flags += ["--jump_length", "3"]
    assert sample.main([*flags, "--num_images", "3"]) == 0
    found = np.stack([np.asarray(Image.open(tmp_path / f"out/{i:06d}.png")) for i in range(3)])
    known = np.stack([np.asarray(Image.open(folder / f"{name}.png")) for name in "aba"])
    kept = (masks == 0)[[0, 1, 0]]
    assert np.array_equal(found[kept], known[kept])
    assert all((found[i] != known[i])[~kept[i]].mean() > 0.5 for i in range(3)) and not np.array_equal(
        found[0], found[2]
    )
    settings = json.loads((tmp_path / "out/samples.json").read_text())["settings"]
    assert (settings["sampler"], settings["jump_length"], settings["resample"]) == ("repaint", 3, 2)
    assert np.array_equal(gnunet.sample(finished, 3, inpaint=folder, resample=2, jump_length=3)[2], found[2])
    stages = gnunet.sample(finished, 3, inpaint=folder, resample=2, jump_length=3, num_estimates=3)
    assert stages.shape == (3, 3, 16, 16, 3) and np.array_equal(stages[:, 2], found)
    assert sample.main([*flags, "--num_images", "3", "--jump_length", "2"]) == 2
    assert sample.main([*flags, "--sampler", "heun"]) == 2
    assert sample.main([str(finished), "--resample", "2"]) == 2
    errors = capfd.readouterr().err
    assert all(word in errors for word in ("jump_length 3 -> 2", "--sampler", "--inpaint"))
