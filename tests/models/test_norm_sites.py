"""Norm configs by region, separate norms of skip connections, and the input_std of norms without statistics."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from gnunet.config import load_config, process_kwargs, unet_kwargs
from gnunet.data import load_images
from gnunet.diffusion import make_process
from gnunet.models import UNet2D, check_config, norm_sites

COMMON = Path(__file__).parents[2] / "configs" / "ablations" / "common"


@pytest.fixture(scope="module")
def portraits(tmp_path_factory):
    """64 embedded images, (64, 3, 16, 16) in -1..1."""
    table = load_images("noto_emoji", resolution=16, channels=3, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return table.to_network(torch.from_numpy(table.images[:64].copy()).permute(0, 3, 1, 2))


def kinds_of(model):
    return {name: type(layer).__name__ for name, layer in model.norm_layers().items()}


def starting_with(kinds, *prefixes):
    return {kind for name, kind in kinds.items() if name.startswith(prefixes)}


def test_regions(small_config):
    overrides = {
        "encoder": {"kind": "batch"},
        "middle": {"kind": "frn"},
        "decoder": {"kind": "none"},
        "out": {"kind": "rms"},
    }
    kinds = kinds_of(UNet2D(**small_config, norm={"overrides": overrides}))
    assert starting_with(kinds, "down_blocks") == {"BatchNorm"}
    assert starting_with(kinds, "mid_block") == {"FRN"}
    assert starting_with(kinds, "up_blocks") == {"NoNorm"}
    assert starting_with(kinds, "conv_norm_out") == {"RMSNorm"}


def test_attention_overrides_parts_of_the_network_which_override_resolutions(small_config):
    overrides = {"attention": {"kind": "dyt"}, "decoder": {"kind": "none"}, "8": {"kind": "batch"}}
    kinds = kinds_of(UNet2D(**small_config, norm={"overrides": overrides}))
    assert {kind for name, kind in kinds.items() if "attentions" in name} == {"DyT"}
    others = {name: kind for name, kind in kinds.items() if "attentions" not in name}
    assert starting_with(others, "down_blocks.0", "conv_norm_out") == {"GroupNorm"}
    assert starting_with(others, "down_blocks.1", "mid_block") == {"BatchNorm"}
    assert starting_with(others, "up_blocks") == {"NoNorm"}


def test_a_change_of_resolution_belongs_to_its_block():
    config = {
        "sample_size": [16, 32],  # as a config file has it: height and width
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "norm_num_groups": 8,
        "downsample_type": "resnet",
        "norm": {"overrides": {"16": {"kind": "weight_norm"}}},
    }
    model = UNet2D(**config)
    assert starting_with(kinds_of(model), "down_blocks.0.downsamplers", "up_blocks.1") == {"WeightNorm"}
    assert type(model.down_blocks[0].downsamplers[0].conv1).__name__ == "WeightNormConv"
    assert type(model.up_blocks[0].upsamplers[0].conv) is nn.Conv2d


def test_overrides_merge_over_the_rest(small_config):
    norm = {"channels_per_group": 4, "eps": 1e-3, "overrides": {"middle": {"groups": 2}, "attention": {"eps": 1e-4}}}
    model = UNet2D(**small_config, norm=norm)
    found = {name: (m.num_groups, m.eps) for name, m in model.named_modules() if hasattr(m, "num_groups")}
    assert found["down_blocks.0.resnets.0.norm1"] == (4, 1e-3)
    assert found["mid_block.resnets.0.norm1"] == (2, 1e-3)
    assert found["mid_block.attentions.0.group_norm"] == (2, 1e-4)
    own = UNet2D(**small_config, norm=norm, attn_norm_num_groups=16)
    assert own.mid_block.attentions[0].group_norm.num_groups == 16


def test_attention_without_norm_has_its_blocks_residual(small_config):
    norm = {"kind": "scaled_ws", "residual_scale": 0.5}
    model = UNet2D(**small_config, norm=norm, resnet_time_scale_shift="scale_shift")
    assert model.mid_block.attentions[0].group_norm is None
    assert model.mid_block.attentions[0].residual.scale == 0.5


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        ({"overrides": {"encode": {}}}, ["'encode'", "'encoder', 'attention', 'middle', 'decoder', 'out', '16', '8'"]),
        ({"overrides": {"4": {}}}, ["'4'", "'16', '8'"]),
        ({"overrides": ["encoder"]}, ["norm.overrides", "['encoder']"]),
        ({"overrides": {"out": "rms"}}, ["norm.overrides.out", "'rms'"]),
        ({"overrides": {"out": {"overrides": {}}}}, ["norm.overrides.out", "without overrides"]),
        ({"overrides": {"decoder": {"kind": "rsm"}}}, ["up_blocks.0.resnets.0.norm1", "'rsm'"]),
        ({"overrides": {"middle": {"epsilon": 1}}}, ["mid_block.resnets.0.norm1", "'epsilon'", "eps"]),
        ({"overrides": {"attention": {"groups": 3}}}, ["down_blocks.1.attentions.0.group_norm", "groups = 3"]),
        ({"overrides": {"out": {"separate_skip_norm": 1}}}, ["conv_norm_out", "separate_skip_norm", "got 1"]),
        ({"split_skip": True}, ["split_skip", "renamed to separate_skip_norm"]),
        ({"separate_skip_norm": "yes"}, ["separate_skip_norm", "'yes'"]),
        ({"separate_skip_norm": True, "groups": 32}, ["down_blocks.0.resnets.0.norm1", "groups = 32"]),
        ({"kind": "pixel", "data_std": 0.0}, ["conv_in", "data_std", "greater than 0"]),
        ({"kind": "scaled_ws", "sample_levels": [[1, 1, 0], [1, 0, 1]]}, ["conv_in", "sample_levels", "ascending"]),
        ({"kind": "scaled_ws", "sample_levels": [[1, 0, 0]]}, ["conv_in", "sample_levels", "not both 0"]),
        ({"kind": "scaled_ws", "input_std": 2.0}, ["conv_in", "input_std", "leave it out"]),
        ({"kind": "scaled_ws", "residual_scale": "1"}, ["conv_in", "residual_scale", "'1'"]),
    ],
)  # fmt: skip
def test_invalid_norm_configs_are_errors(small_config, norm, words):
    error = check_config({**small_config, "norm": norm})
    assert all(word in error for word in words), error
    with pytest.raises(ValueError) as raised:
        UNet2D(**small_config, norm=norm)
    assert str(raised.value) == error


def test_regions_are_those_that_the_model_has(small_config):
    config = {**small_config, "sample_size": None, "mid_block_type": None}
    error = check_config({**config, "norm": {"overrides": {"16": {}}}})
    assert error.endswith("'encoder', 'attention', 'decoder', 'out'")


def test_separate_skip_norm_has_a_layer_for_each_part(small_config):
    config = {**small_config, "norm": {"separate_skip_norm": True}}
    model, plain = UNet2D(**config), UNet2D(**small_config)
    sites = dict(norm_sites(config))
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "num_groups")}
    assert sites == {name: m.num_channels for name, m in layers.items()}
    parts = {name: channels for name, channels in sites.items() if ".parts." in name}
    assert parts == {
        "up_blocks.0.resnets.0.norm1.parts.0": 32,
        "up_blocks.0.resnets.0.norm1.parts.1": 32,
        "up_blocks.0.resnets.1.norm1.parts.0": 32,
        "up_blocks.0.resnets.1.norm1.parts.1": 16,
        "up_blocks.1.resnets.0.norm1.parts.0": 32,
        "up_blocks.1.resnets.0.norm1.parts.1": 16,
        "up_blocks.1.resnets.1.norm1.parts.0": 16,
        "up_blocks.1.resnets.1.norm1.parts.1": 16,
    }
    changed = model.state_dict().keys() - plain.state_dict().keys()
    assert changed == {f"{name}.{parameter}" for name in parts for parameter in ("weight", "bias")}


def test_parts_meet_where_the_skip_connection_begins(small_config, inputs_for):
    model = UNet2D(**small_config, norm={"separate_skip_norm": True})
    seen = []
    for block in model.up_blocks:
        for resnet in block.resnets:
            resnet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            resnet.norm1.parts[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**inputs_for(small_config))
    assert len(seen) == 8
    for of_block, of_part in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(of_part, of_block)


def test_groups_must_divide_each_part():
    config = {
        "block_out_channels": (16, 48),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    norm = {"groups": 16, "overrides": {"decoder": {"groups": 32}}}
    assert "up_blocks.0.resnets.0.norm2" in check_config({**config, "norm": norm})  # 96 channels hold 32 groups
    error = check_config({**config, "norm": {**norm, "separate_skip_norm": True}})
    assert "norm of up_blocks.0.resnets.0.norm1: groups = 32 does not divide 48 channels" in error


def test_separate_skip_norm_by_region(small_config):
    model = UNet2D(
        **small_config, norm={"separate_skip_norm": True, "overrides": {"16": {"separate_skip_norm": False}}}
    )
    assert hasattr(model.up_blocks[0].resnets[0].norm1, "parts")
    assert not hasattr(model.up_blocks[1].resnets[0].norm1, "parts")


def input_stds(config):
    model = UNet2D(**config)
    return {name: m.input_std for name, m in model.named_modules() if hasattr(m, "input_std")}


def test_input_std(small_config):
    """Variances by hand, residual_scale 0.5: 1/4 more with every sum."""
    found = input_stds({**small_config, "norm": {"kind": "scaled_ws", "residual_scale": 0.5}})
    up = [(32 * 2.5 + 32 * 1.75) / 64]  # the skip connection from behind the attention
    up.append((32 * (up[0] + 0.5) + 16 * 1.25) / 48)  # a residual sum and attention's; the downsampler's skip
    up.append((32 * (up[1] + 0.5) + 16 * 1.25) / 48)  # the first residual block's
    up.append((16 * (up[2] + 0.25) + 16 * 1) / 32)  # the first convolution's
    variances = {
        "down_blocks.0.resnets.0.norm1": 1,
        "down_blocks.1.resnets.0.norm1": 1.25,
        "down_blocks.1.attentions.0.group_norm": 1.5,
        "mid_block.resnets.0.norm1": 1.75,
        "mid_block.attentions.0.group_norm": 2.0,
        "mid_block.resnets.1.norm1": 2.25,
        "up_blocks.0.resnets.0.norm1": up[0],
        "up_blocks.0.attentions.0.group_norm": up[0] + 0.25,
        "up_blocks.0.resnets.1.norm1": up[1],
        "up_blocks.0.attentions.1.group_norm": up[1] + 0.25,
        "up_blocks.1.resnets.0.norm1": up[2],
        "up_blocks.1.resnets.1.norm1": up[3],
        "conv_norm_out": up[3] + 0.25,
    }
    second = {name for name in found if name.endswith("norm2")}
    assert found.keys() == variances.keys() | second
    for name, std in found.items():
        assert std**2 == pytest.approx(1.0 if name in second else variances[name]), name


@pytest.mark.parametrize("process", ["flow", "edm", "ddpm"])
@pytest.mark.parametrize("kind", ["scaled_ws", "magnitude_preserving"])
def test_signals_have_the_planned_standard_deviation(portraits, kind, process):
    """Of a new network, for images at the noise levels of training. At 4x4, a convolution loses a fifth to padding."""
    data_std = float(portraits.square().mean().sqrt())
    diffusion = {"kind": process, **({"sigma_data": data_std} if process == "edm" else {})}
    model = {"norm": {"kind": kind, "data_std": data_std}}
    config = load_config(COMMON / "portraits.yaml", COMMON / "cpu.yaml", {"model": model, "diffusion": diffusion})
    torch.manual_seed(0)
    arguments = unet_kwargs(config, None)
    network, levels = UNet2D(**arguments), make_process(**process_kwargs(config))
    level = levels.noise_level((torch.randperm(len(portraits)).double() + 0.5) / len(portraits))
    noisy = levels.add_noise(portraits, torch.randn(portraits.shape), level)
    found = {}
    sites = {"conv_in": network.conv_in, **network.norm_layers()}
    for name, module in sites.items():
        planned = getattr(module, "input_std", 1.0)

        def compare(module, args, name=name, planned=planned):
            found[name] = args[0].square().mean().sqrt().item() / planned

        module.register_forward_pre_hook(compare)
    with torch.no_grad():
        network(levels.network_input(noisy, level), level.timestep)
    assert found.keys() == sites.keys() and len(norm_sites(arguments)) == len(sites) - 1
    assert found["conv_in"] == pytest.approx(1.0, abs=0.03)
    for name, ratio in found.items():
        assert 0.5 < ratio < 1.1, name
        if network.get_submodule(name) in (network.conv_norm_out, *network.down_blocks[0].modules()):  # at 16x16
            assert ratio > 0.65, name


def test_without_norms_a_new_network_keeps_magnitudes(small_config):
    """And residual branches begin at 0."""
    model = UNet2D(**small_config, norm={"kind": "none"})
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        for resnet in block.resnets:
            x = torch.randn(4, resnet.conv1.in_channels, 16, 16)
            h = resnet.conv1(resnet.norm1(x))
            assert h.square().mean().sqrt().item() == pytest.approx(1, abs=0.15)
            assert not resnet.conv2(h).any()
    x = torch.randn(4, 32, 16, 16)
    assert torch.equal(model.mid_block(x, torch.randn(4, 64)), x)


def test_input_std_of_rescaled_sums_and_other_kinds(small_config):
    config = {**small_config, "mid_block_scale_factor": 2.0, "norm": {"overrides": {"middle": {"kind": "scaled_ws"}}}}
    found = input_stds(config)
    # Sums of other kinds add 1: three in the encoder.
    assert found["mid_block.resnets.0.norm1"] == pytest.approx(2.0)
    assert found["mid_block.attentions.0.group_norm"] == pytest.approx(math.sqrt(4.04 / 4))
