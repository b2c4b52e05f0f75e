"""Muon against torch.optim.Muon and AdamW on matrices and vectors by themselves, 8-bit AdamW against AdamW; in runs."""

import copy
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from gnunet.config import TrainConfig
from gnunet.errors import ConfigError
from gnunet.models import UNet2D
from gnunet.training import fit
from gnunet.training.optimizer import make_optimizer
from tests.runs import FINAL, LITTLE, assert_same_run, fit_until

LR = 2e-3
HEAD = "loss_log_variance.weight"
MUON = ["--train.optimizer", "muon"]


@pytest.fixture(params=["group", "magnitude_preserving"])
def unet(request):
    config = dict(block_out_channels=[8, 16], down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2)
    more = dict(norm={"kind": request.param}, num_class_embeds=3, augment_dim=9, learned_weighting=True)
    return UNet2D(sample_size=8, layers_per_block=1, norm_num_groups=4, **config, **more)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_muon_takes_the_weights_inside_and_adamw_the_rest(unet, memory_format):
    unet.to(memory_format=memory_format)
    ours = make_optimizer(unet, TrainConfig(optimizer="muon", learning_rate=LR, weight_decay=0.1))
    ends = ("conv_in.", "conv_out.", "class_embedding.", "augment_embedding.")
    inside = {name for name, p in unet.named_parameters() if p.dim() > 1 and not name.startswith(ends)}
    rows = {name: nn.Parameter(p.detach().flatten(1).clone() if name in inside else p.detach().clone())
            for name, p in unet.named_parameters()}  # fmt: skip
    theirs = [
        torch.optim.Muon([rows[n] for n in rows if n in inside], LR, 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([rows[n] for n in rows if n not in {*inside, HEAD}], LR, weight_decay=0.1),
        torch.optim.AdamW([rows[HEAD]], 0.01, weight_decay=0.0),
    ]
    for _ in range(3):
        for name, parameter in unet.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            rows[name].grad = parameter.grad.flatten(1).clone() if name in inside else parameter.grad.clone()
        for group in ours.param_groups:
            group["lr"] = LR * group["lr_factor"]
        for optimizer in (ours, *theirs):
            optimizer.step()
    for name, parameter in unet.named_parameters():
        # Newton-Schulz iterations are in bfloat16, and columns are in another order.
        atol = 1e-3 if name in inside else 1e-6
        torch.testing.assert_close(parameter.flatten(1) if name in inside else parameter, rows[name], rtol=0, atol=atol)
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_a_run_resumes_to_the_bit(tiny, tmp_path):
    fit(tiny("whole", *LITTLE, *MUON))
    fit_until(40, tiny("stopped", *LITTLE, *MUON))
    fit(tiny("stopped", *LITTLE, *MUON))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    with safe_open(tmp_path / "whole" / FINAL / "optimizer.safetensors", "pt") as state:
        names = set(state.keys())
    assert "mid_block.resnets.0.conv1.weight/momentum_buffer" in names and "conv_in.weight/exp_avg" in names
    assert not {name for name in names if name.endswith("conv1.weight/exp_avg")}


def test_two_processes_are_like_one(tiny, run_ranks, tmp_path):
    fit_until(8, tiny("start", *LITTLE, *MUON, "--train.learning_rate", "1e-9"))
    fit(tiny("one", *LITTLE, *MUON))
    run_ranks(2, tiny("two", *LITTLE, *MUON))
    files = ("start/checkpoints/000000016", f"one/{FINAL}", f"two/{FINAL}")
    start, one, two = (load_file(tmp_path / file / "model.safetensors") for file in files)
    apart, moved = (sum((a[name] - one[name]).square().sum() for name in one) for a in (two, start))
    assert apart < 1e-3 * moved


@pytest.mark.parametrize("name", ["muon", "adamw8bit"])
def test_gradients_that_are_not_finite_are_skipped_by_a_gradient_scaler(unet, name):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    optimizer, scaler = make_optimizer(unet, TrainConfig(optimizer=name)), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [parameter.detach().clone() for parameter in unet.parameters()]
    scaler.scale(sum(parameter.sum() for parameter in unet.parameters())).backward()
    unet.conv_in.weight.grad[0] = torch.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(map(torch.equal, before, unet.parameters()))


EIGHT = ["--train.optimizer", "adamw8bit"]


def test_eight_bits_follow_adamw(unet):
    pytest.importorskip("bitsandbytes")
    unet.to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(unet)
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1}
    eight, whole = (make_optimizer(each, TrainConfig(optimizer=name, **settings))
                    for each, name in ((unet, "adamw8bit"), (theirs, "adamw")))  # fmt: skip
    for _ in range(3):
        for p, q in zip(unet.parameters(), theirs.parameters(), strict=True):
            p.grad, q.grad = (g := torch.randn_like(p)), g.clone()
        eight.step()
        whole.step()
    for p, q in zip(unet.parameters(), theirs.parameters(), strict=True):
        assert p.stride() == q.stride() and p.grad is not None
        # Weights of less than 4,096 numbers keep their state in 32 bits.
        assert (p - q).abs().mean() < (1e-3 if p.numel() >= 4096 else 1e-7)
    assert {entry["state1"].dtype for entry in eight.state.values()} == {torch.uint8, torch.float32}


def test_eight_bits_resume_to_the_bit(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = [*LITTLE, *EIGHT, "--model.block_out_channels", "[8, 32]"]
    fit(tiny("whole", *wide))
    fit_until(40, tiny("stopped", *wide))
    fit(tiny("stopped", *wide))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    with safe_open(tmp_path / "whole" / FINAL / "optimizer.safetensors", "pt") as state:
        assert state.get_tensor("mid_block.resnets.0.conv1.weight/state1").dtype == torch.uint8


def test_eight_bits_name_what_is_to_be_installed(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"train.optimizer: given adamw8bit.*pip install 'gnunet\[optimizers\]'"):
        fit(tiny("run", *EIGHT))
    assert not (tmp_path / "run").exists()
