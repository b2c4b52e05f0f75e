"""How large the signal in front of each norm layer of a U-Net is, for norms without statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

from gnunet.norms import NORMS

from .block_specs import block_specs
from .norm_sites import NormSite


def with_input_std(config: Mapping[str, Any], sites: Iterable[NormSite]) -> list[NormSite]:
    """The sites with the standard deviation of the layer's input as `input_std` in their norm configs.

    From 1 behind the first convolution, in front of a block's first norm it is what the residual sums so far
    have added; in front of its second norm it is 1, since the convolution between them gets a normalized input.
    """
    sites = list(sites)
    stds = _block_input_stds(config, {site.path: site.norm for site in sites})
    return [replace(site, norm={**site.norm, "input_std": stds.get(site.path, 1.0)}) for site in sites]


def _block_input_stds(config: Mapping[str, Any], norms: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The standard deviations of what residual blocks, attention and the last norm get, by the norm's path.

    Convolutions and changes of resolution keep the variance; a concatenation has the mean over its channels.
    """
    variance, stds = 1.0, {}
    skips = [variance]
    for block in block_specs(config):
        downwards = block.path.startswith("down")
        rescale = config["mid_block_scale_factor"] if block.path == "mid_block" else 1
        layers = [[f"resnets.{j}.norm1"] for j in range(len(block.resnets))]
        for j in range(block.attentions):
            layers[j].append(f"attentions.{j}.group_norm")
        if block.resample == "resnet":
            layers.append(["downsamplers.0.norm1" if downwards else "upsamplers.0.norm1"])
        elif block.resample == "conv":
            layers.append([])
        for j, names in enumerate(layers):
            if j < len(block.skips) and block.skips[j]:
                share = block.skips[j] / block.resnets[j][0]
                variance = (1 - share) * variance + share * skips.pop()
            for path in (f"{block.path}.{name}" for name in names):
                stds[path] = sqrt(variance)
                variance = (variance + _added_variance(norms[path])) / rescale**2
            if downwards:
                skips.append(variance)
    return {**stds, "conv_norm_out": sqrt(variance)}


def _added_variance(norm: Mapping[str, Any]) -> float:
    """What the sum at the end of a residual block adds: the square of the scale that it gives to a branch."""
    option = NORMS[norm["kind"]].block_options.get("residual_scale")
    scale: float = 1.0 if option is None else norm.get("residual_scale", option.default)
    return scale**2
