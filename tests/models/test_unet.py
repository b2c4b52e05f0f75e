"""What UNet2D does beyond being UNet2DModel: norms by config, channels_last, the compiler."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import nn

from gnunet.models import UNet2D, check_config, norm_sites
from gnunet.models.blocks import _attend


def test_norm_sites_are_the_norm_layers(config):
    model = UNet2D(**config)
    sites = dict(norm_sites(config))
    assert sites == {name: m.num_channels for name, m in model.norm_layers().items()}
    theirs = UNet2DModel(**config).named_modules()
    assert sites.keys() == {name for name, m in theirs if isinstance(m, nn.GroupNorm)}


def test_only_attention_norms_have_no_activation(small_config):
    for name, norm in UNet2D(**small_config).norm_layers().items():
        assert norm.activation == (None if "attentions" in name else "silu"), name


def test_the_norms_backend_and_eps_reach_the_layers(small_config):
    model = UNet2D(**small_config, norm_eps=1e-3, norm={"backend": "reference"})
    assert {(m.backend, m.num_groups, m.eps) for m in model.norm_layers().values()} == {("reference", 8, 1e-3)}


LEVELS_14 = {
    "block_out_channels": [8] * 14,
    "down_block_types": ["DownBlock2D"] * 14,
    "up_block_types": ["UpBlock2D"] * 14,
}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"norm_num_groups": 3}, ["down_blocks.0.resnets.0.norm1", "16 channels", "valid: 1, 2, 4, 8, 16"]),
        ({"norm": {"groups": 32}}, ["down_blocks.0.resnets.0.norm1", "groups = 32"]),
        ({"attn_norm_num_groups": 5}, ["mid_block.attentions.0.group_norm", "32 channels"]),
        ({"norm": {"kind": "batch_norm"}}, ["conv_in", "group, layer, instance", "'batch_norm'"]),
        ({"act_fn": "gelu"}, ["act_fn", "silu", "'gelu'"]),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, ["mid_block_type", "UNetMidBlock2D"]),
        ({"up_block_types": ("UpBlock2D", "SkipUpBlock2D")}, ["up_block_types.1", "AttnUpBlock2D", "'SkipUpBlock2D'"]),
        ({"up_block_types": ("UpBlock2D",)}, ["up_block_types", "got 1 and 2"]),
        ({"layers_per_block": 10**6}, ["layers_per_block", "64", "1000000"]),
        ({"block_out_channels": [8] * 10**4}, ["block_out_channels", "14"]),
        ({**LEVELS_14, "layers_per_block": 19}, ["layers_per_block", "at most 18 with 14 blocks", "19"]),
        ({"sample_size": [16]}, ["sample_size", "[16]"]),
        ({"resnet_time_scale_shift": "spatial"}, ["'default' or 'scale_shift'", "'spatial'"]),
        ({"time_embedding_type": "learned"}, ["num_train_timesteps"]),
        ({"attention_head_dim": 64}, ["attention_head_dim", "down_blocks.1.attentions.0", "32", "64"]),
    ],
)
def test_invalid_configs_are_errors_that_name_key_value_and_layer(small_config, wrong, words):
    config = {**small_config, **wrong}
    error = check_config(config)
    assert all(word in error for word in words), error
    with pytest.raises(ValueError) as raised:
        UNet2D(**config)
    assert str(raised.value) == error


def test_check_config_knows_defaults_and_keys(small_config):
    assert check_config(small_config) is None
    assert check_config({}) is None
    assert "'norm_groups'" in check_config({"norm_groups": 4})


@pytest.mark.parametrize(
    ("config", "size", "class_labels", "words"),
    [
        ({}, (15, 16), None, r"divisible by 2; got \(15, 16\)"),
        ({}, (16, 16), torch.zeros(1), "without class embedding"),
        ({"num_class_embeds": 3}, (16, 16), None, "needs class_labels"),
    ],
)
def test_wrong_inputs_are_errors(small_config, config, size, class_labels, words):
    with pytest.raises(ValueError, match=words):
        UNet2D(**small_config, **config)(torch.zeros(1, 3, *size), 1, class_labels)


TIMESTEPS = [7, 7.9, -3.5, *map(torch.tensor, (7, 7.9, [7], [7.9], [3.5, 7.2], [3, 40]))]


@pytest.mark.parametrize("timestep", [*TIMESTEPS, torch.tensor([3.5, 7.2]).half(), torch.tensor([3, 200]).byte()])
def test_timesteps_are_as_in_diffusers(small_config, timestep):
    theirs, sample = UNet2DModel(**small_config), torch.randn(2, 3, 16, 16)
    found = UNet2D.from_diffusers(theirs)(sample, timestep).sample
    torch.testing.assert_close(found, theirs(sample, timestep).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("timestep", [torch.tensor([1, 2, 3]), torch.tensor([[1], [2]]), torch.tensor([])])
def test_timesteps_of_another_shape_are_an_error(small_config, timestep):
    with pytest.raises(ValueError, match=rf"timestep.*\(2,\); got \({len(timestep)}"):
        UNet2D(**small_config)(torch.randn(2, 3, 16, 16), timestep)


def test_is_channels_last_throughout(config, inputs_for, not_channels_last):
    model, inputs = UNet2D(**config), inputs_for(config)
    others = not_channels_last(model)
    output = model(**inputs).sample
    assert output.is_contiguous(memory_format=torch.channels_last) and not others
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(model(**inputs).sample, output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_under_autocast(small_config, inputs_for, dtype):
    model, inputs = UNet2D(**small_config), inputs_for(small_config)
    exact = model(**inputs).sample
    with torch.autocast("cpu", dtype):
        output = model(**inputs).sample
    assert output.dtype == dtype
    output.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert (output - exact).abs().max() < 0.05


@pytest.mark.parametrize("positions", [16, 100])
def test_attention_in_bfloat16(positions):
    q, k, v = (torch.randn(2, 3, positions, 8).bfloat16().requires_grad_() for _ in range(3))
    y = _attend(q, k, v)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert y.dtype == torch.bfloat16 and (y - exact).abs().max() <= 2**-7 * exact.abs().max()
    for gradient, expected in zip(*(torch.autograd.grad(out.sum(), (q, k, v)) for out in (y, exact)), strict=True):
        assert (gradient - expected).abs().max() <= 2**-6 * expected.abs().max()
