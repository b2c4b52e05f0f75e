"""A fused model among what people do with models: training, saving, compiling, offloading, copying."""

import copy
import pickle

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import remove_hook_from_submodules
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import gnunet
from gnunet.models import UNet2D

ATTENTION = "no SiLU is known to follow it in Attention"
ONE_LEVEL = {
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
}


def test_report(unet):
    norms = {path for path, module in unet.named_modules() if isinstance(module, nn.GroupNorm)}
    report = gnunet.fuse(unet)
    assert report == 17
    assert norms == {*report.fused, *report.skipped}
    assert set(report.skipped.values()) == {ATTENTION}
    assert f"{report} of {report + len(report.skipped)}" == "17 of 21"
    first = next(iter(report.skipped))
    assert str(report) == f"17 GroupNorm+SiLU pairs fused; 4 group norms left\n  {ATTENTION}: {first} and 3 more"
    back = pickle.loads(pickle.dumps(report))
    assert (back, back.fused, back.skipped) == (report, report.fused, report.skipped)


def test_a_second_call_fuses_nothing(unet, run, call, assert_same):
    first = gnunet.fuse(unet)
    expected = run(unet, call)
    second = gnunet.fuse(unet)
    assert second == 0
    assert [path for path, reason in second.skipped.items() if reason == "already fused"] == [
        path for path, _ in unet.named_modules() if path in first.fused
    ]
    assert_same(run(unet, call), expected, rtol=0)


@pytest.mark.parametrize("function", [gnunet.fuse, gnunet.unfuse])
def test_other_objects_than_modules_are_errors(function):
    with pytest.raises(TypeError, match=rf"{function.__name__} takes a torch.nn.Module.*unet.*got dict"):
        function({"unet": nn.SiLU()})


def test_nothing_to_fuse():
    report = gnunet.fuse(nn.Sequential(nn.Linear(2, 2), nn.SiLU()))
    assert report == 0
    assert str(report) == "0 GroupNorm+SiLU pairs fused: the model has no group norm"
    assert gnunet.unfuse(nn.SiLU()) == 0


def test_own_unet_has_the_operator_already(unet):
    report = gnunet.fuse(UNet2D.from_diffusers(unet))
    assert report == 0
    assert set(report.skipped.values()) == {"already gnunet's operator"}


def test_subclass_that_runs_the_known_forward():
    class Mine(UNet2DModel):
        def number_of_parameters(self):
            return sum(p.numel() for p in self.parameters())

    class Other(UNet2DModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    assert "conv_norm_out" in gnunet.fuse(Mine(**ONE_LEVEL)).fused
    assert gnunet.fuse(Other(**ONE_LEVEL)).skipped["conv_norm_out"] == "no SiLU is known to follow it in Other"


def test_classes_keep_their_names(unet):
    """By which accelerate does not split blocks over devices, and FSDP wraps them."""
    names = {path: type(module).__name__ for path, module in unet.named_modules()}
    gnunet.fuse(unet)
    after = {path: type(module).__name__ for path, module in unet.named_modules()}
    assert {path for path, name in names.items() if after[path] != name} == {"conv_act"}
    assert all(isinstance(unet.get_submodule(path), nn.GroupNorm) for path in names if path.endswith("norm1"))


def test_parameters_stay_the_same_objects(unet, run, call):
    unet.down_blocks[0].resnets[0].norm1.weight = unet.conv_norm_out.weight  # tied
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    before = dict(unet.named_parameters())
    gnunet.fuse(unet)
    after = dict(unet.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p for name, p in before.items())
    assert unet.down_blocks[0].resnets[0].norm1.weight is unet.conv_norm_out.weight

    expected = run(unet, call)["output 0"]
    call(unet, torch.randn).square().mean().backward()
    optimizer.step()
    assert not torch.equal(run(unet, call)["output 0"], expected)


def test_saves_and_loads_as_before(unet, run, call, assert_same, tmp_path):
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    expected = run(unet, call)
    gnunet.fuse(unet)
    assert list(unet.state_dict()) == list(state)
    unet.save_pretrained(tmp_path)
    assert_same(run(UNet2DModel.from_pretrained(tmp_path).train(), call), expected, rtol=0)

    fused = run(unet, call)
    for p in unet.parameters():
        nn.init.zeros_(p)
    unet.load_state_dict(state, strict=True)
    assert_same(run(unet, call), fused, rtol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fused_and_independent(unet, run, call, assert_same, duplicate):
    gnunet.fuse(unet)
    expected = run(unet, call)
    twin = duplicate(unet)
    assert not {id(p) for p in unet.parameters()} & {id(p) for p in twin.parameters()}
    assert gnunet.unfuse(unet) == 17
    assert_same(run(twin, call), expected, rtol=0)
    assert gnunet.unfuse(twin) == 17


def test_compiles_as_one_graph(randomized, run, call, assert_same):
    group_norms = []  # PyTorch's, in each graph

    def backend(graph, inputs):
        group_norms.append(sum(node.target is F.group_norm for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.compiler.reset()
    unet = randomized(UNet2DModel(**ONE_LEVEL, add_attention=False))
    expected = run(unet, call)
    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    run(compiled, call)
    pairs = gnunet.fuse(unet)  # the graph must be made anew
    found = {name.removeprefix("_orig_mod."): value for name, value in run(compiled, call).items()}
    before, after = group_norms
    assert before - after == pairs > 0
    assert_same(found, expected, rtol=1e-5)


def test_unfuse_after_sharding(unet, run, call, assert_same):
    """FSDP2's fully_shard makes a subclass of a module's class."""
    expected = run(unet, call)
    gnunet.fuse(unet)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        block = unet.mid_block.resnets[0]
        for module in (block, unet.conv_norm_out, unet):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        output = expected["output 0"]
        torch.testing.assert_close(run(unet, call)["output 0"], output, rtol=1e-5, atol=1e-5)
        gnunet.unfuse(unet)
        assert isinstance(block, FSDPModule) and type(block).__mro__[2] is ResnetBlock2D
        torch.testing.assert_close(run(unet, call)["output 0"], output, rtol=1e-5, atol=1e-5)
    finally:
        distributed.destroy_process_group()


TRACERS = {
    "fx": lambda model, inputs: torch.fx.symbolic_trace(model),
    "jit": torch.jit.trace,
    "export": lambda model, inputs: torch.export.export(model, inputs).module(),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("tracer", TRACERS.values(), ids=TRACERS)
def test_tracers(tracer):
    block = ResnetBlock2D(in_channels=8, temb_channels=6, groups=4)
    head = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU())
    inputs = torch.randn(2, 8, 5, 5), torch.randn(2, 6)
    expected = block(*inputs), head(inputs[0])
    gnunet.fuse(block), gnunet.fuse(head)
    found = tracer(block, inputs)(*inputs), tracer(head, inputs[:1])(inputs[0])
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripting_needs_unfuse():
    model = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU())
    gnunet.fuse(model)
    with pytest.raises(NotImplementedError, match="unfuse"):
        torch.jit.script(model)
    gnunet.unfuse(model)
    torch.jit.script(model)


def test_gradient_checkpointing(unet, run, call, assert_same):
    expected = run(unet, call)
    unet.enable_gradient_checkpointing()
    gnunet.fuse(unet)
    assert_same(run(unet, call), expected, rtol=1e-5)


def test_autocast(unet, run, call, assert_same):
    def autocast(model, randn):
        with torch.autocast("cpu", torch.bfloat16):
            return call(model, randn).float()

    exact = run(unet, call)
    unfused = run(unet, autocast)
    gnunet.fuse(unet)
    fused = run(unet, autocast)
    error = {name: [float((found[name] - value).norm()) for found in (fused, unfused)] for name, value in exact.items()}
    assert sum(f for f, _ in error.values()) <= 1.2 * sum(u for _, u in error.values())
    assert all(value.dtype == torch.float32 for value in fused.values())


def test_half_precision(unet, call):
    gnunet.fuse(unet.to(torch.bfloat16))
    output = call(unet, lambda *shape: torch.randn(*shape, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


def test_keeps_channels_last(unet, run, call, assert_same):
    expected = run(unet, call)
    report = gnunet.fuse(unet)
    unet.to(memory_format=torch.channels_last)
    formats = []
    for path in report.fused:
        unet.get_submodule(path).register_forward_hook(
            lambda module, inputs, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
        )

    def channels_last(model, randn):
        return call(model, lambda *shape: randn(*shape).contiguous(memory_format=torch.channels_last))

    assert_same(run(unet, channels_last), expected, rtol=1e-5)
    assert len(formats) == 17 and all(formats)


def test_hooked_and_replaced_modules_are_skipped(unet, run, call):
    down, mid, up = unet.down_blocks[0].resnets[0], unet.mid_block.resnets[0], unet.up_blocks[0].resnets[0]
    down.norm1.register_forward_hook(lambda module, inputs, output: None)
    mid.forward = lambda *args: type(mid).forward(mid, *args)
    unet.conv_act.register_forward_pre_hook(lambda module, inputs: None)
    up.register_forward_hook(lambda module, inputs, output: None)  # sees what it did
    expected = run(unet, call)
    report = gnunet.fuse(unet)
    assert report == 17 - 2 - 2 - 1
    reason = "its forward, its SiLU's or its parent's is hooked or replaced"
    assert {path for path, r in report.skipped.items() if r == reason} == {
        "down_blocks.0.resnets.0.norm1",
        "down_blocks.0.resnets.0.norm2",
        "mid_block.resnets.0.norm1",
        "mid_block.resnets.0.norm2",
        "conv_norm_out",
    }
    torch.testing.assert_close(run(unet, call)["output 0"], expected["output 0"])


def test_norms_of_another_class_are_skipped(unet):
    class Norm(nn.GroupNorm):
        def forward(self, x):
            return super().forward(x.float())

    first, second = unet.mid_block.resnets
    first.norm2, second.norm2 = Norm(8, 32), nn.BatchNorm2d(32)
    report = gnunet.fuse(unet)
    assert report == 13
    assert "not every norm in its ResnetBlock2D" in report.skipped["mid_block.resnets.1.norm1"]
    assert report.skipped["mid_block.resnets.0.norm1"] == report.skipped["mid_block.resnets.0.norm2"]


def test_offloading_and_back(unet, call):
    x = torch.randn(2, 3, 8, 8)
    expected = call(unet, lambda *shape: x)
    gnunet.fuse(unet)
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    torch.testing.assert_close(call(unet, lambda *shape: x), expected)
    with pytest.raises(ValueError, match="cannot unfuse conv_norm_out: .*forward was replaced"):
        gnunet.unfuse(unet)
    torch.testing.assert_close(call(unet, lambda *shape: x), expected)

    remove_hook_from_submodules(unet)
    assert gnunet.unfuse(unet) == 17
    torch.testing.assert_close(call(unet, lambda *shape: x), expected)
    assert gnunet.fuse(unet) == 17
