"""UNet2D is diffusers' UNet2DModel: outputs, gradients, files, both ways."""

import types

import accelerate
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import nn

import gnunet
from gnunet.models import UNet2D


def test_same_outputs_and_gradients_and_converted_back_the_same_model(config, diffusers_model, inputs_for, run):
    model = UNet2D.from_diffusers(diffusers_model)
    assert model.state_dict().keys() == diffusers_model.state_dict().keys()
    back = model.to_diffusers()
    assert type(back) is UNet2DModel
    weights = diffusers_model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in back.state_dict().items())
    assert all(value.is_contiguous() for value in back.state_dict().values())
    inputs = inputs_for(config)
    expected, found = run(diffusers_model, inputs), run(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(back(**inputs).sample, expected["output"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_keeps_dtype_and_mode_and_shares_nothing(small_config, dtype):
    source = UNet2DModel(**small_config).to(dtype).eval()
    state = torch.get_rng_state()
    model = UNet2D.from_diffusers(source)
    assert torch.equal(torch.get_rng_state(), state)
    back = model.to_diffusers()
    pointers = [p.data_ptr() for m in (source, model, back) for p in m.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert model.dtype == back.dtype == dtype
    assert not model.training and not back.training
    assert all(p.requires_grad for p in model.parameters())


DIFFERENCES = {  # what is set on modules, and the name in the error
    "padding": (
        lambda m: setattr(m.down_blocks[1].resnets[0].conv1, "padding_mode", "circular"),
        "0.conv1.padding_mode",
    ),
    "activation": (lambda m: setattr(m.time_embedding, "act", nn.GELU()), "time_embedding.act"),
    "norm": (lambda m: setattr(m, "conv_norm_out", nn.BatchNorm2d(16)), "conv_norm_out"),
    "groups": (lambda m: setattr(m, "conv_norm_out", nn.GroupNorm(2, 16)), "conv_norm_out"),
    "eps": (lambda m: setattr(m.mid_block.resnets[0].norm1, "eps", 0.1), "mid_block.resnets.0.norm1.eps"),
    "dropout": (lambda m: setattr(m.up_blocks[0].resnets[1].dropout, "p", 0.5), "up_blocks.0.resnets.1.dropout.p"),
    "dropout 2d": (lambda m: setattr(m.mid_block.resnets[0], "dropout", nn.Dropout2d(0.0)), "resnets.0.dropout"),
    "no layer": (lambda m: setattr(m.mid_block.resnets[1], "conv2", nn.Identity()), "mid_block.resnets.1.conv2"),
    "no block": (lambda m: setattr(m, "mid_block", None), "mid_block"),
    "further layer": (lambda m: m.add_module("head", nn.Linear(1, 1)), "head"),
    "further parameter": (lambda m: setattr(m.conv_out, "gain", nn.Parameter(torch.ones(3))), "conv_out.tensors"),
    "no bias": (lambda m: setattr(m.conv_out, "bias", None), "conv_out.tensors"),
    "parametrization": (lambda m: nn.utils.parametrizations.weight_norm(m.conv_out), "conv_out"),
    "hook": (lambda m: m.conv_in.register_forward_hook(lambda *args: 2 * args[-1]), "conv_in.hooks"),
    "forward": (lambda m: setattr(m.conv_in, "forward", torch.abs), "conv_in.forward"),
    "forward of the model": (lambda m: setattr(m, "forward", torch.abs), "forward"),
    "heads": (lambda m: setattr(m.mid_block.attentions[0], "heads", 1), "mid_block.attentions.0.heads"),
}


@pytest.mark.parametrize("cls", [UNet2D, UNet2DModel])
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_converting_a_model_that_is_not_as_its_config_says_is_an_error(small_config, cls, difference):
    change, name = DIFFERENCES[difference]
    model = cls(**small_config)
    change(model)
    with pytest.raises(ValueError, match=rf"config.* {name}|config.*\.{name}"):
        model.to_diffusers() if cls is UNet2D else UNet2D.from_diffusers(model)


def test_what_does_not_change_results_is_converted(small_config, inputs_for):
    class Subclass(UNet2DModel):
        """With another loss, perhaps."""

    model = Subclass(**small_config).eval()
    inputs = inputs_for(small_config)
    expected = model(**inputs).sample
    assert gnunet.fuse(model)
    model.enable_gradient_checkpointing()
    model.mid_block.attentions[0].processor = AttnProcessor()
    model.forward = types.MethodType(accelerate.utils.convert_outputs_to_fp32(model.forward.__func__), model)
    model.conv_in.requires_grad_(False)
    model.mid_block.resnets[0].dropout.train()
    converted = UNet2D.from_diffusers(model)
    torch.testing.assert_close(converted(**inputs).sample, expected, rtol=1e-5, atol=1e-5)
    back = converted.to_diffusers()
    for m in (converted, back):
        assert {name for name, p in m.named_parameters() if not p.requires_grad} == {"conv_in.weight", "conv_in.bias"}
        assert [path for path, module in m.named_modules() if module.training] == ["mid_block.resnets.0.dropout"]


def test_only_a_unet2dmodel_is_converted(small_config):
    with pytest.raises(ValueError, match="UNet2DModel; got Linear"):
        UNet2D.from_diffusers(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"norm": {"groups": 4}}, {"norm_num_groups": 4, "norm_eps": 1e-5}),
        ({"norm": {"kind": "layer", "eps": 1e-3}}, {"norm_num_groups": 1, "norm_eps": 1e-3}),
        ({"learned_weighting": True, "augment_dim": 9}, {}),
    ],
)
def test_exports_what_diffusers_has_without_what_only_training_needs(small_config, inputs_for, options, expected):
    model = UNet2D(**small_config, **options)
    exported = model.to_diffusers()
    assert {key: exported.config[key] for key in expected} == expected
    inputs = inputs_for(small_config)
    torch.testing.assert_close(exported(**inputs).sample, model(**inputs).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        ({"kind": "none"}, "kind 'none'"),
        ({"kind": "instance"}, r"kind 'instance' has \[16, 32"),
        ({"channels_per_group": 8}, r"\[2, 4"),
        ({"kind": "weight_standardization"}, "'weight_standardization', which is in down_blocks.0.resnets.0.norm1"),
        ({"overrides": {"attention": {"kind": "rms"}}}, "kind 'rms', which is in .*attentions.0.group_norm"),
        ({"overrides": {"decoder": {"eps": 1e-3}}}, r"one eps for all norms; kind 'group' has \[1e-05, 0.001\]"),
        ({"separate_skip_norm": True}, "separate_skip_norm in up_blocks.0.resnets.0.norm1"),
    ],
)
def test_exporting_other_norms_is_an_error(small_config, norm, words):
    with pytest.raises(ValueError, match=words):
        UNet2D(**small_config, norm=norm).to_diffusers()


def test_loads_a_diffusers_folder_with_the_old_attention_names(small_config, inputs_for, tmp_path):
    source = UNet2DModel(**small_config)
    source.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    weights = {}
    for name, value in load_file(file).items():
        for new_name, old_name in old.items():
            name = name.replace(new_name, old_name)
        weights[name] = value
    save_file(weights, file, metadata={"format": "pt"})
    inputs = inputs_for(small_config)
    found = UNet2D.from_pretrained(tmp_path)(**inputs).sample
    torch.testing.assert_close(found, source(**inputs).sample, rtol=1e-5, atol=1e-5)


def test_from_pretrained_takes_the_arguments_of_diffusers(small_config, tmp_path):
    source = UNet2DModel(**small_config).half()
    source.save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size="100KB")
    arguments = {"pretrained_model_name_or_path": tmp_path, "subfolder": "unet", "variant": "fp16"}
    model = UNet2D.from_pretrained(**arguments, torch_dtype=torch.float16)
    assert model.dtype == torch.float16
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_an_exported_model_runs_in_a_pipeline(small_config, tmp_path):
    """Without gnunet, as training/test_trainer.py shows."""
    DDPMPipeline(UNet2D(**small_config).to_diffusers(), DDPMScheduler()).save_pretrained(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert type(pipeline.unet) is UNet2DModel
    assert not [module for module in pipeline.unet.modules() if type(module).__module__.startswith("gnunet")]
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=2).images[1].size == (16, 16)
