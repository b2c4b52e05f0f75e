"""Which norm config goes where in a U-Net, worked out from the model's config before any layer is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from torch import nn

from gnunet.norms import check_norm, make_norm, make_split_norm, valid_groups

from .block_specs import BlockSpec, block_specs

MODEL_KEYS = ("overrides", "separate_skip_norm")
"""Keys of a model's norm config that are no layer's: see UNet2D."""
_REGIONS = {"down_blocks": "encoder", "mid_block": "middle", "up_blocks": "decoder"}


@dataclass(frozen=True)
class NormSite:
    """A place in the model, and the norm config that decides there: on a norm layer, the convolutions, the sum.

    path: of the norm layer; of the layer, where that is a convolution which changes the resolution. parts: the
    channels of the norm layer, several numbers where it normalizes the parts of a concatenation apart, none where
    there is no norm layer.
    """

    path: str
    parts: tuple[int, ...]
    norm: Mapping[str, Any]

    @property
    def layers(self) -> list[tuple[str, int]]:
        """(path, channels) of each layer with statistics of its own."""
        if len(self.parts) > 1:
            return [(f"{self.path}.parts.{i}", channels) for i, channels in enumerate(self.parts)]
        return [(self.path, channels) for channels in self.parts]

    def build(self, activation: str | None) -> nn.Module | None:
        """The norm layer, if there is one."""
        if len(self.parts) > 1:
            return make_split_norm(self.norm, self.parts, activation=activation)
        return make_norm(self.norm, *self.parts, activation=activation) if self.parts else None


def plan_norms(config: Mapping[str, Any]) -> list[NormSite]:
    """All sites, in the order in which they run, for a config that has all of UNet2D's keys.

    A site's config is `norm`, completed from norm_num_groups and norm_eps, with what `norm.overrides` has for its
    resolution, then for its part of the network, then for attention.
    """
    norm = {"kind": "group", "groups": config["norm_num_groups"], "eps": config["norm_eps"], **(config["norm"] or {})}
    overrides = norm.pop("overrides", None) or {}
    mid_groups = config["attn_norm_num_groups"]
    sites = []
    for path, parts, regions in _places(config):
        merged = dict(norm)
        for region in regions:
            merged |= _in_place_of_groups(overrides.get(region, {}))
        if mid_groups is not None and path.startswith("mid_block.attentions"):
            merged |= _in_place_of_groups({"groups": mid_groups})
        if not merged.pop("separate_skip_norm", False) and parts:
            parts = (sum(parts),)
        sites.append(NormSite(path, parts, merged))
    return sites


def check_norms(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the norms of a config that has all of UNet2D's keys, in words, or None."""
    error = _check_model_keys(config)
    if error:
        return error
    sites = plan_norms(config)
    channels_of_all = [channels for site in sites for _, channels in site.layers]
    hints = {
        "does not divide": f"; all norm layers can take {', '.join(map(str, valid_groups(gcd(*channels_of_all))))}",
        "unknown key": f", {', '.join(MODEL_KEYS)}",
    }
    for site in sites:
        for path, channels in site.layers:
            error = check_norm(site.norm, channels)
            if error:
                return f"norm of {path}: {error}{''.join(text for words, text in hints.items() if words in error)}"
            if "input_std" in site.norm:
                return f"norm of {path}: input_std is worked out for each layer of a U-Net; leave it out"
    return None


def _check_model_keys(config: Mapping[str, Any]) -> str | None:
    norm = config["norm"] or {}
    overrides = norm.get("overrides")
    if overrides is None:
        overrides = {}
    if not isinstance(overrides, Mapping):
        return f"norm.overrides must map regions to norm configs; got {overrides!r}"
    found = {region for _, parts, regions in _places(config) if parts for region in regions}
    words = ("encoder", "middle", "decoder", "attention", "out")
    sizes = sorted((region for region in found if region not in words), key=int, reverse=True)
    regions = [*(word for word in words if word in found), *sizes]
    for region, partial in overrides.items():
        if region not in regions:
            return f"norm.overrides has no region {region!r}; regions of this model are {', '.join(map(repr, regions))}"
        if not isinstance(partial, Mapping) or "overrides" in partial:
            return f"norm.overrides.{region} must be a norm config without overrides of its own; got {partial!r}"
    for path, partial in (("norm", norm), *((f"norm.overrides.{region}", o) for region, o in overrides.items())):
        if "split_skip" in partial:
            return f"{path}.split_skip: unknown key; it was renamed to separate_skip_norm"
        if not isinstance(partial.get("separate_skip_norm", False), bool):
            return f"{path}.separate_skip_norm must be true or false; got {partial['separate_skip_norm']!r}"
    return None


def _in_place_of_groups(partial: Mapping[str, Any]) -> dict[str, Any]:
    """A partial config with its `groups`, if it has them, in the place of channels_per_group from elsewhere."""
    return {"channels_per_group": None, **partial} if partial.get("groups") is not None else dict(partial)


def _places(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Path, parts, if all concatenations were split, and regions, the most particular last, of every site."""
    # As in diffusers: without a group count of its own the middle block's attention has no norm in these models.
    mid_norm = config["attn_norm_num_groups"] is not None or config["resnet_time_scale_shift"] == "default"
    for block in block_specs(config):
        regions = (*_resolution(config, block.level), _REGIONS[block.path.split(".")[0]])
        for j, ((width_in, width_out), skip) in enumerate(zip(block.resnets, block.skips, strict=True)):
            yield f"{block.path}.resnets.{j}.norm1", (width_in - skip, skip) if skip else (width_in,), regions
            yield f"{block.path}.resnets.{j}.norm2", (width_out,), regions
            if j < block.attentions:
                path = f"{block.path}.attentions.{j}.group_norm"
                if block.path == "mid_block" and not mid_norm:
                    yield path, (), regions
                else:
                    yield path, (width_out,), (*regions, "attention")
        yield from _resampler_places(block, regions)
    yield "conv_norm_out", (config["block_out_channels"][0],), (*_resolution(config, 0), "out")


def _resampler_places(
    block: BlockSpec, regions: tuple[str, ...]
) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    path = f"{block.path}.{'downsamplers' if block.path.startswith('down') else 'upsamplers'}.0"
    if block.resample == "resnet":
        yield f"{path}.norm1", (block.out_channels,), regions
        yield f"{path}.norm2", (block.out_channels,), regions
    elif block.resample == "conv":
        yield path, (), regions


def _resolution(config: Mapping[str, Any], level: int) -> tuple[str, ...]:
    """The height of a level at sample_size, where that is given."""
    size = config["sample_size"]
    if size is None:
        return ()
    return (str((size if isinstance(size, int) else size[0]) // 2**level),)
