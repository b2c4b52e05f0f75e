"""train.compile computes what eager training computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gnunet.config import Config, parse_args, unet_kwargs
from gnunet.diffusion import make_process
from gnunet.distributed.accelerator import make_accelerator
from gnunet.errors import ConfigError
from gnunet.models import UNet2D
from gnunet.random_streams import StreamKey, generator
from gnunet.training import fit
from gnunet.training.session import build_session, compile_network
from tests.runs import ROOT, read_log

CIFAR10, IMAGENET64 = (ROOT / "configs" / f"{name}.yaml" for name in ("cifar10", "imagenet64"))
"""Configurations that together have each way to resample, to pad and to take the time embedding."""


def tiny_network(file: Path) -> tuple[Config, dict]:
    """A configuration, and the keys of a network with one block of each of its kinds, of the size of the tiny run's.

    One size for all, since inductor then finds most of its kernels compiled.
    """
    config = parse_args(["--config", str(file)], default_config=file)
    keys = unet_kwargs(config, 3 if config.data.class_conditional else None)
    return config, keys | {
        "down_block_types": list(dict.fromkeys(keys["down_block_types"])),
        "up_block_types": list(dict.fromkeys(keys["up_block_types"])),
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "norm": keys["norm"] | {"groups": 4},
        "attention_head_dim": keys["attention_head_dim"] and 8,
        "sample_size": 16,
        "dropout": 0.0,  # its masks are drawn in another order when compiled
    }


def network(file: Path) -> tuple[UNet2D, Callable[[], dict[str, torch.Tensor]]]:
    """The tiny network, and what finds its gradients on a fixed batch."""
    config, keys = tiny_network(file)
    process = make_process(**config.diffusion.model_dump())
    torch.manual_seed(0)
    unet = UNet2D(**keys).train()
    draws = generator(0, StreamKey.NOISE, 0)
    shape = (8, config.model.in_channels, 16, 16)
    images, noise = (torch.from_numpy(draws.standard_normal(shape)).float() for _ in range(2))
    level = process.noise_level(torch.linspace(0.1, 0.9, 8, dtype=torch.float64))
    labels = torch.arange(8) % 3 if config.data.class_conditional else None

    def gradients() -> dict[str, torch.Tensor]:
        unet.zero_grad()
        process.loss_and_objective(unet, images, noise, level, labels)[0].sum().backward()
        return {name: p.grad.clone() for name, p in unet.named_parameters()}

    return unet, gradients


@pytest.mark.slow
def test_compiled_gradients_are_the_eager_ones():
    unet, gradients = network(CIFAR10)
    eager = gradients()
    torch.compiler.reset()
    compile_network(unet, torch.device("cpu"))
    compiled = gradients()
    noise_floor = 1e-6 * max(gradient.abs().max() for gradient in eager.values())
    for name, gradient in eager.items():
        size = gradient.abs().max()
        assert (compiled[name] - gradient).abs().max() <= 1e-4 * size + noise_floor, name
        # A key's bias moves all of a query's logits alike, so its gradient is zero but for rounding.
        assert size > noise_floor or name.endswith("to_k.bias"), name


@pytest.mark.slow
def test_compiled_gradients_in_bfloat16_are_as_near_as_eager_ones():
    unet, gradients = network(IMAGENET64)
    exact = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        eager = gradients()
        torch.compiler.reset()
        compile_network(unet, torch.device("cpu"))
        compiled = gradients()
    size = max(gradient.norm() for gradient in exact.values())
    for name, gradient in exact.items():
        error = (eager[name] - gradient).norm()
        assert (compiled[name] - gradient).norm() <= 2 * error + 0.01 * gradient.norm() + 1e-4 * size, name


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ("true", {}),
        ("default", {}),
        ("reduce-overhead", {"triton.cudagraphs": True}),
        ("max-autotune", {"max_autotune": True, "triton.cudagraphs": True, "coordinate_descent_tuning": True}),
        ("max-autotune-no-cudagraphs", {"max_autotune": True, "coordinate_descent_tuning": True}),
    ],
)
def test_modes_are_inductors(tiny, monkeypatch, value, options):
    compiled = []
    monkeypatch.setattr(UNet2D, "compile", lambda self, options: compiled.append(options))
    config = tiny("run", "--train.compile", value)
    build_session(config, make_accelerator(config))
    compile_network(UNet2D.__new__(UNet2D), torch.device("cuda"), "default" if value == "true" else value)
    assert compiled == [{**options, "layout_optimization": False}, options or None]


def test_an_unknown_mode_is_refused(tiny):
    with pytest.raises(ConfigError, match="train.compile: given fast"):
        tiny("run", "--train.compile", "fast")


@pytest.mark.slow
def test_a_compiled_run_trains_and_its_average_follows(tiny, tmp_path):
    """By a mode for GPUs, which does no harm on a CPU."""
    fit(tiny("eager"))
    fit(tiny("compiled", "--train.compile", "max-autotune"))
    eager, compiled = (
        [line["validation_loss"] for line in read_log(tmp_path / name, "validation_loss")]
        for name in ("eager", "compiled")
    )
    assert compiled == pytest.approx(eager, rel=1e-4)
