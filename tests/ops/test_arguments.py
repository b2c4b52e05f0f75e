"""Invalid arguments of the operator and their errors, and the module."""

import logging
import sys

import pytest
import torch
from torch import nn

from gnunet.ops import GroupNormSiLU, group_norm_silu

module = sys.modules[group_norm_silu.__module__]
X = torch.zeros(2, 6, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_groups": 4}, ValueError, r"num_groups .* 4, .*\[1, 2, 3, 6\]"),
        ({"num_groups": 2.0}, TypeError, r"num_groups .* 2\.0"),
        ({"num_groups": torch.tensor(2)}, TypeError, "num_groups .* tensor"),
        ({"eps": torch.tensor(1e-5)}, TypeError, "eps .* tensor"),
        ({"num_groups": 0}, ValueError, "num_groups .* 0"),
        ({"x": X[0, 0, 0]}, ValueError, r"x .* \(4,\)"),
        ({"x": X.int()}, TypeError, "x .* float32, bfloat16, float16, float64; .*int32"),
        ({"weight": torch.ones(5)}, ValueError, r"weight .* \(6,\); .*\(5,\)"),
        ({"add": torch.ones(6)}, ValueError, r"add .* \(2, 6\)"),
        ({"bias": torch.ones(6).int()}, TypeError, "bias .*int32"),
        ({"bias": torch.ones(6, device="meta")}, ValueError, "bias .* device"),
        ({"activation": "gelu"}, ValueError, "activation .* 'gelu'"),
        ({"backend": "fastest"}, ValueError, "backend .* 'cuda'.* 'fastest'"),
    ],
)
def test_invalid_arguments_are_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        group_norm_silu(**{"x": X, "num_groups": 2, **arguments})


def test_auto_logs_its_backend_once(caplog, monkeypatch):
    monkeypatch.setattr(module, "_announced", set())
    with caplog.at_level(logging.INFO, logger="gnunet"):
        group_norm_silu(X, 2)
        group_norm_silu(X, 2)
    (record,) = caplog.records
    assert "backend 'auto' is 'eager' on cpu" in record.message


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
    assert list(GroupNormSiLU(3, 6, bias=False).state_dict()) == ["weight"]
    assert GroupNormSiLU(3, 6, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [{"num_groups": 4}, {"activation": "relu"}, {"backend": "fastest"}])
def test_invalid_arguments_of_the_module_are_errors(wrong):
    with pytest.raises(ValueError):
        GroupNormSiLU(**{"num_groups": 3, "num_channels": 6, **wrong})


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"IS_INTERPRETED": False}, "needs a tensor on a GPU, got one on cpu"),
        ({"HAS_COMPILER": False}, "needs a C compiler"),
        ({"INTERPRETER_FAILS": True}, "install triton >= 3.7, or numpy < 2.4"),
    ],
)
def test_triton_that_cannot_run_is_an_error(monkeypatch, state, reason):
    launch = pytest.importorskip("gnunet.ops.triton_kernels.launch", reason="needs Triton")
    monkeypatch.setattr(module, "_prepared", {})
    for name, value in {"IS_INTERPRETED": True, "INTERPRETER_FAILS": False, **state}.items():
        monkeypatch.setattr(launch, name, value)
    with pytest.raises(ValueError, match=f"'triton' .*{reason}"):
        group_norm_silu(X, 2, backend="triton")


def test_triton_that_is_not_installed_is_an_error_and_not_needed(monkeypatch):
    monkeypatch.setattr(module, "_prepared", {})
    monkeypatch.setitem(module.BACKENDS, "triton", None)
    with pytest.raises(ValueError, match="'triton' needs the package triton"):
        group_norm_silu(X, 2, backend="triton")
    group_norm_silu(X, 2)
