"""What goes with a norm in a network: convolutions, the sum of a residual block, norms of concatenations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gnunet.norms import (
    NORMS,
    ConcatNorm,
    force_weight_norm,
    make_conv,
    make_input,
    make_linear,
    make_norm,
    make_output,
    make_residual,
)

CHANGED = ["weight_norm", "weight_standardization", "scaled_ws", "pixel", "magnitude_preserving"]
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def exact_weight(kind, conv):
    """What is convolved with, in float64, one filter after the other."""
    filters = []
    for i, w in enumerate(conv.weight.detach().double()):
        if kind == "weight_norm":
            w = conv.gain[i].detach() * w / (w**2).sum().sqrt()
        elif kind in ("pixel", "magnitude_preserving"):
            w = w / (w**2).sum().sqrt()
        else:
            w = (w - w.mean()) / (w.std(correction=0) * math.sqrt(w.numel()))
            if kind == "scaled_ws":
                w = conv.gain[i].detach() * w
        filters.append(w)
    return torch.stack(filters)


def make(kind, *args, **settings):
    conv = make_conv({"kind": kind}, *args, **settings).double()
    if getattr(conv, "gain", None) is not None:
        nn.init.uniform_(conv.gain, 0.5, 1.5)
    return conv


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("kind", CHANGED)
def test_convolves_with_the_published_weight(draw, kind, ndim):
    conv = make(kind, 4, 6, 3, stride=2, padding=1, ndim=ndim)
    x = draw(2, 4, *(7, 6, 5)[:ndim])
    expected = CONVOLUTIONS[ndim](x, exact_weight(kind, conv), conv.bias, stride=2, padding=1)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("kind", CHANGED)
def test_gradients(draw, kind):
    conv, x = make(kind, 2, 3, 2), draw(1, 2, 3, 3)
    parameters = dict(conv.named_parameters())

    def output(*values):
        return torch.func.functional_call(conv, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, tuple(parameters.values()))


@pytest.mark.parametrize("kind", CHANGED)
def test_weights_are_computed_in_fp32_under_autocast(draw, kind):
    conv, x = make(kind, 64, 32, 3).float(), draw(2, 64, 5, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    bias = None if conv.bias is None else conv.bias.bfloat16()
    assert torch.equal(y, F.conv2d(x, conv.effective_weight(conv.weight).bfloat16(), bias))


def test_compile_in_one_graph(draw):
    convs, x = [make(kind, 4, 6, 3) for kind in CHANGED], draw(1, 4, 5, 5)

    def run(x):
        return [conv(x) for conv in convs]

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


@pytest.mark.parametrize("kind", NORMS)
def test_kinds_that_do_not_change_the_convolution_have_torchs(kind):
    torch.manual_seed(0)
    conv = make_conv({"kind": kind}, 4, 6, 3, stride=2, padding=1, bias=False)
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
    assert (type(conv) is nn.Conv2d) == (kind not in CHANGED)
    assert (conv.stride, conv.padding, conv.kernel_size) == (plain.stride, plain.padding, plain.kernel_size)
    assert conv.bias is None
    # The draw is the same for all kinds, so that arms of a study start alike.
    torch.testing.assert_close(F.normalize(conv.weight.flatten(1)), F.normalize(plain.weight.flatten(1)))


def test_weight_norm_is_torchs_and_starts_as_a_plain_convolution(draw):
    torch.manual_seed(0)
    conv = make_conv({"kind": "weight_norm"}, 4, 6, 3).double()
    torch.manual_seed(0)
    plain, x = nn.Conv2d(4, 6, 3).double(), draw(2, 4, 5, 5)
    torch.testing.assert_close(conv(x), plain(x))
    normalized = nn.utils.parametrizations.weight_norm(plain)
    with torch.no_grad():
        gain, direction = normalized.parametrizations.weight.original0, normalized.parametrizations.weight.original1
        conv.gain.copy_(torch.rand(6)), gain.copy_(conv.gain.view_as(gain))
        conv.weight.copy_(torch.randn_like(conv.weight)), direction.copy_(conv.weight)
    torch.testing.assert_close(conv(x), normalized(x))


def test_scaled_ws_keeps_the_variance_and_its_silu_makes_it(draw):
    conv = make_conv({"kind": "scaled_ws"}, 128, 256, 3).double()
    norm = make_norm({"kind": "scaled_ws", "input_std": 3.0}, 128, activation="silu")
    x = 3 * draw(8, 128, 6, 6)
    torch.testing.assert_close(conv(norm(x)).var(), torch.tensor(1.0).double(), rtol=0.03, atol=0)
    torch.testing.assert_close(conv(x).var(), x.var(), rtol=0.03, atol=0)
    residual = make_residual({"kind": "scaled_ws", "residual_scale": 0.5})
    assert torch.equal(residual(x, norm(x)), x)
    nn.init.ones_(residual.gain)
    torch.testing.assert_close(residual(x, x), 1.5 * x)


@pytest.mark.parametrize("kind", ["pixel", "magnitude_preserving"])
def test_magnitudes_are_kept(draw, kind):
    def magnitude(x):
        return float(x.detach().square().mean().sqrt())

    conv = make_conv({"kind": kind}, 128, 256, 3).double()
    norm = make_norm({"kind": kind}, 128, activation="silu")
    residual = make_residual({"kind": kind, "residual_balance": 0.4})
    x, h = draw(8, 128, 6, 6), draw(8, 128, 6, 6, seed=1)
    # A convolution keeps the magnitude of uncorrelated input; SiLU's output, which has a mean, is not such input.
    assert magnitude(conv(x)) == pytest.approx(1, abs=0.02)
    assert magnitude(norm(x)) == pytest.approx(1, abs=0.02)
    assert magnitude(residual(x, h)) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(residual(x, h), (0.6 * x + 0.4 * h) / math.sqrt(0.52))


def test_force_weight_norm_changes_weights_and_no_outputs(draw):
    linear = make_linear({"kind": "magnitude_preserving"}, 7, 6).double()
    model = nn.Sequential(make("pixel", 4, 6, 3), make("none", 6, 4, 3), nn.AdaptiveAvgPool2d((1, 7)), linear)
    x, plain = draw(2, 4, 7, 7), model[1].weight.detach().clone()
    with torch.no_grad():
        for layer in (model[0], linear):
            layer.weight.mul_(torch.linspace(0.1, 10, 6).view(-1, *[1] * (layer.weight.dim() - 1)))
    y = model(x)
    force_weight_norm(model)
    for layer in (model[0], linear):
        torch.testing.assert_close(layer.weight.flatten(1).square().mean(1), torch.ones(6).double())
    torch.testing.assert_close(model(x), y)
    assert torch.equal(model[1].weight, plain)


def test_other_residuals_are_sums(draw):
    x, h = draw(2, 4, 3), draw(2, 4, 3, seed=1)
    for kind in set(NORMS) - {"scaled_ws", "pixel", "magnitude_preserving"}:
        residual = make_residual({"kind": kind})
        assert torch.equal(residual(x, h), x + h)
        assert not residual.state_dict()


def test_concat_norm_normalizes_parts_separately(draw):
    def concat(config, activation="silu"):
        return ConcatNorm([make_norm(config, channels, activation=activation) for channels in (8, 4)])

    norm = concat({"channels_per_group": 4}).double()
    x, tables = draw(2, 12, 3, 5), [draw(2, 12, seed=seed) for seed in range(1, 4)]
    y = norm(x, **dict(zip(("add", "scale", "shift"), tables, strict=True)))
    for part, channels in zip(norm.parts, (slice(0, 8), slice(8, 12)), strict=True):
        add, scale, shift = (table[:, channels] for table in tables)
        torch.testing.assert_close(y[:, channels], part(x[:, channels], add=add, scale=scale, shift=shift))
    assert [part.num_groups for part in norm.parts] == [2, 1]
    assert (norm.num_channels, norm.activation, norm.batch_dependent, norm.has_state) == (12, "silu", False, False)
    batch = concat({"kind": "batch"}, activation=None)
    assert batch.batch_dependent and batch.has_state and not batch.is_pointwise
    with pytest.raises(ValueError, match="groups = 8 does not divide 4 channels"):
        concat({"groups": 8})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_conv({"kind": "wn"}, 4, 4, 3), "kind.*'wn'"),
        (lambda: make_conv({}, 4, 4, 3, ndim=4), "ndim.*4"),
        (lambda: make_residual({"kind": "pixel", "residual_balance": 1}), "residual_balance.*got 1"),
        (lambda: make_residual({"mode": "sum"}), "'mode'"),
    ],
)
def test_invalid_configs_are_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


LEVELS = [[0.0, 1.0, 0.0], [400.0, 0.6, 0.4], [1000.0, 0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_networks_input_is_divided_by_its_standard_deviation(draw, dtype):
    norm = {"kind": "scaled_ws", "data_std": 0.25, "sample_levels": LEVELS}
    scale, conv = make_input(norm, 5, 8, image_channels=3)
    assert list(scale.state_dict()) == []
    first, second, last = 0.25, math.hypot(0.6 * 0.25, 0.4), 1.0
    timestep = torch.tensor([-1.0, 0.0, 100.0, 400.0, 700.0, 1000.0, 2000.0])
    stds = torch.tensor([first, first, 0.75 * first + 0.25 * second, second, (second + last) / 2, last, last])
    torch.testing.assert_close(scale.to(dtype).expected_std(timestep), stds)  # not rounded with the model
    x = draw(7, 5, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    y = torch.compile(scale, fullgraph=True, backend="aot_eager")(x, timestep)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y[:, :3], (x[:, :3].float() / stds[:, None, None, None]).to(dtype), rtol=1e-2, atol=0)
    torch.testing.assert_close(y[:, 3:], x[:, 3:] * 4)  # what is concatenated is as clean as data
    torch.testing.assert_close(conv(y.float()).shape, torch.Size([7, 8, 4, 4]))


def test_magnitude_preserving_ends(draw):
    """Input with a constant channel, that stands for a bias; linear layers; conditioning and output begin at 0."""
    norm = {"kind": "magnitude_preserving"}
    scale, conv = make_input(norm, 3, 64, image_channels=3)
    x = draw(4, 3, 32, 32).float()
    y = scale(x, torch.zeros(4))
    assert torch.equal(y, torch.cat([x, torch.ones(4, 1, 32, 32)], dim=1))
    assert conv(y)[:, :, 1:-1, 1:-1].square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
    linear, gained = (make_linear(norm, 64, 32, zero_gain=zero) for zero in (False, True))
    tokens = draw(100, 64).float()
    weight = linear.weight / linear.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(linear(tokens), tokens @ weight.T)
    assert not gained(tokens).any() and not make_output(norm, 64, 3)(conv(y)).any()
    nn.init.constant_(gained.gain, 2.0)
    assert gained(tokens).square().mean().sqrt().item() == pytest.approx(2, abs=0.2)
    assert type(make_linear({"kind": "scaled_ws"}, 4, 4)) is nn.Linear
