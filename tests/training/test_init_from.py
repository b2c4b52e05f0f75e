"""train.init_from: the first weights of a run are another model's, as far as they fit."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from gnunet.checkpoint import checkpoint, trained_model
from gnunet.checkpoint.checkpoint import newest_checkpoint, read_state
from gnunet.checkpoint.trained_model import TrainedModel, load_trained_model
from gnunet.config import SamplingConfig
from gnunet.data import Condition
from gnunet.diffusion import DDPM
from gnunet.distributed.accelerator import make_accelerator
from gnunet.errors import CheckpointError, ConfigError
from gnunet.models import UNet2D
from gnunet.training import fit
from gnunet.training.init_from import fit_weights, load_initial_weights
from gnunet.training.session import build_session
from tests.runs import FINAL, LITTLE, SHARDED, assert_same_run, fit_until

SMALL = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
         "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}  # fmt: skip


def initialized(config):
    session = build_session(config, make_accelerator(config))
    return session, load_initial_weights(session)[0]


@pytest.mark.parametrize(("weights", "file"), [("ema", "ema"), ("raw", "model")])
def test_network_and_ema_start_with_the_weights(tiny, finished, weights, file, monkeypatch):
    verified = []
    monkeypatch.setattr(checkpoint, "verify_checkpoint", verified.append)
    source = ["--init_from", str(finished), "--init_weights", weights]
    session, report = initialized(tiny("new", *source, "--seed", "5"))
    assert verified == [finished / FINAL]  # once
    stored = load_file(finished / FINAL / f"{file}.safetensors")
    for network in (session.unet, session.ema.model):
        assert all(torch.equal(value, stored[name]) for name, value in network.state_dict().items())
    name = "run-000000064" + ("-raw" if weights == "raw" else "")
    assert report == {"source": name, "fitted": [], "new": [], "left out": []}


def test_a_run_that_has_begun_ignores_the_source_and_ends_with_the_same_bits(tiny, finished, tmp_path, capsys):
    """Killed before its first checkpoint it starts again; stopped later, it needs the source no more."""
    shutil.copytree(finished, source := tmp_path / "source")
    flags = ["--init_from", str(source), "--seed", "5", "--train.checkpoint_every", "32", *LITTLE]
    fit(tiny("whole", *flags))

    def kill(step):
        if step.images == 16:
            raise KeyError("killed")

    with pytest.raises(KeyError):
        fit(tiny("run", *flags), kill)
    fit_until(32, tiny("run", *flags))
    assert f"initialized from {source} (run-000000064)" in capsys.readouterr().out
    shutil.rmtree(source)
    fit(tiny("run", *flags))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert read_state(newest_checkpoint(tmp_path / "run/checkpoints")).init["source"] == "run-000000064"
    with pytest.raises(ConfigError, match=r"train\.init_from"):  # not silently another start
        fit(tiny("run", "--init_from", str(finished), *flags[2:]))


def sharded(rank):
    os.environ.update(SHARDED["fsdp"])
    if rank == 1:  # sees another checkpoint of a run that is still training
        trained_model.newest_checkpoint = lambda folder: sorted(folder.glob("0*"))[0]


def test_two_processes_start_with_the_same_weights(tiny, run_ranks, finished, tmp_path):
    """A learning rate that changes no bit shows them at the end."""
    flags = ["--seed", "5", "--train.learning_rate", "1e-30", "--train.total_images", "8", *LITTLE]
    run_ranks(2, tiny("run", "--init_from", str(finished), *flags), sharded)
    source = load_trained_model(finished)
    for weights in ("ema", "raw"):
        assert load_trained_model(tmp_path / "run", weights).digest() == source.digest()


def test_what_cannot_start_a_run_is_named_before_anything_is_written(tiny, finished, tmp_path):
    shutil.copytree(finished, damaged := tmp_path / "damaged")
    for file in (damaged / "checkpoints").glob("*/ema.safetensors"):
        file.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"train\.init_from.*damaged"):
        fit(tiny("run", "--init_from", str(damaged)))
    with pytest.raises(ConfigError, match=r"train\.init_from.*down_blocks.*model\.block_out_channels \[8, 16\]"):
        fit(tiny("run", "--init_from", str(finished), "--model.block_out_channels", "[8, 24]"))
    assert not (tmp_path / "run").exists()


def model(class_names=None, null=True, **settings) -> TrainedModel:
    """A network with random weights, also of what starts at zero."""
    count = None if class_names is None else len(class_names) + null
    network = UNet2D(**SMALL, num_class_embeds=count, **settings).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return TrainedModel(
        network, DDPM(), (8, 8), network.config.out_channels, SamplingConfig(), 0, "no", "source", class_names,
        None if class_names is None else [1] * len(class_names),
    )  # fmt: skip


def fitted(source: TrainedModel, class_names=None, condition=None, **settings) -> tuple[UNet2D, list[str]]:
    network = UNet2D(**{**SMALL, **settings}).eval()
    weights, report = fit_weights(source, network, class_names, condition)
    network.load_state_dict(weights, strict=False)
    return network, report


@torch.no_grad()
def output(network: UNet2D, x: torch.Tensor, *labels: int) -> torch.Tensor:
    return network(x, torch.tensor([5] * len(x)), torch.tensor(labels) if labels else None).sample


def test_channels_are_fitted():
    grey = torch.randn(2, 1, 8, 8)
    rgb, condition = grey.expand(-1, 3, -1, -1), torch.randn(2, 4, 8, 8)
    source = model()
    network, report = fitted(source, in_channels=1, out_channels=1)
    torch.testing.assert_close(output(network, grey), output(source.network, rgb).mean(1, keepdim=True))
    assert report == ["grey and RGB"]
    source = model(in_channels=1, out_channels=1)
    torch.testing.assert_close(output(fitted(source)[0], rgb), output(source.network, grey).expand(-1, 3, -1, -1))
    network, _ = fitted(source, in_channels=7)  # both, and a condition
    expected = output(source.network, grey).expand(-1, 3, -1, -1)
    torch.testing.assert_close(output(network, torch.cat([rgb, condition], 1)), expected)
    source = model(in_channels=7)
    torch.testing.assert_close(
        output(fitted(source)[0], rgb), output(source.network, torch.cat([rgb, 0 * condition], 1))
    )
    assert fitted(source, in_channels=7)[1] == []
    mask, classes = Condition("mask", 4), Condition("paired", 4, num_classes=4)
    source.condition = mask
    assert fitted(source, condition=replace(mask, can_drop=True), in_channels=7)[1] == []
    network, report = fitted(source, condition=classes, in_channels=7)
    assert report == ["condition"] and not network.conv_in.weight[:, 3:].any()
    with pytest.raises(ConfigError, match=r"conv_in\.weight"):
        fitted(source, in_channels=2, out_channels=2)


def test_classes_are_fitted_by_name():
    x = torch.randn(3, 3, 8, 8)
    source = model(["cat", "dog"])
    network, report = fitted(source, ["bird", "dog", "cat"], num_class_embeds=4)
    torch.testing.assert_close(output(network, x, 1, 2, 3), output(source.network, x, 1, 0, 2))
    torch.testing.assert_close(output(network, x, 0, 0, 0), output(source.network, x, 2, 2, 2))
    assert "1 are new (bird)" in report[0]
    torch.testing.assert_close(output(fitted(source)[0], x), output(source.network, x, 2, 2, 2))
    source = model(["cat", "dog"], null=False)
    network, _ = fitted(source, ["dog"], num_class_embeds=2)
    torch.testing.assert_close(output(network, x, 0, 0, 0), output(source.network, x, 1, 1, 1))
    source = model()
    network, _ = fitted(source, ["cat"], num_class_embeds=2)
    torch.testing.assert_close(output(network, x, 0, 1, 0), output(source.network, x))
    source = model(["0", "1"], null=False)  # a diffusers folder knows no names
    network, report = fitted(source, ["cat", "dog"], num_class_embeds=3)
    assert report == ["classes by number"]
    torch.testing.assert_close(output(network, x, 0, 1, 1), output(source.network, x, 0, 1, 1))


MP = {"norm": {"kind": "magnitude_preserving"}}


@pytest.mark.parametrize(("theirs", "ours"), [(MP, MP), ({}, MP), (MP, {}), ({"norm": {"kind": "batch"}}, MP)])
def test_weights_are_fitted_to_another_norm(theirs, ours):
    x, names = torch.randn(2, 3, 8, 8), ["cat", "dog"]
    source = model(names, **theirs)
    network, report = fitted(source, names, num_class_embeds=3, **ours)
    assert report == [] and output(network, x, 0, 1).isfinite().all()
    if theirs == ours:
        torch.testing.assert_close(output(network, x, 0, 1), output(source.network, x, 0, 1))
    fitted(source, ["bird"], num_class_embeds=2, **ours)
    fitted(source, **ours)
    fitted(model(**theirs), names, num_class_embeds=3, **ours)
