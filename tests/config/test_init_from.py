"""train.init_from: which network and process a configuration has that starts from another model."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, UNet2DModel

from gnunet.config import Config, from_yaml, load_config, parse_args, to_yaml, unet_kwargs
from gnunet.config.init_from import read_model_keys
from gnunet.diffusion import make_process
from gnunet.diffusion.factory import load_process
from gnunet.errors import ConfigError
from gnunet.models import UNet2D
from gnunet.models.pretrained import find_model

CIFAR10 = {
    "act_fn": "silu", "attention_head_dim": None, "block_out_channels": [32, 64, 64, 64], "downsample_padding": 0,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "flip_sin_to_cos": False,
    "freq_shift": 1, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-6, "norm_num_groups": 32,
    "sample_size": 32, "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
"""google/ddpm-cifar10-32, narrower."""


@pytest.fixture(scope="session")
def ddpm(tmp_path_factory) -> Path:
    """A folder with that network and its scheduler in one place, as on the hub."""
    folder = tmp_path_factory.mktemp("ddpm")
    UNet2DModel(**CIFAR10).save_pretrained(folder)
    DDPMScheduler(variance_type="fixed_large").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    old = {key: value for key, value in config.items() if key in (*CIFAR10, "_class_name", "in_channels")}
    (folder / "config.json").write_text(json.dumps(old))  # without keys that later versions of diffusers added
    return folder


def started(name: Path | str, *sources, **overrides) -> Config:
    return load_config(*sources, overrides={"train.init_from": str(name), **overrides})


@pytest.mark.parametrize("shipped", ["folder", "noto_portraits32", "imagenet64"])
def test_the_network_and_process_are_those_of_a_diffusers_folder(ddpm, tmp_path, shipped):
    (tmp_path / "unet").symlink_to(ddpm)
    (tmp_path / "scheduler").symlink_to(ddpm)
    for folder in (ddpm, tmp_path):
        config = started(folder, shipped, **{"data.class_conditional": False})
        network = UNet2D(**unet_kwargs(config, None)).eval()
        network.load_state_dict((source := UNet2DModel.from_pretrained(ddpm)).state_dict())
        x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
        with torch.no_grad():
            torch.testing.assert_close(network(x, t).sample, source(x, t).sample, rtol=1e-4, atol=1e-5)
        ours = make_process(**config.diffusion.model_dump())
        assert torch.equal(ours.schedule.betas, DDPMScheduler().betas) and config.data.resolution == 32
    (tmp_path / "vae").mkdir()
    assert "resolution" not in read_model_keys(tmp_path)["data"]  # that of latents


@pytest.mark.parametrize(
    "scheduler",
    [DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", num_train_timesteps=50),
     DDIMScheduler(beta_end=0.03), EDMEulerScheduler(sigma_max=100.0)],
)  # fmt: skip
def test_the_process_has_the_schedulers_levels(ddpm, tmp_path, scheduler):
    shutil.copy(ddpm / "config.json", tmp_path)
    scheduler.save_pretrained(tmp_path)
    ours, theirs = make_process(**started(tmp_path).diffusion.model_dump()), load_process(tmp_path)
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    for name, values in vars(theirs.noise_level(u)).items():
        assert torch.equal(vars(ours.noise_level(u))[name], values)
    assert vars(ours).get("prediction_type") == vars(theirs).get("prediction_type")
    assert vars(ours).get("sigma_max") == vars(theirs).get("sigma_max")


def test_keys_beside_it_and_later_ones_take_precedence_over_the_model_and_it_over_earlier_files(ddpm, tmp_path):
    earlier = {
        "model": {"dropout": 0.3, "norm": {"overrides": {"out": {"kind": "batch"}}}},
        "diffusion": {"kind": "edm"},
    }
    beside = {"train": {"init_from": str(ddpm)}, "model": {"dropout": 0.1}, "diffusion": {"prediction_type": "v"}}
    config = load_config(earlier, beside, overrides={"data.resolution": 64})
    model, diffusion = config.model, config.diffusion
    assert (model.dropout, model.freq_shift, model.norm.overrides, config.data.resolution) == (0.1, 1, {}, 64)
    assert (diffusion.kind, diffusion.prediction_type) == ("ddpm", "v")
    without = load_config(earlier, {"train": {"init_from": str(ddpm)}}, overrides={"train.init_from": None})
    assert (without.diffusion.kind, without.model.dropout) == ("edm", 0.3)
    assert started(ddpm, config).model.dropout == 0.0
    # A resolved configuration has the model's keys already.
    shown = tmp_path / "shown.yaml"
    shown.write_text(to_yaml(config).replace(str(ddpm), "gone"))
    assert load_config(shown, overrides={"seed": 1}).model == config.model
    assert from_yaml(shown.read_text(), "an untrusted run").model == config.model


def test_a_run_gives_its_own_keys_and_one_that_has_begun_needs_no_source(finished, tmp_path):
    shutil.copytree(finished, source := tmp_path / "source")
    run_dir = {"run_dir": str(tmp_path / "run"), "data.source": "elsewhere"}
    for path in (source, source / "checkpoints/000000064"):
        config = started(path, "folder", **run_dir)
        assert (config.model.block_out_channels, config.diffusion.kind) == ([8, 16], "flow")
        assert (config.data.resolution, config.data.class_conditional, config.train.batch_size) == (16, False, 64)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(to_yaml(config := started(source, "folder", **run_dir)))
    shutil.rmtree(source)
    assert started(source, "folder", **run_dir) == config
    with pytest.raises(ConfigError, match="train.init_from: given .*source"):
        started(source, "folder", run_dir=str(tmp_path / "other"))


def test_a_name_on_the_hub(ddpm, monkeypatch):
    def download(name, **options):
        assert name == "google/ddpm-cifar10-32" and options["allow_patterns"]
        return str(ddpm)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert started("google/ddpm-cifar10-32", "folder").model.block_out_channels == [32, 64, 64, 64]

    find_model.cache_clear()

    def fail(name, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match=r"train\.init_from: given google/ddpm-cifar10-32.*no network"):
        started("google/ddpm-cifar10-32")


@pytest.mark.parametrize(
    ("network", "scheduler", "named"),
    [
        ({}, {"beta_schedule": "scaled_linear", "beta_end": 0.05}, "scaled_linear"),
        ({}, {"trained_betas": [2e-5 * i for i in range(1, 1001)]}, "trained_betas"),
        ({}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "rescale_betas_zero_snr"),
        ({}, {"_class_name": "PNDMPipeline"}, "PNDMPipeline"),
        ({"center_input_sample": True}, {}, "center_input_sample"),
        ({"down_block_types": ["SkipDownBlock2D"] * 4}, {}, "model.down_block_types"),
        ({"time_embedding_type": "learned"}, {}, "model.time_embedding_type"),
        ({"block_out_channels": "wide"}, {}, "model.block_out_channels"),
        (None, {}, "holds no model"),
    ],
)
def test_what_the_configuration_cannot_express_is_an_error(ddpm, tmp_path, network, scheduler, named):
    for name, changed in (("config.json", network), ("scheduler_config.json", scheduler)):
        if changed is not None:
            (tmp_path / name).write_text(json.dumps({**json.loads((ddpm / name).read_text()), **changed}))
    with pytest.raises(ConfigError, match=f"{tmp_path.name}.*{named}|{named}.*{tmp_path.name}"):
        started(tmp_path, "folder")


def test_the_flag_needs_no_section(ddpm, tmp_path):
    for flag in ("--init_from", "--init-from", "--train.init_from"):
        config = parse_args([flag, str(ddpm), "--init_weights", "raw"], default_config="folder")
        assert (config.train.init_from, config.train.init_weights) == (str(ddpm), "raw")
        assert config.model.freq_shift == 1
