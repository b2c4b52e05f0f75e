"""timm's layers, where timm is installed."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from gnunet.norms import make_conv


@pytest.fixture(scope="module")
def layers():
    """timm.layers without the rest of timm, and without torchvision, of which it only imports a class by name."""
    if (spec := importlib.util.find_spec("timm")) is None:
        pytest.skip("timm is not installed")
    package = ModuleType("timm")
    package.__path__ = spec.submodule_search_locations
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "timm", package)
        for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
            patch.setitem(sys.modules, name, SimpleNamespace(FrozenBatchNorm2d=torch.nn.BatchNorm2d))
        yield importlib.import_module("timm.layers")


@pytest.mark.parametrize(
    ("kind", "timm_layer", "names"),
    [
        ("evonorm_s0", "EvoNorm2dS0", {"gate": "v"}),
        ("frn", "FilterResponseNormTlu2d", {"threshold": "tau"}),
        ("rms", "RmsNorm2d", {}),
        ("layer_channel", "LayerNorm2d", {}),
        ("group", "GroupNormAct", {}),
        ("batch", "BatchNormAct2d", {}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_norms(layers, make_layer, draw, kind, timm_layer, names, training):
    activation = None if kind in ("rms", "layer_channel") else "silu"
    layer = make_layer(kind, activation=activation).train(training)
    options = {"group": {"num_groups": 4}, "evonorm_s0": {"groups": 4}}.get(kind, {})
    options |= {"act_layer": torch.nn.SiLU} if kind in ("group", "batch") else {}
    other = getattr(layers, timm_layer)(12, eps=1e-3, **options).double().train(training)
    other.load_state_dict({names.get(name, name): value for name, value in layer.state_dict().items()})
    x = draw(4, 12, 3, 5, mean=0.5)
    torch.testing.assert_close(layer(x), other(x))
    torch.testing.assert_close(list(layer.buffers()), list(other.buffers()))


@pytest.mark.parametrize(
    ("kind", "timm_layer"), [("weight_standardization", "StdConv2d"), ("scaled_ws", "ScaledStdConv2d")]
)
def test_convolutions(layers, draw, kind, timm_layer):
    conv = make_conv({"kind": kind}, 4, 6, 3, padding=1).double()
    other = getattr(layers, timm_layer)(4, 6, 3, padding=1, bias=True, eps=1e-12).double()
    state = {name: value.view_as(other.state_dict()[name]) for name, value in conv.state_dict().items()}
    other.load_state_dict(state)
    x = draw(2, 4, 5, 5)
    y = other(x)
    if kind == "weight_standardization":  # ours is divided by the root of the fan-in
        bias = conv.bias[:, None, None]
        y = (y - bias) / 6 + bias
    torch.testing.assert_close(conv(x), y)
