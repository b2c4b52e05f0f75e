"""Training in the latent space of an autoencoder (data.autoencoder): what is encoded, drawn, kept, decoded, refused."""

import json
import pickle
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel, VQModel

import gnunet
from gnunet.checkpoint.trained_model import load_trained_model
from gnunet.data import DecodedImages, TrainingDataset, encode_images
from gnunet.errors import CheckpointError, ConfigError, DataError
from gnunet.models import autoencoder
from gnunet.models.autoencoder import load_autoencoder
from gnunet.training import fit
from tests.runs import assert_same_run, fit_until
from tests.tables import make_table

COMMON = {"block_out_channels": (8, 8), "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",) * 2,
          "up_block_types": ("UpDecoderBlock2D",) * 2, "mid_block_add_attention": False}  # fmt: skip
TINY = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1)}  # fmt: skip


@pytest.fixture
def save(tmp_path):
    """`save(name, class, **config)`: a small autoencoder of random weights, which halves height and width."""

    def write(name: str = "vae", kind: type = AutoencoderKL, **config) -> Path:
        torch.manual_seed(1)
        common = TINY if kind is AutoencoderTiny else COMMON
        own = {"latent_channels": 4, "scaling_factor": 1.0} | ({} if kind is AutoencoderTiny else COMMON)
        kind(**{**common, **own, **config}).save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def latent(tiny, save):
    """The tiny run's configuration on latents, of which a network of two levels sees 8 x 8."""
    folder = save()
    flags = ("--data.autoencoder", str(folder), "--model.in_channels", "4", "--data.flip", "true")
    return lambda name, *more: tiny(name, *flags, *more)


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderTiny, VQModel])
def test_a_network_sees_scaled_latents_and_decodes_them(save, kind):
    config = {"scaling_factor": 2.0} | ({"shift_factor": 0.25} if kind is AutoencoderKL else {})
    autoencoder = load_autoencoder(save(kind=kind, **config))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        found = autoencoder.model.encode(x)
        latents = found.latent_dist.mean if kind is AutoencoderKL else found.latents
        decoded = autoencoder.model.decode(latents).sample
    encoded = torch.from_numpy(autoencoder.encode(images)).permute(0, 3, 1, 2)
    assert encoded.shape == (3, 8 if kind is AutoencoderKL else 4, 8, 12) and autoencoder.reduction == 2
    torch.testing.assert_close(encoded[:, :4], (latents - (0.25 if kind is AutoencoderKL else 0.0)) * 2)
    torch.testing.assert_close(autoencoder.decode(encoded[:, :4]), decoded, rtol=1e-4, atol=1e-4)
    if kind is AutoencoderKL:
        torch.testing.assert_close(encoded[:, 4:], found.latent_dist.std * 2)


def test_examples_draw_from_the_distribution_of_the_image_or_its_mirror_image(tmp_path, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    table, calls = make_table(images), []

    def encode(batch):  # mean: the pixels; standard deviation: 1 / 4
        calls.append(len(batch))
        assert torch.get_num_threads() == 1  # sums depend on it
        return np.concatenate([batch / 64 - 2, np.full(batch.shape, 0.25)], axis=-1).astype(np.float32)

    def latents(flip=True):
        autoencoder = SimpleNamespace(encode=encode, latent_channels=3, digest="a")
        return encode_images(table, autoencoder, flip=flip, cache_dir=str(tmp_path), progress=lambda *done: None)

    assert latents().moments.shape == (6, 2, 4, 4, 6) and latents(flip=False).moments.shape == (6, 1, 4, 4, 6)
    assert latents().std == pytest.approx(np.sqrt((images / 64).var() + 0.25**2), rel=1e-3)
    assert sum(calls) == 18
    with_latents = DecodedImages(**{**table.__dict__, "latents": pickle.loads(pickle.dumps(latents()))})
    data = TrainingDataset(with_latents, np.arange(6), seed=3, flip=True)
    batch, again = data.__getitems__(list(range(600))), data.__getitems__([7, 599])
    assert torch.equal(again["images"], batch["images"][[7, 599]]) and batch["images"].dtype == torch.float32
    rows, flip = data.image_rows(range(600)), data._rng.examples(range(600)).flip
    means = np.stack(
        [images[row, :, ::-1] if mirrored else images[row] for row, mirrored in zip(rows, flip, strict=True)]
    )
    drawn = batch["images"].permute(0, 2, 3, 1).numpy() - (means / 64 - 2)
    assert abs(drawn.std() - 0.25) < 0.01 and abs(drawn.mean()) < 0.01
    assert len(np.unique(drawn[:, 0, 0, 0])) > 500


def test_a_run_of_latents_resumes_moves_and_samples_pictures(latent, tmp_path):
    expected = fit(latent("whole"))
    fit_until(40, latent("run"))
    config = latent("run")
    shutil.rmtree(tmp_path / "vae")
    assert_same_run(fit(config), expected)
    images = gnunet.sample(expected, 5)
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8 and images.std() > 1
    assert gnunet.sample(expected, 2, resolution=[20, 24]).shape == (2, 20, 24, 3)
    np.testing.assert_array_equal(gnunet.sample(expected, 2, num_estimates=3)[:, 2], images[:2])
    with pytest.raises(ConfigError, match="resolution: given 18.*multiples of 4, for instance 16 or 20"):
        gnunet.sample(expected, 2, resolution=18)
    moved = shutil.move(expected, tmp_path / "moved")
    exported = Path(moved) / "model"
    np.testing.assert_array_equal(gnunet.sample(moved, 5), images)
    np.testing.assert_array_equal(gnunet.sample(exported, 5, batch_size=4, num_inference_steps=4)[:, :4], images[:, :4])
    unet, vae = UNet2DModel.from_pretrained(exported / "unet"), AutoencoderKL.from_pretrained(exported / "vae")
    assert unet.config.sample_size == 8 and unet.config.in_channels == vae.config.latent_channels == 4


def test_many_channels_are_sampled_without_bounds(tiny, save):
    """By DDPM, which clips estimates of images."""
    folder = save(latent_channels=16)
    flags = ("--model.in_channels", "16", "--diffusion", "{kind: ddpm}", "--train.total_images", "8")
    run = fit(tiny("run", "--data.autoencoder", str(folder), *flags))
    for source in (run, run / "model"):
        assert np.isinf(load_trained_model(source).process.clip)
        assert gnunet.sample(source, 2, num_inference_steps=2).shape == (2, 16, 16, 3)


def test_another_autoencoder_is_refused(latent, save, tmp_path):
    run = fit(latent("run", "--train.total_images", "8"))
    others = {"scaled": {"scaling_factor": 1.25}, "wide": {"layers_per_block": 2}, "active": {"act_fn": "relu"}}
    for name, config in others.items():
        other = save(name, **config)
        with pytest.raises(ConfigError, match=r"data\.autoencoder: given .*" + name):
            fit(latent("run", "--data.autoencoder", str(other)))
        for place in (run / "autoencoder", run / "model/vae"):
            shutil.rmtree(place)
            shutil.copytree(other, place)
        for source in (run, run / "model"):
            with pytest.raises(CheckpointError, match="another autoencoder"):
                load_trained_model(source)
    shutil.rmtree(run / "model/vae")
    with pytest.raises(CheckpointError, match="vae"):
        load_trained_model(run / "model")


def test_a_run_that_stored_the_digest_without_keys_of_its_autoencoder_goes_on(latent, monkeypatch, tmp_path):
    short = ("--train.total_images", "16", "--train.checkpoint_every", "8")
    with monkeypatch.context() as patch:
        patch.setattr(autoencoder, "WEIGHTLESS", ())
        fit_until(8, latent("run", *short))
        expected = load_trained_model(tmp_path / "run").digest()
    assert load_trained_model(tmp_path / "run").digest() == expected  # so that samples.json still has it
    run = fit(latent("run", *short))
    stored = json.loads((run / "checkpoints/000000016/state.json").read_text())["data"]["autoencoder"]
    exported = load_trained_model(run / "model").autoencoder
    assert stored == exported.digest != load_autoencoder(run / "autoencoder").digest


@pytest.mark.parametrize(
    ("change", "flags", "named"),
    [
        ({}, ["--model.in_channels", "3"], r"model\.in_channels: given 3; valid: 4"),
        ({}, ["--data.resolution", "[16, 18]"], r"data\.resolution: given \[16, 18\]; valid: .* width 16 or 20"),
        ({"scaling_factor": 0.1}, [], r"data\.autoencoder: .*scaling_factor 0\.1.* fits: 0\.8"),
        ({"scaling_factor": 0.0}, [], r"data\.autoencoder: .*scaling_factor 0"),
        ({"in_channels": 4, "out_channels": 4}, [], r"data\.autoencoder: .*in_channels 4"),
        ({}, ["--data.autoencoder", "no/such/folder"], r"data\.autoencoder: no/such/folder.*hub"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(latent, save, tmp_path, change, flags, named):
    save(**change)
    with pytest.raises(ConfigError, match=named):
        fit(latent("run", *flags))
    assert not (tmp_path / "run").exists()


def test_autoencoders_that_are_damaged_or_no_safetensors_are_refused(save, tmp_path):
    config = json.loads((save() / "config.json").read_text())
    for number, changed in enumerate([{"_class_name": "UNet2DModel"}, {"layers_per_block": 10**9},
                                      {"block_out_channels": [2**16] * 2}, {"latent_channels": "4"}]):  # fmt: skip
        folder = shutil.copytree(tmp_path / "vae", tmp_path / str(number))
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(CheckpointError, match=str(folder)):
            load_autoencoder(folder)
    tiny = save("tiny", AutoencoderTiny) / "config.json"
    tiny.write_text(json.dumps(json.loads(tiny.read_text()) | {"upsampling_scaling_factor": 2**20}))
    with pytest.raises(CheckpointError, match="2 times larger"):
        load_autoencoder(tiny.parent)
    weights = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(CheckpointError, match="vae.*safetensors"):
        load_autoencoder(tmp_path / "vae")


def test_latents_that_are_not_finite_are_refused(tmp_path):
    table = make_table(np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match=r"data\.autoencoder.*finite"):
        autoencoder = SimpleNamespace(encode=lambda batch: batch + np.float32(1e6), latent_channels=3, digest="a")
        encode_images(table, autoencoder, flip=False, cache_dir=str(tmp_path), progress=lambda *done: None)
