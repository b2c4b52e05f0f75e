"""Norms that keep statistics, depend on the batch or govern weights, through training, average, resume and export."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from gnunet.checkpoint.trained_model import load_trained_model
from gnunet.distributed.accelerator import make_accelerator
from gnunet.errors import ConfigError
from gnunet.norms import update_bn_stats
from gnunet.training import fit
from gnunet.training.session import build_session

FINAL = "checkpoints/000000064"
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def norm(kind: str, **keys) -> list[str]:
    return [f"--model.norm.{key}={value}" for key, value in {"kind": kind, **keys}.items()]


def same_run(one, other) -> bool:
    names = [*(f"{FINAL}/{name}" for name in FILES), "metrics.jsonl", "samples/000000064.png"]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def statistics(path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(path).items() if "running_" in name}


@pytest.mark.parametrize(
    "flags",
    [
        norm("batch", noise_bins=2),
        [*norm("batch"), "--train.bn_update_batches", "3"],
        norm("batch_renorm", renorm_warmup=4),
        norm("switchable"),
        norm("magnitude_preserving"),
        norm("scaled_ws", overrides="{encoder: {kind: ghost_batch, ghost_size: 3}}", separate_skip_norm="true"),
    ],
    ids=["noise_bins", "precise", "batch_renorm", "switchable", "magnitude_preserving", "hybrid"],
)
def test_a_stopped_run_resumes_bit_identically(tiny, tmp_path, fit_until, flags):
    fit(tiny("whole", *flags))
    fit_until(40, tiny("stopped", *flags))
    fit(tiny("stopped", *flags))
    assert same_run(tmp_path / "whole", tmp_path / "stopped")


def test_the_average_of_two_processes_has_running_statistics(tiny, run_ranks, tmp_path):
    run_ranks(2, tiny("run", *norm("batch")))
    ema, model = (load_file(tmp_path / "run" / FINAL / f"{name}.safetensors") for name in ("ema", "model"))
    for name in model:
        if name.endswith("running_mean"):
            assert 0 < (ema[name] - model[name]).norm() < 0.5 * model[name].norm()
        if name.endswith("num_batches_tracked"):
            assert ema[name] == model[name] == 8


@pytest.mark.parametrize("kind", ["batch", "weight_norm", "scaled_ws", "magnitude_preserving", "switchable", "rms"])
def test_the_export_has_the_ema_weights(tiny, tmp_path, kind):
    """Also of norms that UNet2DModel lacks, with their buffers."""
    fit(tiny("run", *norm(kind)))
    exported, checkpoint = (load_trained_model(tmp_path / "run" / name) for name in ("model", FINAL))
    ours, theirs = (dict(model.network.state_dict()) for model in (exported, checkpoint))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    call = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9]), torch.tensor([0, 1])
    assert torch.equal(exported.network(*call)[0], checkpoint.network(*call)[0])


def test_statistics_are_averaged_with_the_weights(tiny, tmp_path):
    fit(tiny("run", *norm("batch")))
    raw, ema = (statistics(tmp_path / "run" / FINAL / name) for name in ("model.safetensors", "ema.safetensors"))
    assert raw and all(not torch.equal(raw[name], ema[name]) for name in raw)


def test_reestimated_statistics_are_those_of_the_ema_weights(tiny, tmp_path):
    config = tiny("run", *norm("batch"), "--train.bn_update_batches", "3")
    fit(config)
    model = load_trained_model(tmp_path / "run" / FINAL).network
    written = {name: value.clone() for name, value in model.named_buffers() if "running_" in name}
    session = build_session(config, make_accelerator(config))
    calls = []
    for i in range(3):
        batch = session.train_set.__getitems__(list(range(8 * i, 8 * i + 8)))
        level = session.process.noise_level(batch["u"])
        images = batch["images"].float() / 127.5 - 1
        x = session.process.add_noise(images, batch["noise"], level)
        calls.append((session.process.network_input(x, level), level.timestep, batch["labels"]))
    assert update_bn_stats(model, calls) == 3
    for name, value in model.named_buffers():
        if "running_" in name:
            torch.testing.assert_close(written[name], value, rtol=1e-4, atol=1e-5)


def test_forced_weights_have_magnitude_one(tiny, tmp_path):
    fit(tiny("run", *norm("magnitude_preserving")))
    weights = load_file(tmp_path / "run" / FINAL / "model.safetensors")
    filters = weights["down_blocks.0.resnets.0.conv1.weight"]
    magnitudes = filters.square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(magnitudes, torch.ones_like(magnitudes), rtol=1e-5, atol=0)


def test_the_normalization_batch_of_a_run_cannot_change(tiny, tmp_path):
    flags = norm("batch")
    fit(tiny("run", *flags))
    state = json.loads((tmp_path / "run" / FINAL / "state.json").read_text())
    assert state["normalized_by"] == {"micro_batch_size": 8}
    before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    with pytest.raises(ConfigError) as caught:
        fit(tiny("run", *flags, "--train.micro_batch_size", "4"))
    assert "batch" in str(caught.value) and "micro_batch_size 8" in str(caught.value)
    assert {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()} == before
    shutil.rmtree(tmp_path / "run")
    fit(tiny("run"))  # group norm does not care
    fit(tiny("run", "--train.micro_batch_size", "4"))
