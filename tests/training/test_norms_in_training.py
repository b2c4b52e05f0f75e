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
from tests.runs import FINAL, LITTLE, SHORT, assert_same_run, contents, fit_until


def norm(kind: str, **keys) -> list[str]:
    return [f"--model.norm.{key}={value}" for key, value in {"kind": kind, **keys}.items()]


@pytest.mark.parametrize(
    "flags",
    [
        [*norm("batch"), "--model.dropout", "0.3"],
        [*norm("batch_renorm"), "--train.bn_update_batches", "3"],
        norm("magnitude_preserving", overrides="{encoder: {kind: switchable}}"),
        norm("scaled_ws", overrides="{encoder: {kind: ghost_batch, ghost_size: 3}}", separate_skip_norm="true"),
    ],
    ids=["batch", "batch_renorm", "switchable", "hybrid"],
)
def test_a_stopped_run_resumes_bit_identically(tiny, tmp_path, flags):
    flags = [*flags, *LITTLE, "--train.total_images", "48"]
    fit(tiny("whole", *flags))
    fit_until(16, tiny("stopped", *flags))
    fit(tiny("stopped", *flags))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_run_of_an_earlier_version_resumes_by_its_defaults(tiny, tmp_path):
    """batch_renorm had no warm-up by default, and norms with running statistics a key noise_bins."""
    flags = [*norm("batch_renorm"), *LITTLE, "--train.total_images", "128"]
    without = "--model.norm.renorm_warmup=0"
    fit(tiny("whole", *flags, without))
    fit_until(16, tiny("stopped", *flags, without))
    file = tmp_path / "stopped" / "config.yaml"
    file.write_text(file.read_text().replace("renorm_warmup: 0\n", "renorm_warmup: 0\n    noise_bins: 1\n"))
    fit(tiny("stopped", *flags))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert "renorm_warmup: 0\n" in file.read_text()
    with pytest.raises(ConfigError, match="model.norm.renorm_warmup: 0 -> 5"):
        fit(tiny("stopped", *flags, "--model.norm.renorm_warmup=5"))


def test_two_processes_share_running_statistics_and_average_them(tiny, run_ranks, tmp_path):
    """Each process has seen other images; both resume from what one of them has written."""
    config, final = tiny("run", *norm("batch"), *LITTLE), tmp_path / "run" / FINAL
    run_ranks(2, config)
    before = contents(final)
    final.rename(tmp_path / "away")
    assert "resuming" in run_ranks(2, config)[0]
    assert contents(final) == before

    ema, model = (load_file(final / f"{name}.safetensors") for name in ("ema", "model"))
    for name in model:
        if "running_var" in name:
            assert not torch.equal(ema[name], model[name])
        if name.endswith("running_mean"):
            assert 0 < (ema[name] - model[name]).norm() < 0.5 * model[name].norm()
        if name.endswith("num_batches_tracked"):
            assert ema[name] == model[name] == 8


@pytest.mark.parametrize("kind", ["batch", "weight_norm", "scaled_ws", "magnitude_preserving", "switchable", "rms"])
def test_the_export_has_the_ema_weights(tiny, tmp_path, kind):
    """Also of norms that UNet2DModel lacks, with their buffers."""
    fit(tiny("run", *norm(kind), *SHORT))
    exported, checkpoint = (load_trained_model(tmp_path / "run" / name) for name in ("model", "checkpoints/000000016"))
    ours, theirs = (dict(model.network.state_dict()) for model in (exported, checkpoint))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    call = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9]), torch.tensor([0, 1])
    assert torch.equal(exported.network(*call)[0], checkpoint.network(*call)[0])


def test_reestimated_statistics_are_those_of_the_ema_weights(tiny, tmp_path):
    config = tiny("run", *norm("batch"), *LITTLE, "--train.bn_update_batches", "3")
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
    fit(tiny("run", *norm("magnitude_preserving"), *SHORT))
    weights = load_file(tmp_path / "run/checkpoints/000000016/model.safetensors")
    filters = weights["down_blocks.0.resnets.0.conv1.weight"]
    magnitudes = filters.square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(magnitudes, torch.ones_like(magnitudes), rtol=1e-5, atol=0)


def test_the_normalization_batch_of_a_run_cannot_change(tiny, tmp_path):
    flags = [*norm("batch"), *SHORT]
    fit(tiny("run", *flags))
    state = json.loads((tmp_path / "run/checkpoints/000000016/state.json").read_text())
    assert state["normalized_by"] == {"micro_batch_size": 8}
    before = contents(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        fit(tiny("run", *flags, "--train.micro_batch_size", "4"))
    assert "micro_batch_size 8" in str(caught.value)
    assert contents(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "run")
    fit(tiny("run", *SHORT))  # group norm does not care
    fit(tiny("run", *SHORT, "--train.micro_batch_size", "4"))
