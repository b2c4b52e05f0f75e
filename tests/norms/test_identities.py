"""Identities between kinds, their flags, and torch's layers as oracles."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gnunet.norms import NORMS

SHAPES = [(4, 12, 3, 5), (4, 12, 2, 3, 2)]


def gradient(layer, x, dy):
    """dx, from a copy of the layer, whose running statistics do not move."""
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(copy.deepcopy(layer)(x), x, dy)
    return dx


@pytest.mark.parametrize("kind", ["group", "layer", "instance", "group_rms", "weight_standardization"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_sample_does_not_depend_on_its_batch(make_layer, draw, set_threads, kind, dtype, layout, threads):
    """Up to rounding: how the CPU's vector instructions split a batch depends on its size."""
    set_threads(threads)
    layer = make_layer(kind).float()
    x, dy = (draw(5, 12, 7, 9, seed=seed).to(dtype).contiguous(memory_format=layout) for seed in (1, 2))
    y, dx = layer(x), gradient(layer, x, dy)
    for part in (slice(0, 1), slice(3, 4), slice(1, 4)):
        torch.testing.assert_close(layer(x[part]), y[part])
        torch.testing.assert_close(gradient(layer, x[part], dy[part]), dx[part])


@pytest.mark.parametrize("kind", NORMS)
def test_batch_dependent_says_whether_samples_see_each_other(make_layer, draw, kind):
    x, dy = draw(4, 12, 3, 5), draw(4, 12, 3, 5, seed=1)
    spoiled = x.clone()
    spoiled[2] = float("nan")
    others = [0, 1, 3]
    for training in (True, False):
        values = []
        for batch in (x, spoiled):
            layer = make_layer(kind).train(training)
            values.append((gradient(layer, batch, dy)[others], layer(batch)[others]))
        (dx, y), (dx_with_nan, y_with_nan) = values
        sees = training and layer.batch_dependent
        assert torch.equal(y, y_with_nan) != sees
        assert torch.equal(dx, dx_with_nan) != sees


@pytest.mark.parametrize("kind", NORMS)
def test_is_pointwise_says_whether_positions_see_each_other(make_layer, draw, kind):
    layer = make_layer(kind)
    x = draw(4, 12, 3, 5)
    changed = x.clone()
    changed[:, :, 0, 0] += 1
    y, y_changed = copy.deepcopy(layer)(x), layer(changed)
    assert torch.equal(y[:, :, 1:], y_changed[:, :, 1:]) == layer.is_pointwise


@pytest.mark.parametrize("kind", NORMS)
def test_has_state_says_whether_training_changes_buffers(make_layer, draw, kind):
    layer = make_layer(kind)
    assert layer.has_state == bool(list(layer.buffers()))
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(draw(4, 12, 3, 5))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer.train()(draw(4, 12, 3, 5))
    for name, buffer in layer.named_buffers():
        assert not torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_group_is_layer_norm_and_a_group_each_is_instance_norm(make_layer, draw, shape):
    x = draw(*shape)
    for kind, groups in (("layer", 1), ("instance", 12)):
        extreme, group = make_layer(kind), make_layer("group", groups=groups)
        assert torch.equal(extreme(x), group(x))
        plain = F.layer_norm(x, shape[1:], eps=1e-3) if kind == "layer" else F.instance_norm(x, eps=1e-3)
        weight, bias = (p.view(-1, *(1,) * (len(shape) - 2)) for p in (group.weight, group.bias))
        torch.testing.assert_close(group(x), F.silu(plain * weight + bias))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ghost_batch", {"ghost_size": 4}),
        ("ghost_batch", {"ghost_size": 9}),
        ("batch_renorm", {"r_max": 1.0, "d_max": 0.0}),
        ("batch_renorm", {"r_max": 3.0, "d_max": 5.0, "renorm_warmup": 10}),  # in its first batch
        ("sync_batch", {}),
    ],
)
def test_special_cases_of_batch_norm(make_layer, draw, kind, options):
    x, dy = draw(4, 12, 3, 5), draw(4, 12, 3, 5, seed=1)
    layer, batch = make_layer(kind, **options), make_layer("batch")
    torch.testing.assert_close(gradient(layer, x, dy), gradient(batch, x, dy), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x), batch(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(batch.named_buffers()), rtol=0, atol=0)
    assert torch.equal(layer.eval()(x), batch.eval()(x))


def test_batch_renorm_without_bounds_is_evaluation(make_layer, draw):
    layer, x = make_layer("batch_renorm", r_max=1e6, d_max=1e6), draw(4, 12, 3, 5)
    expected = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), expected)


def test_batch_renorm_bounds_grow_over_the_warmup(make_layer, draw):
    x = draw(4, 12, 3, 5, mean=9.0)  # d is at its bound in every channel
    options = {"r_max": 1.0, "d_max": 2.0, "renorm_warmup": 4, "activation": None}
    layer, batch = make_layer("batch_renorm", **options), make_layer("batch", activation=None)
    layer.momentum = 1e-6
    for step in range(7):
        d = ((layer(x) - batch(x)) / layer.weight[:, None, None]).detach()
        torch.testing.assert_close(d, torch.full_like(d, 2.0 * min(step / 4, 1)))


@pytest.mark.parametrize(
    ("kind", "torch_layer"),
    [
        ("group", nn.GroupNorm(4, 12, eps=1e-3)),
        ("layer", nn.GroupNorm(1, 12, eps=1e-3)),
        ("instance", nn.InstanceNorm2d(12, eps=1e-3, affine=True)),
        ("batch", nn.BatchNorm2d(12, eps=1e-3)),
        ("sync_batch", nn.BatchNorm2d(12, eps=1e-3)),
        ("layer_channel", nn.LayerNorm(12, eps=1e-3)),
        ("rms", nn.RMSNorm(12, eps=1e-3)),
    ],
)
def test_torchs_layers_have_the_same_parameters_and_values(make_layer, draw, kind, torch_layer):
    layer = make_layer(kind, activation=None)
    torch_layer.double().load_state_dict(layer.state_dict())
    channels_last = isinstance(torch_layer, (nn.LayerNorm, nn.RMSNorm))
    for seed in range(3):
        x = draw(4, 12, 3, 5, seed=seed, mean=1.0)
        expected = torch_layer(x.movedim(1, -1)).movedim(-1, 1) if channels_last else torch_layer(x)
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.state_dict(), torch_layer.state_dict())
    if not channels_last:
        torch.testing.assert_close(layer.eval()(x), torch_layer.eval()(x))
