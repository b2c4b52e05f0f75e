"""What a forward pass of UNet2D keeps for backward, against diffusers' UNet2DModel."""

import gc

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import nn
from torch.overrides import TorchFunctionMode

from gnunet.environment import activation_bytes
from gnunet.models import UNet2D

MIB = 2**20
CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
}
DEFAULT64 = {"sample_size": 64}
EACH_LAYER = {"up_block_types": ("UpBlock2D", "UpBlock2D"), "mid_block_type": None}
ONE_LEVEL = {
    "block_out_channels": (16,),
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}


def saved_bytes(model, *args):
    """Bytes that a forward pass saves for the backward pass, without the parameters."""
    return activation_bytes(lambda: model(*args), model.parameters())


class OnCuda(TorchFunctionMode):
    """What eager CUDA would do with a U-Net's tensors on the meta device, as far as it matters to what is kept.

    Convolutions of channels_last tensors give channels_last, and attention is the flash kernel. With a dtype,
    autocast's casts: to it for convolutions, linear layers and attention, a parameter only once (the cache that
    autocast has while gradients are recorded); to float32 for group norm. Of its list (torch.amp's docs) the two
    networks use nothing else that casts.
    """

    lower = (F.conv2d, F.linear, F.scaled_dot_product_attention)
    full = (F.group_norm,)

    def __init__(self, dtype=None):
        super().__init__()
        self.dtype, self.copies = dtype, {}

    def cast(self, t, dtype):
        if self.dtype is None or not isinstance(t, torch.Tensor) or t.dtype == dtype:
            return t
        if isinstance(t, nn.Parameter) and torch.is_grad_enabled():
            if t not in self.copies:
                self.copies[t] = t.to(dtype)
            return self.copies[t]
        return t.to(dtype)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.lower:
            args = [self.cast(arg, self.dtype) for arg in args]
        elif function in self.full:
            args = [self.cast(arg, torch.float32) for arg in args]
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        output = function(*args, **(kwargs or {}))
        if function is F.conv2d and any(map(is_channels_last, args[:2])):
            return output.contiguous(memory_format=torch.channels_last)
        return output


def is_channels_last(t):
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def recomputing(config, enabled=True):
    """A model of the same weights at each call."""
    torch.manual_seed(0)
    model = UNet2D(**config)
    model.enable_recompute(enabled)
    return model


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def assert_recompute_changes_memory_only(inputs_for, run):
    def check(config, *, training=True, dtype=None, share=1.0):
        """`share`: the most of the bytes that may be left."""
        results, sizes = [], []
        for enabled in (False, True):
            model = recomputing(config, enabled).train(training)
            torch.manual_seed(1)  # of the dropout masks
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                results.append(run(model, inputs_for(config)))
                sizes.append(saved_bytes(model, *inputs_for(config).values()))
        assert_same(*results)
        assert sizes[1] <= share * sizes[0]

    return check


def bytes_on_cuda(make_model, config, dtype=None):
    """What a batch of 8 keeps; computes nothing."""
    with torch.device("meta"):
        model = make_model(config)
        args = torch.empty(8, 3, config["sample_size"], config["sample_size"]), torch.empty(8, dtype=torch.long)
    with OnCuda(dtype):
        return saved_bytes(model, *args)


@pytest.mark.parametrize(
    ("config", "dtype", "share"),
    [
        (CIFAR10, None, 0.36),
        (CIFAR10, torch.bfloat16, 0.20),
        (DEFAULT64, None, 0.38),
        (DEFAULT64, torch.bfloat16, 0.22),
    ],
)
def test_share_of_diffusers_bytes_with_recompute(config, dtype, share):
    theirs = bytes_on_cuda(lambda config: UNet2DModel(**config), config, dtype)
    assert bytes_on_cuda(recomputing, config, dtype) <= share * theirs


@pytest.mark.parametrize(("enabled", "mib"), [(False, 256), (True, 134)])
def test_bytes_counted_in_a_real_forward_pass(enabled, mib):
    """diffusers keeps 381.6 MiB here; and what is counted on the meta device above is true."""
    found = 8 * saved_bytes(recomputing(CIFAR10, enabled), torch.randn(1, 3, 32, 32), torch.arange(1))
    assert found <= mib * MIB
    on_meta = bytes_on_cuda(lambda config: recomputing(config, enabled), CIFAR10)
    assert on_meta == pytest.approx(found, rel=1e-3)


def test_recompute_changes_memory_only(config, assert_recompute_changes_memory_only):
    assert_recompute_changes_memory_only({**config, "dropout": 0.2}, share=0.7)


def test_recompute_in_evaluation(small_config, assert_recompute_changes_memory_only):
    assert_recompute_changes_memory_only({**small_config, "dropout": 0.2}, training=False, share=0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recompute_under_autocast(small_config, assert_recompute_changes_memory_only, dtype):
    assert_recompute_changes_memory_only({**small_config, "dropout": 0.2}, dtype=dtype, share=0.7)


@pytest.mark.parametrize(
    ("norm", "share"),
    [
        ({"kind": "group"}, 0.7),
        ({"kind": "layer"}, 0.7),
        ({"kind": "instance"}, 0.7),
        ({"separate_skip_norm": True}, 0.9),  # nothing is recomputed where a norm is of parts
        ({"kind": "weight_standardization"}, 1.0),  # nor where a convolution is not torch's own
        ({"kind": "batch"}, 1.0),
        ({"kind": "scaled_ws"}, 1.0),
        ({"kind": "none"}, 1.0),
    ],
)
def test_recompute_with_each_kind_of_norm(small_config, assert_recompute_changes_memory_only, norm, share):
    assert_recompute_changes_memory_only({**small_config, "norm": norm}, share=share)


def test_gradient_checkpointing_changes_memory_only(config, inputs_for, run):
    """Around layers that recompute; models/test_norms.py has it by itself."""
    model, inputs = recomputing(config), inputs_for(config)
    plain, plain_bytes = run(model, inputs), saved_bytes(model, *inputs.values())
    model.enable_gradient_checkpointing()
    assert_same(run(model, inputs), plain)
    assert saved_bytes(model, *inputs.values()) < 0.7 * plain_bytes


@pytest.mark.parametrize("enabled", [False, True])
def test_dropout_of_zero_saves_nothing(small_config, inputs_for, enabled):
    inputs = inputs_for(small_config).values()
    model = recomputing(small_config, enabled)
    training = saved_bytes(model.train(), *inputs)
    assert training == saved_bytes(model.eval(), *inputs)
    assert saved_bytes(recomputing({**small_config, "dropout": 0.1}, enabled).train(), *inputs) > training


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_without_a_graph_break(small_config, inputs_for, run, checkpointing):
    """Forward and backward as the compiler traces them; training/test_compile.py tests inductor's code, and
    models/test_norms.py has what is not recomputed."""
    torch.compiler.reset()
    config = {**small_config, **(ONE_LEVEL if checkpointing else EACH_LAYER)}
    model, inputs = recomputing(config, enabled=False), inputs_for(config)
    expected, plain_bytes = run(model, inputs), saved_bytes(model, *inputs.values())
    model.enable_recompute()
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert saved_bytes(model, *inputs.values()) < 0.7 * plain_bytes


def test_recompute_under_ddp(small_config, inputs_for, run):
    """DDP's hooks see every parameter's gradient once; its own averaging is tested with the trainer."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, inputs = recomputing(small_config), inputs_for(small_config)
        expected = run(model, inputs)
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        for _ in range(2):
            found = run(wrapped, inputs)
            assert_same({name.removeprefix("module."): value for name, value in found.items()}, expected)
        # Were DDP the last to hold the group, it would wait for threads that may wait for the interpreter.
        del wrapped
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()
