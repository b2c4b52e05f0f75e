"""The benchmark's two sides train, and its counts are right; nothing here is timed."""

import importlib.util
from pathlib import Path

import pytest
import torch

from gnunet.training.session import make_accelerator

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_training", ROOT / "scripts/benchmark_training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_saved_bytes_counts_each_storage_once_and_no_parameters(benchmark):
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)

    def step():
        h = layer(x)
        (h.exp() + h.exp()).sum().backward()  # each exp saves its own result: 2 x 128 bytes; linear saves x: 128

    assert benchmark.saved_bytes(layer, step) == 3 * 4 * 8 * 4


def test_peak_of_a_step(benchmark):
    def step():
        a = torch.ones(1000, 256)
        b = a + 1
        del a
        b.add_(1)

    assert benchmark.peak_bytes(step, torch.device("cpu")) == pytest.approx(2 * 1000 * 256 * 4, rel=0.01)


def test_compares_the_same_architecture(benchmark, tiny):
    config = tiny("run", "--diffusion.kind", "ddpm", "--data.class_conditional", "false", "--train.images", "1e6")
    record = benchmark.compare(config, make_accelerator(config), rounds=2, block=1)
    ours, peer = record["gnunet"], record["diffusers"]
    assert ours["parameters"] == peer["parameters"] > 0
    assert 0 < ours["saved_for_backward_mib"] < peer["saved_for_backward_mib"]
    assert record["saved_for_backward_ratio"] == ours["saved_for_backward_mib"] / peer["saved_for_backward_mib"]
    assert ours["images_per_second"] > 0 and record["speed_ratio"] > 0


@pytest.mark.parametrize("case", ["small", "cifar10"])
def test_the_cases_resolve(benchmark, case):
    config = benchmark.parse(
        [*benchmark.CASES[case], *benchmark.COMMON], default_config=ROOT / "configs/noto_portraits32.yaml"
    )
    assert config.diffusion.kind == "ddpm" and not config.data.class_conditional
