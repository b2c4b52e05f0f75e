"""Configs of diffusers' UNet2DModel, inputs for them, and a comparison of two models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

ATTENTION_EVERYWHERE = {
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
}
BASE = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention_at_several_levels": {
        "block_out_channels": (16, 24, 32),
        "layers_per_block": 2,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    },
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "classes": {"num_class_embeds": 7},
    "class_embed_timestep": {"class_embed_type": "timestep"},
    "class_embed_identity": {"class_embed_type": "identity"},
    "resnet_resampling": {"downsample_type": "resnet", "upsample_type": "resnet", **ATTENTION_EVERYWHERE},
    "conv_resampling_with_attention": ATTENTION_EVERYWHERE,
    "odd_groups_grey": {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (15, 30),
        "norm_num_groups": 5,
        "attention_head_dim": 5,
    },
    "ddpm_cifar10": {  # the traps of google/ddpm-cifar10-32
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    },
    "no_mid_block": {"mid_block_type": None},
    "mid_block_without_attention": {"add_attention": False, "center_input_sample": True},
    "mid_block_norm_and_scale": {"attn_norm_num_groups": 4, "mid_block_scale_factor": 1.4},
    "fourier": {"time_embedding_type": "fourier"},
    "learned_time_embedding": {"time_embedding_type": "learned", "num_train_timesteps": 100},
    "head_dim_that_does_not_divide": {"attention_head_dim": 12, "time_embedding_dim": 40},
}


def _inputs(config: dict[str, Any], batch: int = 3) -> dict[str, torch.Tensor]:
    """Keyword arguments of forward."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, config.get("in_channels", 3), 16, 16, generator=generator)
    timestep = torch.tensor([3, 40, 77])[:batch]
    inputs = {"sample": sample, "timestep": timestep}
    if config.get("time_embedding_type") == "fourier":
        inputs["timestep"] = torch.tensor([0.7, 1.3, 2.6])[:batch]
    if config.get("class_embed_type") == "identity":
        inputs["class_labels"] = torch.randn(batch, 4 * config["block_out_channels"][0], generator=generator)
    elif config.get("class_embed_type") or config.get("num_class_embeds"):
        inputs["class_labels"] = torch.tensor([0, 2, 6])[:batch]
    return inputs


def _run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the input and of every parameter, of a random projection."""
    model.zero_grad()
    sample = inputs["sample"].clone().requires_grad_()
    output = model(**{**inputs, "sample": sample}).sample
    # Scaled so that gradients are of the order of 1 for any number of pixels.
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)) / output.numel() ** 0.5
    output.backward(weights)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "sample": sample.grad, **grads}


@pytest.fixture(scope="session")
def inputs_for() -> Callable[..., dict[str, torch.Tensor]]:
    return _inputs


@pytest.fixture(scope="session")
def run() -> Callable[..., dict[str, torch.Tensor]]:
    return _run


@pytest.fixture(scope="session")
def not_channels_last() -> Callable[[nn.Module], list[str]]:
    """not_channels_last(model): a list that will hold the paths of modules that give an image in another format."""

    def watch(model: nn.Module) -> list[str]:
        found: list[str] = []

        def look(name: str, output: Any) -> None:
            is_image = isinstance(output, torch.Tensor) and output.dim() == 4
            if is_image and not output.is_contiguous(memory_format=torch.channels_last):
                found.append(name)

        for name, module in model.named_modules():
            module.register_forward_hook(lambda module, args, output, name=name: look(name, output))
        return found

    return watch


@pytest.fixture(scope="session")
def small_config() -> dict[str, Any]:
    return BASE


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**BASE, **CONFIGS[request.param]}


@pytest.fixture
def diffusers_model(config: dict[str, Any]) -> UNet2DModel:
    torch.manual_seed(0)
    model = UNet2DModel(**config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # else ones and zeros, which hide mistakes
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model
