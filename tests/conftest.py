"""A tiny data set and configuration that train in about a second on one core."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

# Where there is no GPU, Triton's kernels run in its interpreter; it looks at this when they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from gnunet.cli import parse  # noqa: E402
from gnunet.config import Config  # noqa: E402

ROOT = Path(__file__).parents[1]

TINY = """
data: {resolution: 16, class_conditional: true, num_workers: 0, validation_images: 4}
model:
  block_out_channels: [8, 16]
  layers_per_block: 1
  down_block_types: [DownBlock2D, AttnDownBlock2D]
  up_block_types: [AttnUpBlock2D, UpBlock2D]
  norm: {groups: 4}
diffusion: {kind: flow}
train:
  images: 64
  batch_size: 8
  learning_rate: 1e-3
  warmup_images: 16
  lr_schedule: cosine
  ema_half_life: 100
  log_every: 16
  validate_every: 32
  sample_every: 32
  checkpoint_every: 24
validation: {num_examples: 16, num_bins: 4}
sampling: {steps: 4, num_images: 6, batch_size: 4}
"""


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 pictures of 16 x 16 in two classes: light and dark noise."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (folder / name).mkdir()
        for i in range(10):
            picture = rng.integers(low, low + 128, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def tiny_flags(images: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of train.py for the tiny run named `name`, with more flags behind."""
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)

    def flags(name: str, *more: str) -> list[str]:
        return [
            "--config", str(file), "--data.source", str(images), "--data.cache_dir", str(tmp_path / "cache"),
            "--run_dir", str(tmp_path / name), *more,
        ]  # fmt: skip

    return flags


@pytest.fixture
def tiny(tiny_flags: Callable[..., list[str]]) -> Callable[..., Config]:
    """The tiny run's configuration, as `tiny(name, "--key", "value", ...)`."""
    return lambda name, *more: parse(tiny_flags(name, *more), default_config=ROOT / "none.yaml")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps process-wide state; each test starts without it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
