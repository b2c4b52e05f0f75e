"""The blocks' options: each kind of residual block alone, and nn.Sequential."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import nn

import gnunet

SCALE_SHIFT = {"time_embedding_norm": "scale_shift"}
OPTIONS = {
    "plain": {},
    "scale_shift": SCALE_SHIFT,
    "without_time": {"temb_channels": None},
    "ignored_time_embedding_norm": {"temb_channels": None, "time_embedding_norm": "group"},
    "skip_time_act": {"skip_time_act": True},
    "skip_time_act_scale_shift": {"skip_time_act": True, **SCALE_SHIFT},
    "up": {"up": True},
    "down": {"down": True, **SCALE_SHIFT},
    "up_fir": {"up": True, "kernel": "fir"},
    "down_fir": {"down": True, "kernel": "fir"},
    "up_sde_vp": {"up": True, "kernel": "sde_vp"},
    "down_sde_vp": {"down": True, "kernel": "sde_vp"},
    "dropout": {"dropout": 0.5},
    "output_scale_factor": {"output_scale_factor": 2**0.5},
    "shortcut_of_equal_width": {"out_channels": 8, "use_in_shortcut": True, "conv_shortcut_bias": False},
    "identity_shortcut": {"out_channels": 8},
    "other_groups_and_widths": {"groups": 2, "groups_out": 6, "conv_2d_out_channels": 16, "eps": 1e-2},
    "swish": {"non_linearity": "swish"},
}


@pytest.fixture
def resnet(randomized):
    def resnet(**options):
        torch.manual_seed(0)
        defaults = {"in_channels": 8, "out_channels": 12, "temb_channels": 6, "groups": 4, "non_linearity": "silu"}
        return randomized(ResnetBlock2D(**{**defaults, **options}).double())

    return resnet


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("training", "embeddings"), [(True, 3), (False, 3), (True, 1)])
def test_resnet_block(resnet, run, assert_same, options, training, embeddings):
    """With a time embedding for each sample, or one for all."""
    block = resnet(**options).train(training)

    def call(block, randn):
        return block(randn(3, 8, 6, 6), randn(embeddings, 6) if block.time_emb_proj else None)

    expected = run(block, call)
    assert gnunet.fuse(block).fused == ["norm1", "norm2"]
    assert_same(run(block, call), expected, rtol=1e-12)


def test_scale_and_shift_need_a_time_embedding(resnet):
    block = resnet(temb_channels=None, **SCALE_SHIFT)
    gnunet.fuse(block)
    with pytest.raises(ValueError, match="temb must not be None"):
        block(torch.randn(2, 8, 6, 6, dtype=torch.float64), None)


@pytest.mark.parametrize("temb_channels", [0, 6])
def test_block_whose_silu_also_serves_the_time_embedding(randomized, run, assert_same, temb_channels):
    block = CogVideoXResnetBlock3D(in_channels=8, out_channels=12, temb_channels=temb_channels, groups=4)
    block = randomized(block.double())

    def call(block, randn):
        return block(randn(2, 8, 3, 4, 4), randn(2, 6) if temb_channels else None)[0]

    expected = run(block, call)
    assert gnunet.fuse(block) == 2
    assert_same(run(block, call), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["ada_group", "spatial"])
def test_other_conditioning_is_skipped(kind):
    block = ResnetBlockCondNorm2D(in_channels=32, temb_channels=32, time_embedding_norm=kind, non_linearity="silu")
    report = gnunet.fuse(block)
    assert report == 0
    assert len(report.skipped) == 2
    assert type(block) is ResnetBlockCondNorm2D


@pytest.mark.parametrize("act_fn", ["gelu", "relu", "mish"])
def test_other_activations_are_skipped(resnet, act_fn):
    block = resnet(non_linearity=act_fn)
    report = gnunet.fuse(block)
    name = type(block.nonlinearity).__name__
    assert report == 0
    assert report.skipped == dict.fromkeys(["norm1", "norm2"], f"followed by {name}, not SiLU")
    assert type(block) is ResnetBlock2D


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 4, 5), (3, 8, 2, 3, 4)])
def test_sequential(randomized, run, assert_same, shape):
    act = nn.SiLU()  # one for all, as in diffusers 0.32
    model = nn.Sequential(
        nn.GroupNorm(4, 8), act, nn.Dropout(0.3), nn.Sequential(nn.GroupNorm(2, 8, affine=False), act), act
    )
    model = randomized(model.double())
    expected = run(model, lambda model, randn: model(randn(*shape)))
    report = gnunet.fuse(model)
    assert report.fused == ["0", "3.0"]
    assert report.skipped == {}
    assert type(model[4]) is nn.SiLU
    assert_same(run(model, lambda model, randn: model(randn(*shape))), expected, rtol=1e-12)
    assert gnunet.unfuse(model) == 2
    assert model[1] is model[3][1] is model[4] is act


def test_sequential_without_pairs_is_skipped():
    class Tapped(nn.Sequential):
        def forward(self, x):
            return [x := layer(x) for layer in self]

    norm = nn.GroupNorm(2, 4)
    model = nn.ModuleDict(
        {
            "gelu": nn.Sequential(nn.GroupNorm(2, 4), nn.GELU()),
            "apart": nn.Sequential(nn.GroupNorm(2, 4), nn.Dropout(), nn.SiLU()),
            "last": nn.Sequential(nn.SiLU(), nn.GroupNorm(2, 4)),
            "tapped": Tapped(nn.GroupNorm(2, 4), nn.SiLU()),
            "shared": nn.Sequential(norm, nn.SiLU()),  # reported under its first name
            "sharing": nn.Sequential(norm, nn.Tanh()),
        }
    )
    report = gnunet.fuse(model)
    assert report == 0
    assert report.skipped == {
        "gelu.0": "followed by GELU, not SiLU",
        "apart.0": "followed by Dropout, not SiLU",
        "last.1": "no SiLU is known to follow it in Sequential",
        "tapped.0": "no SiLU is known to follow it in Tapped",
        "shared.0": "shared by several modules",
    }


def test_a_norm_alone_is_skipped():
    report = gnunet.fuse(nn.GroupNorm(2, 4))
    assert report == 0
    assert list(report.skipped) == [""]
