"""What the operator refuses, how it says so, and the module."""

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

from gnunet.ops import GroupNormSiLU, group_norm_silu

X = torch.zeros(2, 6, 4, 4)
GIVEN = {"x": X, "num_groups": 2}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X, "num_groups": 4}, ValueError, r"6 channels; got 4, valid are \[1, 2, 3, 6\]"),
        ({"x": X, "num_groups": 2.0}, TypeError, r"num_groups must be an integer; got 2\.0"),
        ({"x": X, "num_groups": torch.tensor(2)}, TypeError, r"num_groups must be an integer; got tensor"),
        ({"x": X, "num_groups": 2, "eps": torch.tensor(1e-5)}, TypeError, r"eps must be a number; got tensor"),
        ({"x": X, "num_groups": 0}, ValueError, "got 0"),
        ({"x": X[0, 0, 0], "num_groups": 1}, ValueError, r"got shape \(4,\)"),
        ({"x": X[..., None, None, None], "num_groups": 1}, ValueError, "0 to 3 spatial"),
        ({"x": X.int(), "num_groups": 2}, TypeError, "float32, bfloat16, float16, float64; got torch.int32"),
        ({**GIVEN, "weight": torch.ones(5)}, ValueError, r"must have shape \(6,\); got \(5,\)"),
        ({**GIVEN, "add": torch.ones(6)}, ValueError, r"add must have shape \(2, 6\)"),
        ({**GIVEN, "bias": torch.ones(6).int()}, TypeError, "bias must be one of .* torch.int32"),
        ({**GIVEN, "bias": torch.ones(6, device="meta")}, ValueError, "bias must be on x's device"),
        ({**GIVEN, "activation": "gelu"}, ValueError, r"\['silu', None\]; got 'gelu'"),
        ({**GIVEN, "backend": "fastest"}, ValueError, r"'cuda'\]; got 'fastest'"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        group_norm_silu(**arguments)


def test_auto_says_once_what_it_is(caplog, monkeypatch):
    monkeypatch.setattr(sys.modules[group_norm_silu.__module__], "_announced", set())
    with caplog.at_level(logging.INFO, logger="gnunet"):
        group_norm_silu(X, 2)
        group_norm_silu(X, 2)
    said = [record.message for record in caplog.records]
    assert said == ["group_norm_silu: backend 'auto' is 'eager' on cpu"]


def test_module_is_group_norm_with_silu():
    x, norm = torch.randn(2, 6, 4, 4), nn.GroupNorm(3, 6, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer = GroupNormSiLU(3, 6, eps=1e-3)
    layer.load_state_dict(norm.state_dict())
    torch.testing.assert_close(layer(x), nn.functional.silu(norm(x)))
    layer = GroupNormSiLU(3, 6, activation=None, center=False)
    torch.testing.assert_close(layer(x), group_norm_silu(x, 3, activation=None, center=False))
    assert "center=False" in repr(layer)
    assert list(GroupNormSiLU(3, 6, affine=False).parameters()) == []
    assert GroupNormSiLU(3, 6, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [{"num_groups": 4}, {"activation": "relu"}, {"backend": "fastest"}])
def test_module_refuses(wrong):
    with pytest.raises(ValueError):
        GroupNormSiLU(**{"num_groups": 3, "num_channels": 6, **wrong})


def test_triton_says_what_it_lacks(monkeypatch):
    module = sys.modules[group_norm_silu.__module__]
    monkeypatch.setattr(module, "_prepared", {})
    if module.BACKENDS["triton"] is not None:
        monkeypatch.setattr(module.triton_launch, "IS_INTERPRETED", False)
        with pytest.raises(ValueError, match="'triton' needs a tensor on a GPU, got one on cpu"):
            group_norm_silu(X, 2, backend="triton")
        monkeypatch.setattr(module.triton_launch, "IS_INTERPRETED", True)
        monkeypatch.setattr(module.triton_launch, "HAS_COMPILER", False)
        with pytest.raises(ValueError, match="'triton' needs a C compiler"):
            group_norm_silu(X, 2, backend="triton")
        monkeypatch.setattr(module.triton_launch, "INTERPRETER_FAILS", True)
        with pytest.raises(ValueError, match="install triton >= 3.7, or numpy < 2.4"):
            group_norm_silu(X, 2, backend="triton")
    monkeypatch.setitem(module.BACKENDS, "triton", None)
    with pytest.raises(ValueError, match="'triton' needs the package triton"):
        group_norm_silu(X, 2, backend="triton")
    group_norm_silu(X, 2)


def test_ops_stand_alone():
    """They import nothing of the rest but what `import gnunet` does, nor what the rest needs."""
    program = (
        "import sys, gnunet.ops\n"
        "own = {name.split('.')[1] for name in sys.modules if name.startswith('gnunet.')}\n"
        "assert own == {'ops'}, own\n"
        "assert not {'diffusers', 'accelerate', 'pydantic'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
