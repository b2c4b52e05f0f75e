"""train.compile computes what eager training computes, for the U-Net of every shipped configuration."""

from pathlib import Path

import pytest
import torch

from gnunet.cli import parse
from gnunet.config import unet_kwargs
from gnunet.data import Purpose, generator
from gnunet.diffusion import make_process
from gnunet.errors import ConfigError
from gnunet.models import UNet2D
from gnunet.training import fit
from gnunet.training.session import compile_network

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def narrow(keys: dict) -> dict:
    """The same kinds of blocks, as few and as narrow as keep its proportions and its groups' sizes."""
    groups = keys["norm_num_groups"]
    factor = max(f for f in (1, 2, 4, 8) if groups % f == 0 and all(c % f == 0 for c in keys["block_out_channels"]))
    head = keys["attention_head_dim"]
    return keys | {
        "block_out_channels": [channels // factor for channels in keys["block_out_channels"]],
        "norm_num_groups": groups // factor,
        "norm": keys["norm"] | {"groups": groups // factor},
        "attention_head_dim": head and max(head // factor, 1),
        "layers_per_block": 1,
        "sample_size": 16,
    }


@pytest.mark.slow
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_compiled_gradients_are_the_eager_ones(file):
    config = parse(["--config", str(file)], default_config=file)
    classes = 3 if config.data.class_conditional else None
    process = make_process(config.diffusion)
    torch.manual_seed(0)
    unet = UNet2D(**narrow(unet_kwargs(config, classes))).train()
    draws = generator(0, Purpose.NOISE, 0)
    shape = (2, config.model.in_channels, 16, 16)
    images, noise = (torch.from_numpy(draws.standard_normal(shape)).float() for _ in range(2))
    level = process.level(torch.tensor([0.3, 0.7], dtype=torch.float64))
    labels = None if classes is None else torch.tensor([0, 1])

    def gradients() -> dict[str, torch.Tensor]:
        unet.zero_grad()
        torch.manual_seed(1)
        process.loss(unet, images, noise, level, labels).sum().backward()
        return {name: p.grad.clone() for name, p in unet.named_parameters()}

    for module in unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its masks are drawn in another order when compiled
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


def test_compiled_bf16_on_a_cpu_is_refused(tiny):
    with pytest.raises(ConfigError, match="train.compile"):
        fit(tiny("run", "--train.mixed_precision", "bf16", "--train.compile", "true"))


@pytest.mark.slow
def test_a_compiled_run_trains_and_its_average_follows(tiny, tmp_path):
    assert fit(tiny("eager")) == 0
    assert fit(tiny("compiled", "--train.compile", "true")) == 0
    last = [
        [float(line.split('"validation_loss": ')[1].split(",")[0])
         for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines() if '"validation_loss"' in line]
        for name in ("eager", "compiled")
    ]  # fmt: skip
    assert last[1] == pytest.approx(last[0], rel=1e-4)
