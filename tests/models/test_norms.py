"""Every kind of normalization in UNet2D."""

import pytest
import torch

from gnunet.models import UNet2D
from gnunet.norms import NORMS, make_conv, make_input, make_output, make_residual

VARIANTS = {
    **{kind: {"kind": kind} for kind in NORMS},
    "separate_skip_norm": {"separate_skip_norm": True},
    "hybrid": {"kind": "scaled_ws", "overrides": {"encoder": {"kind": "batch"}, "8": {"kind": "pixel"}}},
}
EXACTLY = {"rtol": 0, "atol": 0}


@pytest.fixture(params=VARIANTS)
def norm(request):
    return VARIANTS[request.param]


def model_with(norm, config):
    torch.manual_seed(0)
    return UNet2D(**config, norm=norm)


@pytest.mark.parametrize(
    ("name", "training"), [*((name, True) for name in VARIANTS), ("batch", False), ("switchable", False)]
)
def test_trains_in_float32_and_channels_last(small_config, inputs_for, run, not_channels_last, name, training):
    model = model_with(VARIANTS[name], small_config).train(training)
    others = not_channels_last(model)
    results = run(model, inputs_for(small_config))
    assert results.keys() == {"output", "sample", *(name for name, _ in model.named_parameters())}
    for name, value in results.items():
        assert value.isfinite().all(), name
        assert value.dtype == torch.float32, name
    assert not others


@pytest.mark.parametrize("kind", NORMS)
def test_the_kind_decides_on_convolutions_and_sums(small_config, kind):
    norm = {"kind": kind}
    model = model_with(norm, small_config)
    convs = {name: type(m) for name, m in model.named_modules() if hasattr(m, "kernel_size")}
    first, last = make_input(norm, 3, 16, image_channels=3)[1], make_output(norm, 16, 3)
    assert (convs.pop("conv_in"), convs.pop("conv_out")) == (type(first), type(last))
    assert len(convs) == 8 * 2 + 5 + 2  # residual blocks, their shortcuts, changes of resolution
    assert set(convs.values()) == {type(make_conv(norm, 8, 8, 3))}
    sums = {type(m) for name, m in model.named_modules() if name.endswith(".residual")}
    assert sums == {type(make_residual(norm))}


def test_saves_and_loads(small_config, inputs_for, norm, tmp_path):
    model, inputs = model_with(norm, small_config), inputs_for(small_config)
    model(**inputs)
    model.eval().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = UNet2D.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.norm == norm
    assert loaded.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACTLY)
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


def test_gradient_checkpointing_changes_nothing(small_config, inputs_for, run, norm):
    models = [model_with(norm, small_config) for _ in range(2)]
    if norm.get("kind") == "batch_renorm":
        pytest.skip("an error, as the next test shows")
    models[1].enable_gradient_checkpointing()
    expected, found = (run(model, inputs_for(small_config)) for model in models)
    torch.testing.assert_close(found, expected, **EXACTLY)
    torch.testing.assert_close(dict(models[1].named_buffers()), dict(models[0].named_buffers()), **EXACTLY)


@pytest.mark.parametrize(
    ("norm", "path"),
    [
        ({"kind": "batch_renorm"}, "down_blocks.0.resnets.0.norm1"),
        ({"overrides": {"out": {"kind": "batch_renorm"}}}, "conv_norm_out"),
    ],
)
def test_gradient_checkpointing_with_batch_renorm_is_an_error(small_config, norm, path):
    with pytest.raises(ValueError, match=f"running statistics .* in {path}"):
        UNet2D(**small_config, norm=norm).enable_gradient_checkpointing()


def test_compiles_without_a_graph_break(small_config, inputs_for, run):
    """What is not a layer's alone; norms/test_formulas.py compiles a layer of every kind."""
    torch.compiler.reset()
    overrides = {
        "middle": {"kind": "pixel"},
        "decoder": {"kind": "batch_renorm", "separate_skip_norm": True},
        "out": {"kind": "batch"},
    }
    one_level = {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    norm, config = {"kind": "scaled_ws", "overrides": overrides}, {**small_config, **one_level}
    model, compiled = (model_with(norm, config) for _ in range(2))
    compiled.compile(fullgraph=True, backend="aot_eager")
    inputs = inputs_for(config)
    torch.testing.assert_close(run(compiled, inputs), run(model, inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(compiled.named_buffers()), dict(model.named_buffers()), rtol=1e-5, atol=1e-6)


def test_rescaled_sums_of_the_middle_block(small_config, inputs_for):
    """mid_block_scale_factor divides what a kind's own sum gives."""
    model = model_with({"kind": "scaled_ws"}, {**small_config, "mid_block_scale_factor": 2.0}).eval()
    seen = []
    model.mid_block.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    model(**inputs_for(small_config))
    ((x, y),) = seen
    torch.testing.assert_close(y, x / 8)  # a new ScaledResidual passes on its input


@pytest.mark.parametrize(("kind", "way"), [("instance", "default"), ("instance", "scale_shift"), ("group", "default")])
def test_statistics_of_one_channel_cancel_the_noise_level_that_is_added_to_it(small_config, kind, way):
    """Kim et al., Disappearance of Timestep Embedding (arXiv:2405.14126)."""
    model = model_with({"kind": kind, "groups": 4}, {**small_config, "resnet_time_scale_shift": way}).eval().double()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        difference = (model(x, 10).sample - model(x, 900).sample).abs().max()
    assert (difference < 1e-12) == (kind == "instance" and way == "default")
