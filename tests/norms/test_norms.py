"""The norm layers that a config names."""

import subprocess
import sys
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from gnunet.norms import NORMS, kind_of, make_norm
from gnunet.ops import backend_names

X = torch.randn(3, 12, 6, 6, generator=torch.Generator().manual_seed(0))


def test_channels_per_group_takes_precedence_over_groups():
    layer = make_norm({"kind": "group", "groups": 5, "channels_per_group": 3}, 12, activation=None)
    torch.testing.assert_close(layer(X), F.group_norm(X, 4))


@pytest.mark.parametrize("kind", ["group", "group_rms"])
def test_backends_agree_and_have_the_same_parameters(kind):
    eager, reference = (
        make_norm({"kind": kind, "groups": 4, "backend": backend}, 12, activation="silu")
        for backend in ("eager", "reference")
    )
    assert (eager.backend, reference.backend) == ("eager", "reference")
    assert eager.state_dict().keys() == reference.state_dict().keys()
    torch.testing.assert_close(eager(X), reference(X))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"groups": 5}, ["groups = 5", "12 channels", "1, 2, 3, 4, 6, 12"]),
        ({"groups": 0}, ["groups", "got 0"]),
        ({"groups": None}, ["groups", "channels_per_group"]),
        ({"channels_per_group": 8}, ["channels_per_group = 8", "12 channels"]),
        ({"kind": "evonorm_s0", "channels_per_group": True}, ["channels_per_group", "got True"]),
        ({"kind": "batch_norm"}, ["group, layer, instance, none", "'batch_norm'"]),
        ({"kind": ["group"]}, ["group, layer, instance, none", "['group']"]),
        ({"group": 4}, ["'group'", "groups"]),
        ({"groups": 4, "backend": "fastest"}, ["backend", "auto", "'fastest'"]),
        ({"kind": "rms", "eps": 0}, ["eps", "greater than 0", "got 0"]),
        ({"kind": "layer", "eps": "1e-5"}, ["eps", "number", "got '1e-5'"]),
        ({"kind": "batch", "momentum": 1.5}, ["momentum", "less than or equal to 1", "got 1.5"]),
        ({"kind": "ghost_batch", "ghost_size": 0}, ["ghost_size", "greater than 0", "got 0"]),
        ({"kind": "batch_renorm", "r_max": 0.5}, ["r_max", "greater than or equal to 1", "got 0.5"]),
        ({"kind": "batch_renorm", "renorm_warmup": 0.5}, ["renorm_warmup", "integer", "0.5"]),
        ({"kind": "scaled_ws", "residual_scale": float("nan")}, ["residual_scale", "finite", "nan"]),
        ({"kind": "pixel", "residual_balance": 1}, ["residual_balance", "less than 1", "got 1"]),
    ],
)
def test_invalid_configs_are_errors_that_name_key_value_and_valid_values(config, words):
    with pytest.raises(ValueError) as error:
        make_norm(config, 12, activation="silu")
    assert all(word in str(error.value) for word in words), error.value


def test_options_of_other_kinds_are_ignored():
    """So that an override can change the kind alone."""
    make_norm({"kind": "layer", "groups": 7, "momentum": -1}, 12, activation="silu")


def test_options_are_the_constructors_arguments():
    assert list(NORMS["ghost_batch"].options()) == ["eps", "momentum", "ghost_size"]
    assert list(NORMS["pixel"].options()) == ["eps", "residual_balance", "data_std", "sample_levels"]
    assert list(get_args(NORMS["group"].options()["backend"].annotation.__origin__)) == backend_names()
    for kind, norm in NORMS.items():
        layer = make_norm({"kind": kind, "groups": 4}, 12, activation="silu")
        assert type(layer) is norm and kind_of(layer) == kind


def test_ops_and_norms_import_nothing_else_of_gnunet():
    program = (
        "import sys\n"
        "def rooms(): return {name.split('.')[1] for name in sys.modules if name.startswith('gnunet.')}\n"
        "import gnunet.ops\n"
        "assert rooms() == {'ops'}, rooms()\n"
        "import gnunet.norms\n"
        "assert rooms() == {'norms', 'ops'}, rooms()\n"
        "assert not {'diffusers', 'accelerate', 'pydantic'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
