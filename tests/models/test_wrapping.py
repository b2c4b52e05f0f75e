"""What others attach to a UNet2DModel, or make of one, works with a UNet2D: offloading, hooks, adapters, exporters."""

import accelerate
import pytest
import torch
from diffusers import UNet2DModel
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from gnunet.models import UNet2D

ONE_LEVEL = {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}
CPU = torch.device("cpu")


class Adapter(nn.Module):
    """A layer in another's place, without its attributes, as of LoRA."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def adapt(model: nn.Module) -> None:
    for path, layer in list(model.named_modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.Dropout)):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Adapter(layer))


def dispatch(model: nn.Module, paths: list[str]) -> None:
    accelerate.dispatch_model(model, dict.fromkeys(paths, "cpu"), main_device="cpu", force_hooks=True)


def checkpoint_up_blocks(model: nn.Module) -> None:
    apply_activation_checkpointing(model, check_fn=lambda module: any(module is block for block in model.up_blocks))


WRAPPERS = {
    "adapters": adapt,
    "dispatch of blocks": lambda m: dispatch(m, [name for name, _ in m.named_children()]),
    "dispatch of layers": lambda m: dispatch(m, [p for p, layer in m.named_modules() if vars(layer)["_parameters"]]),
    "offload": lambda m: accelerate.cpu_offload(m, execution_device=CPU),
    "group offload": lambda m: m.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1),
    "leaf offload": lambda m: m.enable_group_offload(CPU, CPU, offload_type="leaf_level"),
    "layerwise casting": lambda m: m.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "checkpoint wrapper": checkpoint_up_blocks,
    "contiguous weights": lambda m: m.to(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_gives_the_results_of_diffusers(small_config, inputs_for, wrapper):
    config = {**small_config, "num_class_embeds": 7, "downsample_padding": 0}
    theirs = UNet2DModel(**config)
    ours, inputs = UNet2D.from_diffusers(theirs), inputs_for(config)
    outputs = []
    for model in (theirs, ours):
        WRAPPERS[wrapper](model)
        sample = inputs["sample"].clone().requires_grad_()
        output = model(**{**inputs, "sample": sample}).sample
        outputs.append([output.detach()])
        if wrapper != "layerwise casting":  # which is for inference
            outputs[-1] += torch.autograd.grad(output.square().mean(), sample)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_up_blocks_leave_the_callers_skip_connections_alone(small_config):
    up = UNet2D(**small_config).up_blocks[0]
    skips = [torch.randn(1, 16, 8, 8), torch.randn(1, 32, 8, 8)]
    x, temb = torch.randn(1, 32, 8, 8), torch.randn(1, 64)
    assert torch.equal(up(x, temb, skips), up(x, temb, tuple(skips)))
    assert len(skips) == 2


def test_layers_on_disk(small_config, inputs_for, tmp_path):
    model, inputs = UNet2D(**small_config).eval(), inputs_for(small_config)
    model.save_pretrained(tmp_path)
    devices = {name: "disk" if name == "mid_block" else "cpu" for name, _ in model.named_children()}
    loaded = UNet2D.from_pretrained(tmp_path, device_map=devices, offload_folder=tmp_path / "offload")
    assert loaded.mid_block.resnets[0].conv1.weight.is_meta
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)
    assert loaded.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dropout", [nn.Dropout2d(1.0), nn.Sequential(nn.Dropout(1.0)), nn.Dropout(1.0)])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_dropout_may_be_replaced(small_config, dropout, recompute):
    """By one that drops everything: what is left of the second convolution is its bias."""
    resnet = UNet2D(**small_config).mid_block.resnets[0]
    resnet.dropout, resnet.recompute = dropout, recompute
    x = torch.randn(1, 32, 4, 4, requires_grad=True)
    y = resnet(x, torch.randn(1, 64))
    torch.testing.assert_close(y, x + resnet.conv2.bias[:, None, None])
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.ones_like(dx))


@pytest.mark.parametrize("timestep", [torch.tensor([3, 5]), 3.5])
def test_export_for_any_batch_size(small_config, timestep):
    model = UNet2D(**{**small_config, **ONE_LEVEL}).eval()
    batch = torch.export.Dim.DYNAMIC
    per_sample = isinstance(timestep, torch.Tensor) and timestep.dim()
    shapes = {"sample": {0: batch}, "timestep": {0: batch} if per_sample else None}
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(2, 3, 16, 16), timestep), dynamic_shapes=shapes).module()
        for size in (3, 5):
            sample, t = torch.randn(size, 3, 16, 16), torch.arange(size) if per_sample else timestep
            torch.testing.assert_close(exported(sample, t).sample, model(sample, t).sample)
