"""The configurations that are shipped: each resolves, switches kinds and builds its model.

Those for CPUs are launched in training/test_signals.py.
"""

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from gnunet.config import Config, from_yaml, parse_args, to_yaml, unet_kwargs
from gnunet.models import UNet2D

FOLDER = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(FOLDER.glob("*.yaml"))
LAUNCHERS = sorted((FOLDER / "accelerate").glob("*.yaml"))
DEFAULT = FOLDER / "noto_portraits32.yaml"


def load(path: Path, *flags: str) -> Config:
    return parse_args(["--config", str(path), *flags], default_config=DEFAULT)


def parameters(config: Config, num_classes: int | None) -> int:
    with torch.device("meta"):
        model = UNet2D(**unet_kwargs(config, num_classes))
    return sum(parameter.numel() for parameter in model.parameters())


def test_what_is_shipped() -> None:
    names = {path.stem for path in SHIPPED}
    assert names >= {"noto_portraits32", "noto_emoji64", "fashion_mnist", "cifar10", "imagenet64", "folder"}
    assert {path.stem for path in LAUNCHERS} >= {"cpu", "gpu", "ddp", "fsdp2", "zero2"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_config_resolves_and_survives_printing(path: Path) -> None:
    config = load(path)
    assert from_yaml(to_yaml(config), "printed") == config
    assert config.run_dir.startswith("runs/") and config.run_dir != Config().run_dir
    assert parameters(config, 10 if config.data.class_conditional else None) > 0


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_kind_works_on_every_config(path: Path) -> None:
    for kind in ("ddpm", "edm", "flow"):
        assert load(path, "--diffusion.kind", kind).diffusion.kind == kind
    for kind in ("group", "layer", "none", "batch", "evonorm_s0", "scaled_ws", "magnitude_preserving"):
        config = load(path, "--model.norm.kind", kind)
        assert config.model.norm.kind == kind
        assert parameters(config, None) > 0
    per_group = load(path, "--model.norm.channels_per_group", "8")
    assert per_group.model.norm.groups is None


@pytest.mark.parametrize("path", [*SHIPPED, *LAUNCHERS], ids=lambda path: path.stem)
def test_a_config_says_what_it_is_for(path: Path) -> None:
    comment = [line for line in path.read_text().splitlines()[:5] if line.startswith("#")]
    assert 2 <= len(comment) <= 5
    command = next(line for line in comment if "train.py" in line)
    assert path == DEFAULT or path.name in command or path.stem == "folder"


def test_no_config_is_the_portraits() -> None:
    config = parse_args([], default_config=DEFAULT)
    assert config == load(DEFAULT)
    assert config.data.source == "noto_emoji" and config.data.resolution == 32


def test_cifar10_is_the_network_of_the_paper() -> None:
    assert parameters(load(FOLDER / "cifar10.yaml"), None) == 35_746_307


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_the_launchers(path: Path) -> None:
    launcher = load_config_from_file(str(path))
    assert launcher.use_cpu == (path.stem == "cpu")
    assert launcher.num_processes == {"ddp": 8, "fsdp2": 8, "zero2": 8}.get(path.stem, 1)
