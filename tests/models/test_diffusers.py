"""UNet2D is diffusers' UNet2DModel: outputs, gradients, files, both ways."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from gnunet.models import UNet2D


def test_same_outputs_and_gradients(config, diffusers_model, inputs_for, run):
    model = UNet2D.from_diffusers(diffusers_model)
    assert model.state_dict().keys() == diffusers_model.state_dict().keys()
    expected, found = (run(m, inputs_for(config)) for m in (diffusers_model, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_conversion_back_gives_the_same_model(config, diffusers_model, inputs_for, run):
    back = UNet2D.from_diffusers(diffusers_model).to_diffusers()
    assert type(back) is UNet2DModel
    weights = diffusers_model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in back.state_dict().items())
    assert all(value.is_contiguous() for value in back.state_dict().values())
    inputs = inputs_for(config)
    assert torch.equal(back(**inputs).sample, diffusers_model(**inputs).sample)


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


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ({"groups": 4}, {"norm_num_groups": 4, "norm_eps": 1e-5}),
        ({"kind": "layer", "eps": 1e-3}, {"norm_num_groups": 1, "norm_eps": 1e-3}),
    ],
)
def test_exports_the_norms_that_diffusers_has(small_config, inputs_for, norm, expected):
    model = UNet2D(**small_config, norm=norm)
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


def test_an_exported_model_runs_in_a_pipeline(small_config, tmp_path):
    """Without gnunet, as training/test_trainer.py shows."""
    DDPMPipeline(UNet2D(**small_config).to_diffusers(), DDPMScheduler()).save_pretrained(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert type(pipeline.unet) is UNet2DModel
    assert not [module for module in pipeline.unet.modules() if type(module).__module__.startswith("gnunet")]
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=2).images[1].size == (16, 16)
