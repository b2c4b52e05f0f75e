"""Small diffusers models with weights in which every error shows, and all that one training step gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn


@pytest.fixture
def randomized() -> Callable[[nn.Module], nn.Module]:
    """Makes no norm the identity and no output zero; returns the model."""

    def randomize(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() == 1:
                    noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                    p.copy_(noise * 0.5 + name.endswith("weight"))
                elif not p.any():
                    p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
        return model

    return randomize


@pytest.fixture
def run() -> Callable[..., dict[str, Tensor]]:
    """run(model, call): the outputs of call(model, randn), and the gradients of all parameters by name."""

    def run(model: nn.Module, call: Callable[..., Any]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(2)  # dropout
        dtype = next(model.parameters()).dtype

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        outputs = _tensors(call(model, randn))
        names, parameters = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(outputs, parameters, [randn(*o.shape) for o in outputs], allow_unused=True)
        results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        return results | {n: g for n, g in zip(names, grads, strict=True) if g is not None}

    return run


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Each tensor within `rtol` of its norm, or of the mean norm: small gradients are sums that cancel."""

    def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
        assert found.keys() == expected.keys()
        mean = sum(float(e.norm()) for e in expected.values()) / len(expected)
        for name, e in expected.items():
            error = float((found[name] - e).norm())
            assert error <= rtol * max(float(e.norm()), mean), f"{name}: {error}"

    return assert_same


@pytest.fixture
def unet(randomized) -> UNet2DModel:
    """8 residual blocks, 4 attentions: 17 pairs."""
    return randomized(
        UNet2DModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
    )


@pytest.fixture
def call() -> Callable[..., Tensor]:
    """What to do with `unet`."""
    return lambda model, randn: model(randn(2, 3, 8, 8), torch.tensor([3, 500])).sample


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a model's output, and the means of distributions."""
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "parameters"):
        return [value.parameters]
    return [tensor for part in (value.values() if isinstance(value, dict) else value) for tensor in _tensors(part)]
