"""The benchmark's sides train, and what it counts and refuses is right; nothing here is timed for its own sake."""

import json
import math

import pytest
import torch
from accelerate import Accelerator

import benchmark_training
from common import loops, overhead
from gnunet.checkpoint.jsonl import JsonlLogger
from gnunet.data import TrainingDataset
from gnunet.diffusion import Process
from gnunet.training.ema import EMA

EAGER, ALL = ("gnunet", "diffusers"), loops.SIDES
FLAGS = ("--diffusion.kind", "ddpm", "--data.class_conditional", "false", "--train.total_images", "1e6")


@pytest.fixture
def compiler(monkeypatch):
    """Puts another compiler in inductor's place, which takes minutes on a CPU."""

    def compiler(compile_network):
        monkeypatch.setattr(loops, "compile_network", lambda network, device: compile_network(network))

    return compiler


def traced(network):
    network.compile(backend="eager")


def test_peak_of_a_step():
    def step():
        a = torch.ones(1000, 256)
        b = a + 1
        del a
        b.add_(1)

    assert benchmark_training.peak_bytes(step, torch.device("cpu")) == pytest.approx(2 * 1000 * 256 * 4, rel=0.01)


def test_compares_the_same_architecture(tiny):
    *_, record = benchmark_training.compare(tiny("run", *FLAGS), EAGER, rounds=2, block=1)
    ours, peer = record["gnunet"], record["diffusers"]
    assert ours["status"] == peer["status"] == "right"
    assert ours["parameters"] == peer["parameters"] > 0
    assert 0 < ours["saved_for_backward_mib"] < peer["saved_for_backward_mib"]
    ratio = ours["saved_for_backward_mib"] / peer["saved_for_backward_mib"]
    assert record["saved_for_backward_ratio"] == {"gnunet": {"diffusers": pytest.approx(ratio, rel=1e-3)}}
    assert ours["images_per_second"] > 0 and record["speed_ratio"]["gnunet"]["diffusers"] > 0
    assert "compile_seconds" not in ours


def test_compiled_sides_are_checked_and_compile_before_they_are_timed(tiny, compiler):
    compiler(traced)
    *_, record = benchmark_training.compare(tiny("run", *FLAGS), ALL, rounds=2, block=1)
    assert [record[side]["status"] for side in ALL] == ["right"] * 4  # none compiled anew after the check
    for side in ("gnunet_compiled", "diffusers_compiled"):
        assert record[side]["gradient_error"] < 1e-4 and record[side]["compile_seconds"] > 0
    for key in ("speed_ratio", "speed_ratio_quartiles", "saved_for_backward_ratio", "peak_of_a_step_ratio"):
        assert {ours: set(of) for ours, of in record[key].items()} == {
            "gnunet": {"diffusers", "diffusers_compiled"}, "gnunet_compiled": {"diffusers", "diffusers_compiled"}
        }  # fmt: skip


def test_what_fails_or_has_wrong_gradients_is_not_timed(tiny, compiler):
    def broken(network):
        if isinstance(network, loops.UNet2DModel):
            raise RuntimeError("no compiler\nhere")
        network.conv_in.weight.register_hook(torch.zeros_like)

    compiler(broken)
    *_, record = benchmark_training.compare(tiny("run", *FLAGS), ALL, rounds=2, block=1)
    assert record["diffusers_compiled"]["status"] == "failed: RuntimeError: no compiler"
    assert record["gnunet_compiled"]["status"] == "wrong"
    assert record["gnunet_compiled"]["gradient_error"] == 1
    assert "images_per_second" not in record["gnunet_compiled"]
    assert set(record["speed_ratio"]) == {"gnunet"} and set(record["speed_ratio"]["gnunet"]) == {"diffusers"}


def test_gradient_error():
    large, small, noise = torch.full((4,), 10.0), torch.full((4,), 1e-2), torch.full((4,), 1e-9)
    error = loops.gradient_error
    assert error([large, small, -noise], [large, small, noise]) < 1e-4
    assert error([large, small * 0, noise], [large, small, noise]) == pytest.approx(1)
    assert error([large * 1.25, small, noise], [large, small, noise]) == pytest.approx(0.25)
    assert math.isnan(error([large, small * math.nan, noise], [large, small, noise]))


def test_framework_overhead_is_all_but_the_networks(tiny, tmp_path, monkeypatch):
    """By a clock that nothing but the parts of a step moves on."""
    now = 0.0

    def taking(seconds, owner, name):
        function = getattr(owner, name)

        def run(*arguments, **options):
            nonlocal now
            now += seconds
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, run)

    monkeypatch.setattr(overhead._StepTimer, "_now", lambda self: now)
    monkeypatch.setattr(overhead, "loader_speed", lambda session: 7.0)
    taking(60, Process, "loss_and_objective")
    taking(30, Accelerator, "backward")
    taking(7, torch.optim.AdamW, "step")
    taking(1, TrainingDataset, "__getitems__")
    taking(2, EMA, "update")
    taking(5, JsonlLogger, "write")  # to metrics.jsonl and to timing.jsonl, every other step
    config = tiny("run", "--train.log_every", "16")
    found = overhead.framework_overhead(config, tmp_path, steps=10)
    assert found == {"step_seconds": 100, "overhead_share": 0.08, "loader_examples_per_second": 7}
    assert not list((tmp_path / "framework_overhead" / "checkpoints").iterdir())


def test_record_of_a_run(tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark_training.CASES, "small", tiny_flags("run"))
    arguments = ["--cases", "small", "--batch_sizes", "2", "4", "--sides", *EAGER, "--rounds", "2", "--block", "1"]
    benchmark_training.main([*arguments, "--out", str(tmp_path / "out")])
    (path,) = (tmp_path / "out").iterdir()
    record = json.loads(path.read_text())
    assert path.name.endswith("-training.json") and str(path) in capsys.readouterr().out
    assert record["torch"] == torch.__version__ and record["rounds"] == 2 and record["precision"] == "no"
    assert [(case["case"], case["batch_size"]) for case in record["cases"]] == [("small", 2), ("small", 4)]
    assert all(case["speed_ratio"]["gnunet"]["diffusers"] > 0 for case in record["cases"])
    assert all(0 < case["overhead_share"] < 1 for case in record["cases"])
    assert all(case["loader_examples_per_second"] > 0 for case in record["cases"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "at least 2"),
        (["--batch_sizes", "0"], "train.batch_size"),
        (["--sides", "apex"], "diffusers_compiled"),
    ],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark_training.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("case", ["small", "cifar10"])
def test_the_cases_resolve(case):
    (config,) = benchmark_training.configs_of(case, "no", None)
    assert config.diffusion.kind == "ddpm" and not config.data.class_conditional
    assert [sized.train.batch_size for sized in benchmark_training.configs_of(case, "bf16", [8, 128])] == [8, 128]
