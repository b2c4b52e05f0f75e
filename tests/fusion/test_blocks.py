"""The blocks' options: each kind of residual block alone, and nn.Sequential."""

import copy
import pickle
from contextlib import suppress

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.nn.utils import weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint_sequential

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
@pytest.mark.parametrize(
    ("training", "images", "embeddings"), [(True, 3, 3), (False, 3, 3), (True, 3, 1), (True, 1, 3)]
)
def test_resnet_block(resnet, run, assert_same, options, training, images, embeddings):
    """With a time embedding for each sample, one for all, or several for one image."""
    block = resnet(**options).train(training)

    def call(block, randn):
        return block(randn(images, 8, 6, 6), randn(embeddings, 6) if block.time_emb_proj else None)

    expected = run(block, call)
    assert gnunet.fuse(block).fused == ["norm1", "norm2"]
    assert_same(run(block, call), expected, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, SCALE_SHIFT], ids=["add", "scale_shift"])
def test_export_of_a_resnet_block_for_any_batch_size(resnet, options):
    block, batch = resnet(**options).eval(), torch.export.Dim.DYNAMIC
    gnunet.fuse(block)
    inputs = torch.randn(2, 8, 6, 6).double(), torch.randn(2, 6).double()
    exported = torch.export.export(block, inputs, dynamic_shapes=({0: batch}, {0: batch})).module()
    more = torch.randn(5, 8, 6, 6).double(), torch.randn(5, 6).double()
    torch.testing.assert_close(exported(*more), block(*more))


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


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 4, 5), (3, 8, 2, 3, 4), (3, 8, 2, 3, 1, 4)])
def test_sequential(randomized, run, assert_same, shape):
    act = nn.SiLU()  # one for all
    model = nn.Sequential(
        nn.GroupNorm(4, 8), act, nn.Dropout(0.3), nn.Sequential(nn.GroupNorm(2, 8, affine=False), act), act
    )
    model = randomized(model.double())
    expected = run(model, lambda model, randn: model(randn(*shape)))
    report = gnunet.fuse(model)
    assert report.fused == ["0", "3.0"]
    assert report.skipped == {}
    assert type(model[4]) is nn.SiLU
    model = pickle.loads(pickle.dumps(model))
    act = model[4]
    assert_same(run(model, lambda model, randn: model(randn(*shape))), expected, rtol=1e-12)
    assert gnunet.unfuse(model) == 2
    assert model[1] is model[3][1] is model[4] is act
    assert {type(module) for module in (model, model[3])} == {nn.Sequential}


def _in_slices(layers, x):
    """The scale and shift of ADM's and LDM's residual blocks."""
    norm, rest = layers[0], layers[1:]
    return rest(norm(x) * 3 + 1)


def _with_taps(layers, x):
    return torch.cat([x := layer(x) for layer in layers.children()])


def _within_other_modules(layers, x):
    return nn.Sequential(layers[0], nn.Tanh(), *layers)(x) + nn.ModuleList(layers)[1](x)


APART = [
    _in_slices,
    _with_taps,
    _within_other_modules,
    lambda layers, x: layers[:1](x),
    lambda layers, x: layers[1](layers[0](x).tanh()),
    lambda layers, x: copy.deepcopy(layers[0])(x),
    lambda layers, x: checkpoint_sequential(layers, 4, x, use_reentrant=False),
    lambda layers, x: layers.append(nn.GroupNorm(2, 8).double()).append(nn.SiLU()).insert(1, nn.Tanh())(x),
    lambda layers, x: (layers.pop(1), layers(x))[1],
    lambda layers, x: (nn.Sequential() + layers)(x),
]


@pytest.mark.parametrize("run_apart", APART)
def test_layers_of_a_sequential_compute_what_they_are(randomized, run_apart):
    class Mine(nn.Sequential):
        pass

    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    for cls in (nn.Sequential, Mine):
        stock = randomized(cls(nn.GroupNorm(4, 8), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(8, 8, 3, padding=1)).double())
        fused = copy.deepcopy(stock)
        assert gnunet.fuse(fused).fused == ["0"]
        torch.testing.assert_close(fused(x), stock(x))
        torch.testing.assert_close(run_apart(fused, x), run_apart(stock, x))


def test_a_norm_in_two_sequentials(randomized):
    norm, x = nn.GroupNorm(2, 4), torch.randn(2, 4, 3, 3)
    model = randomized(nn.ModuleList([nn.Sequential(norm, nn.Tanh()), nn.Sequential(norm, nn.SiLU())]))
    expected = [branch(x) for branch in model]
    assert gnunet.fuse(model).fused == ["1.0"]
    torch.testing.assert_close([branch(x) for branch in model], expected)


class Exp(nn.Module):
    def forward(self, weight):
        return weight.exp()


CHANGES = {
    "norm": lambda model, norm, act: setattr(model, norm, nn.GroupNorm(2, 8).double()),
    "norm, in the dict of modules": lambda model, norm, act: model._modules.update({norm: nn.Identity()}),
    "activation": lambda model, norm, act: setattr(model, act, nn.GELU()),
    "activation by an equal one": lambda model, norm, act: setattr(model, act, nn.SiLU()),
    "norm's hook": lambda model, norm, act: getattr(model, norm).register_forward_hook(lambda m, i, o: 2 * o),
    "activation's hook": lambda model, norm, act: getattr(model, act).register_forward_pre_hook(lambda m, i: i[0] + 1),
    "norm's forward": lambda model, norm, act: setattr(getattr(model, norm), "forward", torch.tanh),
    "activation's forward": lambda model, norm, act: setattr(getattr(model, act), "forward", torch.tanh),
    "parametrization": lambda model, norm, act: register_parametrization(getattr(model, norm), "weight", Exp()),
    "weight normalization": lambda model, norm, act: weight_norm(getattr(model, norm), dim=None),
    "wrapper": lambda model, norm, act: setattr(model, norm, CheckpointWrapper(getattr(model, norm))),
}
MODELS = {
    "sequential": ("0", "1", lambda: nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3))),
    "resnet": ("norm1", "nonlinearity", lambda: ResnetBlock2D(in_channels=8, temb_channels=None, groups=4)),
    "resnet's second": ("norm2", "nonlinearity", lambda: ResnetBlock2D(in_channels=8, temb_channels=None, groups=4)),
    "temporal": ("norm1", "nonlinearity", lambda: CogVideoXResnetBlock3D(8, 8, temb_channels=6, groups=4)),
    "head": ("conv_norm_out", "conv_act", lambda: UNet2DModel(**ONE_LEVEL)),
}
ONE_LEVEL = {
    "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False,
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "in_channels": 8, "out_channels": 8,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", MODELS)
def test_changes_after_fuse(randomized, name, change):
    """Of a norm or an activation; the next call, unfuse and fuse take them as they are."""
    norm, activation, make = MODELS[name]
    arguments = {"temporal": [torch.randn(2, 6).double()], "head": [1], "sequential": []}.get(name, [None])
    x = torch.randn(2, 8, *([3] if name == "temporal" else []), 4, 4, dtype=torch.float64)
    stock = randomized(make().double())
    fused = copy.deepcopy(stock)
    assert gnunet.fuse(fused) > 0
    for model in (fused, stock):
        torch.manual_seed(0)
        change(model, norm, activation)
    expected = stock(x, *arguments)

    def assert_right():
        torch.testing.assert_close(fused(x, *arguments), expected)

    assert_right()
    gnunet.fuse(fused)
    assert_right()
    with suppress(ValueError):  # where the change has to be undone first
        gnunet.unfuse(fused)
    assert_right()


def test_sequential_without_pairs_is_skipped():
    class Tapped(nn.Sequential):
        def forward(self, x):
            return [x := layer(x) for layer in self]

    class Doubled(nn.GroupNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {
            "gelu": nn.Sequential(nn.GroupNorm(2, 4), nn.GELU()),
            "apart": nn.Sequential(nn.GroupNorm(2, 4), nn.Dropout(), nn.SiLU()),
            "last": nn.Sequential(nn.SiLU(), nn.GroupNorm(2, 4)),
            "tapped": Tapped(nn.GroupNorm(2, 4), nn.SiLU()),
            "own forward": nn.Sequential(Doubled(2, 4), nn.SiLU()),
        }
    )
    report = gnunet.fuse(model)
    assert report == 0
    assert report.skipped == {
        "gelu.0": "followed by GELU, not SiLU",
        "apart.0": "followed by Dropout, not SiLU",
        "last.1": "no SiLU is known to follow it in Sequential",
        "tapped.0": "no SiLU is known to follow it in Tapped",
        "own forward.0": "its forward, its SiLU's or its parent's is hooked or replaced",
    }


def test_a_norm_alone_is_skipped():
    report = gnunet.fuse(nn.GroupNorm(2, 4))
    assert report == 0
    assert list(report.skipped) == [""]
