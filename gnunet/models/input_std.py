"""The expected standard deviation of each norm layer's input, for norms without statistics."""

from __future__ import annotations

from math import sqrt

from torch import nn

from .attention import Attention
from .blocks import ResnetBlock


def set_input_std(model: nn.Module) -> None:
    """Set `input_std` in those layers of a UNet2D that have it (scaled_ws).

    From 1 after the first convolution, it grows with every residual sum: a block's first norm takes what the sums so
    far have added. A block's second norm has 1, since the convolution between them takes a normalized input.
    Convolutions and changes of resolution keep the variance; a concatenation has the mean over its channels.
    """
    variance = 1.0
    skips = [variance]
    for block in model.down_blocks:
        for j, resnet in enumerate(block.resnets):
            variance = _through(resnet, variance)
            if block.attentions:
                variance = _through(block.attentions[j], variance)
            skips.append(variance)
        for downsample in block.downsamplers:
            variance = _through(downsample, variance)
            skips.append(variance)
    if model.mid_block is not None:
        first, second = model.mid_block.resnets
        for layer in (first, *model.mid_block.attentions, second):
            variance = _through(layer, variance)
    for block in model.up_blocks:
        for j, resnet in enumerate(block.resnets):
            variance = (1 - resnet.skip_fraction) * variance + resnet.skip_fraction * skips.pop()
            variance = _through(resnet, variance)
            if block.attentions:
                variance = _through(block.attentions[j], variance)
        for upsample in block.upsamplers:
            variance = _through(upsample, variance)
    _set(model.conv_norm_out, variance)


def _through(layer: nn.Module, variance: float) -> float:
    """Set a layer's input_std, and return the variance of its output."""
    if not isinstance(layer, (ResnetBlock, Attention)):
        return variance
    _set(layer.norm1 if isinstance(layer, ResnetBlock) else layer.group_norm, variance)
    added = getattr(layer.residual, "scale", 1.0) ** 2
    return (variance + added) / layer.output_scale_factor**2


def _set(norm: nn.Module | None, variance: float) -> None:
    for layer in norm.modules() if norm is not None else ():
        if hasattr(layer, "input_std"):
            layer.input_std = sqrt(variance)
