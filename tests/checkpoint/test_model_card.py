"""The model card of an export: its recipe, run where there is no gnunet, makes the images that gnunet samples."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

import gnunet
from gnunet.checkpoint.checkpoint import TrainState
from gnunet.checkpoint.export import export_model
from gnunet.checkpoint.run_dir import RunDir
from gnunet.commands.conditions import load_model
from gnunet.config import from_yaml, process_kwargs, unet_kwargs
from gnunet.diffusion import make_process
from gnunet.diffusion.sampling import step_generators
from gnunet.models import UNet2D
from gnunet.models.autoencoder import load_autoencoder
from gnunet.random_streams import Stream, StreamKey
from gnunet.training import fit
from tests.runs import read_log

MODEL = {
    "block_out_channels": [8, 16], "layers_per_block": 1, "norm": {"groups": 4},
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
CLASSES = {"class_names": ["a", "b", "c'\n```\n"], "class_counts": [1, 0, 2]}
VECTORS = np.random.default_rng(0).standard_normal((4, 32)).tolist()
DDPM = {"kind": "ddpm", "num_train_timesteps": 12, "beta_schedule": "cosine"}
GUIDED = {"sampling": {"num_inference_steps": 5, "guidance_scale": 2.0}}
RANGE = {"dtype": "float32", "offset": [400.0, 9.0], "scale": [300.0, 2.0], "suffix": ".npy", "file_dtype": "float32"}

# Sections of the configuration, what a checkpoint records of the data, and how gnunet samples what the recipe does.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ddpm, stock": ({"diffusion": DDPM}, {}, {"sampler": "ddpm", "num_inference_steps": 12}),
    "ddpm, grey classes": (
        {"diffusion": {**DDPM, "prediction_type": "v"}, "model": {**MODEL, "in_channels": 1}, **GUIDED},
        CLASSES, {"sampler": "ddim"},
    ),
    "edm, numbers": (
        {"diffusion": {"kind": "edm"}, "model": {**MODEL, "class_embed_type": "timestep"}, **GUIDED},
        {"labels": {"values": [2.0, 3.0, 5.0, 6.0], "can_drop": True}}, {"sampler": "dpm++"},
    ),
    "flow, vectors": (
        {"diffusion": {"kind": "flow", "shift": 2.0}, "model": {**MODEL, "class_embed_type": "identity"}, **GUIDED},
        {"labels": {"values": VECTORS, "can_drop": False}}, {"labels": VECTORS, "guidance_scale": 1.0},
    ),
    "flow, image predicted, arrays": (
        {
            "diffusion": {"kind": "flow", "prediction_type": "sample"}, "model": {**MODEL, "in_channels": 2}, **GUIDED,
            "data": {"normalization": "mean_std"},
        },
        {"scaling": RANGE, **CLASSES}, {},
    ),
    "edm, latents": ({"diffusion": {"kind": "edm"}, "data": {"autoencoder": "vae"}}, {}, {"sampler": "dpm++"}),
}  # fmt: skip


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    """`export(name, sections, data)`: RUN/model of an untrained network with that configuration, in a folder `name`."""

    def make(name: str, sections: dict[str, Any], data: dict[str, Any]) -> Path:
        settings = {"resolution": [16, 24], "class_conditional": bool(data), **sections.get("data", {})}
        values = {"sampling": {"num_inference_steps": 5}, "model": MODEL, **sections, "data": settings}
        run, reduction = tmp_path / name, 1
        if "autoencoder" in settings:
            blocks = {"block_out_channels": [4, 4], "norm_num_groups": 2, "latent_channels": 3, "scaling_factor": 0.7}
            names = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
            AutoencoderKL(**blocks, **names, shift_factor=0.1).save_pretrained(run / "autoencoder")
            data, reduction = {"autoencoder": load_autoencoder(run / "autoencoder").digest}, 2
        config = from_yaml(json.dumps({**values, "run_dir": str(run)}), "test")
        network = UNet2D(**unet_kwargs(config, len(data.get("class_counts", ())), reduction))
        state = TrainState(
            images=8, data={"fingerprint": "f", "num_images": 3, "class_counts": None, "class_names": None, **data}
        )
        export_model(RunDir(config), network, make_process(**process_kwargs(config)), state)
        return run / "model"

    return make


def follow_recipe(folder: Path) -> int:
    """Run the recipe in a folder's card with gnunet's noise, in a process without gnunet, and save its images."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("gnunet", "torchvision")]:
        del sys.modules[name]
    sys.modules |= {"gnunet": None, "torchvision": None}
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_ddpm

    os.chdir(folder)
    recipe = re.search(r"```python\n(.*?)\n```\n", Path("README.md").read_text(), re.DOTALL)[1]
    noise, seeds = torch.from_numpy(np.load("../noise.npy")), np.load("../seeds.npy").tolist()
    randn, randn_tensor = torch.randn, scheduling_ddpm.randn_tensor
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def initial_noise(*shape: object, **options: object) -> torch.Tensor:
        torch.randn = randn
        return noise

    pipeline_ddpm.randn_tensor = torch.randn = initial_noise
    scheduling_ddpm.randn_tensor = lambda shape, **options: randn_tensor(shape, generator=generators)
    exec(recipe, namespace := {})
    np.save("../images.npy", np.stack([np.asarray(image) for image in namespace["images"]]))
    return 0


def sample_both(run_ranks: Callable, model: Path, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """Four images by the recipe in the card, and by gnunet from the same noise."""
    unet = json.loads((model / "unet/config.json").read_text())
    stream, shape = Stream(0, StreamKey.SAMPLE_NOISE), (*unet["sample_size"], unet["out_channels"])
    noise = np.stack([stream.at(i).standard_normal(shape, dtype=np.float32) for i in range(4)])
    np.save(model.parent / "noise.npy", noise.transpose(0, 3, 1, 2))
    np.save(model.parent / "seeds.npy", [each.initial_seed() for each in step_generators(0, range(4))])
    run_ranks(1, partial(follow_recipe, model))
    steps, guidance = settings.pop("num_inference_steps", 5), settings.pop("guidance_scale", 1.0)
    options = {"batch_size": 4, "num_inference_steps": steps, "guidance_scale": guidance, "seed": 0}
    return np.load(model.parent / "images.npy"), gnunet.sample(model, 4, **options, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_needs_no_gnunet_and_makes_its_images(kind, export, run_ranks):
    sections, data, settings = KINDS[kind]
    guidance = {"guidance_scale": 2.0} if "sampling" in sections else {}
    found, expected = sample_both(run_ranks, export("run", sections, data), **{**guidance, **settings})
    found = found[..., None] if found.ndim == 3 else found
    if found.dtype == np.uint8:
        assert np.abs(found.astype(int) - expected).max() <= 1 and (found == expected).mean() > 0.99
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-2)
    assert expected.std() > 0


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"model": {**MODEL, "norm": {"kind": "batch"}}}, "kind 'batch'"),
        ({"data": {"condition": {"kind": "grey"}, "class_conditional": False}}, 'conditions="'),
    ],
)
def test_a_model_that_diffusers_lacks_has_the_recipe_of_gnunet(export, sections, reason):
    card = (export("run", sections, {}) / "README.md").read_text()
    assert reason in card and "gnunet.sample(" in card and "UNet2DModel.from_pretrained" not in card


def test_a_card_has_the_data_the_scores_and_the_newest_pictures(finished):
    model = finished / "model"
    card = ModelCard.load(model / "README.md")
    [validation] = [record for record in read_log(finished, "validation_loss") if record["images"] == 64]
    assert f"| validation_loss | {validation['validation_loss']:.5g} | 64 |" in card.text
    assert "16 images of 16x16" in card.text and "'0 dark', '1 light'" in card.text
    assert card.data.library_name == "diffusers" and {"gnunet", "flow"} <= {*card.data.tags}
    for name, original in (("samples.png", "samples/000000064.png"), ("curves.png", "curves.png")):
        assert (model / name).read_bytes() == (finished / original).read_bytes() and f"({name})" in card.text
    assert str(finished.parent) not in card.content


def test_a_card_is_written_until_it_is_edited(tiny, run):
    card, samples = run / "model/README.md", run / "model/samples.png"
    original = card.read_bytes()
    card.unlink()  # as in a run before there were cards
    fit(tiny("run"))
    assert card.read_bytes() == original
    fit(tiny("run", "--train.total_images", "72"))
    assert card.read_bytes() != original and b"72 images seen" in card.read_bytes()
    mine, picture = card.read_bytes().replace(b"# flow", b"# My flow"), samples.read_bytes()
    card.write_bytes(mine)
    fit(tiny("run", "--train.total_images", "80"))
    assert card.read_bytes() == mine and samples.read_bytes() == picture


def test_a_model_on_the_hub_is_sampled_from_and_starts_a_run(export, monkeypatch, tmp_path):
    model, snapshot = export("run", *KINDS["edm, latents"][:2]), tmp_path / "snapshots/0123"

    def download(name: str, allow_patterns: list[str], **options: object) -> str:
        assert name == "me/faces"
        names = [str(file.relative_to(model)) for file in model.rglob("*") if file.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(model / name, snapshot / name)
        return str(snapshot)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    np.testing.assert_array_equal(*(gnunet.sample(name, 2, num_inference_steps=2) for name in ("me/faces", model)))
    assert load_model("me/faces").name == "me-faces"
    keys = {"data.autoencoder": str(model / "vae"), "run_dir": str(tmp_path / "new")}
    config = gnunet.load_config({"train": {"init_from": "me/faces"}}, overrides=keys)
    assert config.diffusion.kind == "edm" and config.model.block_out_channels == MODEL["block_out_channels"]
