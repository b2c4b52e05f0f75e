"""The published formulas in float64, written apart from the layers, which are measured against them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gnunet.norms import make_norm

GROUPS, GHOST, R_MAX, D_MAX, INPUT_STD, EPS = 4, 2, 1.2, 0.3, 1.5, 1e-3
OPTIONS = {
    "groups": GROUPS, "ghost_size": GHOST, "r_max": R_MAX, "d_max": D_MAX, "input_std": INPUT_STD, "eps": EPS
}  # fmt: skip


def _rows(u: Tensor, axes: str) -> Tensor:
    """(N, C, *spatial) -> (sets, elements), float64; each letter of axes, of n, c and p, is taken together."""
    u = u.reshape(*u.shape[:2], -1)
    order = [i for i, axis in enumerate("ncp") if axis not in axes] + [i for i, a in enumerate("ncp") if a in axes]
    return u.permute(order).reshape(-1, math.prod(u.shape["ncp".index(axis)] for axis in axes))


def _back(rows: Tensor, u: Tensor, axes: str) -> Tensor:
    """The inverse of _rows."""
    shape = dict(zip("ncp", (*u.shape[:2], u.shape[2:].numel()), strict=True))
    order = [a for a in "ncp" if a not in axes] + [a for a in "ncp" if a in axes]
    return rows.reshape([shape[a] for a in order]).permute([order.index(a) for a in "ncp"]).reshape(u.shape)


def _standard(u: Tensor, axes: str) -> Tensor:
    rows = _rows(u, axes)
    mean = rows.sum(1, keepdim=True) / rows.shape[1]
    variance = ((rows - mean) ** 2).sum(1, keepdim=True) / rows.shape[1]
    return _back((rows - mean) / (variance + EPS).sqrt(), u, axes)


def _root_mean_square(u: Tensor, axes: str) -> Tensor:
    rows = _rows(u, axes)
    return _back((((rows**2).sum(1, keepdim=True) / rows.shape[1]) + EPS).sqrt().expand_as(rows), u, axes)


def _by_groups(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    return torch.cat([function(part) for part in u.chunk(GROUPS, dim=1)], dim=1)


def _column(table: Tensor, u: Tensor) -> Tensor:
    return table.reshape(-1, u.shape[1], *(1,) * (u.dim() - 2))


def _running(u: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return _column(p["running_mean"], u), _column(p["running_var"], u)


def _batch(u: Tensor, p: dict[str, Tensor], training: bool) -> Tensor:
    if training:
        return _standard(u, "np")
    mean, variance = _running(u, p)
    return (u - mean) / (variance + EPS).sqrt()


def _ghost(u: Tensor, p: dict[str, Tensor], training: bool) -> Tensor:
    if training:
        return torch.cat([_standard(part, "np") for part in u.split(GHOST)])
    return _batch(u, p, training)


def _renorm(u: Tensor, p: dict[str, Tensor], training: bool) -> Tensor:
    if not training:
        return _batch(u, p, training)
    mean, variance = _running(u, p)
    rows = _rows(u.detach(), "np")
    batch_sigma = _column((rows.var(1, correction=0) + EPS).sqrt(), u)
    sigma = (variance + EPS).sqrt()
    r = (batch_sigma / sigma).clip(1 / R_MAX, R_MAX)
    d = ((_column(rows.mean(1), u) - mean) / sigma).clip(-D_MAX, D_MAX)
    return _standard(u, "np") * r + d


def _switchable(u: Tensor, p: dict[str, Tensor], training: bool) -> Tensor:
    means, variances = [], []
    for axes in ("p", "cp", "np"):
        rows = _rows(u, axes)
        means.append(_back(rows.mean(1, keepdim=True).expand_as(rows), u, axes))
        variances.append(_back(rows.var(1, correction=0, keepdim=True).expand_as(rows), u, axes))
    if not training:
        means[2], variances[2] = _running(u, p)
    mean = sum(w * m for w, m in zip(p["mean_logits"].exp(), means, strict=True)) / p["mean_logits"].exp().sum()
    logits = p["variance_logits"]
    variance = sum(w * v for w, v in zip(logits.exp(), variances, strict=True)) / logits.exp().sum()
    return (u - mean) / (variance + EPS).sqrt()


def _evonorm(u: Tensor, p: dict[str, Tensor], training: bool) -> Tensor:
    numerator = u / (1 + torch.exp(-_column(p["gate"], u) * u)) if "gate" in p else u

    def deviation(part: Tensor) -> Tensor:
        rows = _rows(part, "cp")
        return _back((rows.var(1, correction=0, keepdim=True) + EPS).sqrt().expand_as(rows), part, "cp")

    return numerator / _by_groups(deviation, u)


NORMALIZED: dict[str, Callable[[Tensor, dict[str, Tensor], bool], Tensor]] = {
    "group": lambda u, p, training: _by_groups(lambda part: _standard(part, "cp"), u),
    "layer": lambda u, p, training: _standard(u, "cp"),
    "instance": lambda u, p, training: _standard(u, "p"),
    "none": lambda u, p, training: u,
    "group_rms": lambda u, p, training: u / _by_groups(lambda part: _root_mean_square(part, "cp"), u),
    "layer_channel": lambda u, p, training: _standard(u, "c"),
    "rms": lambda u, p, training: u / _root_mean_square(u, "c"),
    "batch": _batch,
    "sync_batch": _batch,
    "ghost_batch": _ghost,
    "batch_renorm": _renorm,
    "switchable": _switchable,
    "weight_norm": lambda u, p, training: u,
    "weight_standardization": lambda u, p, training: _by_groups(lambda part: _standard(part, "cp"), u),
    "scaled_ws": lambda u, p, training: u / INPUT_STD,
    "frn": lambda u, p, training: u / _root_mean_square(u, "p"),
    "evonorm_s0": _evonorm,
    "pixel": lambda u, p, training: u / _root_mean_square(u, "c"),
    "magnitude_preserving": lambda u, p, training: u,
    "dyt": lambda u, p, training: torch.tanh(p["alpha"] * u),
    "derf": lambda u, p, training: torch.erf(p["alpha"] * u + p["offset"]),
}
"""From u and the layer's parameters and buffers to what the affine takes."""


def _silu(w: Tensor) -> Tensor:
    return w / (1 + torch.exp(-w))


def _activated(kind: str, w: Tensor, p: dict[str, Tensor]) -> Tensor:
    if kind == "frn":
        return torch.maximum(w, _column(p["threshold"], w))
    if kind == "evonorm_s0":
        return w
    if kind in ("pixel", "magnitude_preserving"):
        return _silu(w) / _moment_of_silu(2) ** 0.5
    if kind == "scaled_ws":
        return _silu(w) / (_moment_of_silu(2) - _moment_of_silu(1) ** 2) ** 0.5
    return _silu(w)


def _moment_of_silu(power: int) -> float:
    """E[silu(z)^power], z standard normal, by the trapezoidal rule."""
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(_silu(z) ** power * density, z))


def _exact(kind: str, x: Tensor, values: dict[str, Tensor], *, activation: str | None, training: bool) -> Tensor:
    """What a layer should give, in float64. values: its parameters and buffers; add, scale, shift where given."""
    u = x + _column(values["add"], x) if "add" in values else x
    w = NORMALIZED[kind](u, values, training)
    for name in ("weight", "scale"):
        if name in values:
            w = w * _column(values[name] + (name == "scale"), w)
            if name == "weight" and "bias" in values:
                w = w + _column(values["bias"], w)
    if "shift" in values:
        w = w + _column(values["shift"], w)
    return w if activation is None else _activated(kind, w, values)


def _make_layer(
    kind: str, num_channels: int = 12, *, activation: str | None = "silu", seed: int = 0, **options: Any
) -> nn.Module:
    """A float64 layer with random parameters and running statistics."""
    layer = make_norm({"kind": kind, **OPTIONS, **options}, num_channels, activation=activation).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
            if value.is_floating_point():
                center = 1.0 if name in ("weight", "running_var", "gate", "alpha") else 0.0
                value.copy_(center + 0.3 * torch.rand(value.shape, generator=generator).to(value))
    return layer


# Test modules cannot import from here under pytest's importlib mode, so the helpers are fixtures.


@pytest.fixture(scope="session")
def exact() -> Callable[..., Tensor]:
    return _exact


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., nn.Module]:
    return _make_layer


@pytest.fixture(scope="session")
def draw() -> Callable[..., Tensor]:
    """draw(*shape, seed=0, mean=0.0) -> float64 numbers of standard deviation 1."""

    def numbers(*shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return mean + torch.randn(shape, generator=generator, dtype=torch.float64)

    return numbers
