"""Which norm config holds where in a U-Net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gnunet.norms import NORMS, ConcatNorm, make_input, make_norm

REGIONS = {"down_blocks": "encoder", "mid_block": "middle", "up_blocks": "decoder", "conv_norm_out": "out"}


@dataclass(frozen=True)
class NormSite:
    """A layer's path in the model, and the norm config there: for its norms, its convolutions and its residual sum."""

    path: str
    norm: Mapping[str, Any]
    separate_skip: bool

    @property
    def preserves_magnitude(self) -> bool:
        return NORMS[self.norm["kind"]].preserves_magnitude

    def make_input(self, channels: int, out_channels: int, image_channels: int) -> tuple[nn.Module | None, nn.Module]:
        """As gnunet.norms.make_input."""
        try:
            return make_input(self.norm, channels, out_channels, image_channels=image_channels)
        except ValueError as error:
            raise ValueError(f"norm of {self.path}: {error}") from None

    def make_norm(
        self, name: str, channels: int, *, skip_channels: int = 0, activation: str | None = "silu"
    ) -> nn.Module:
        """The layer's norm called `name`; the last skip_channels of its channels are a skip connection."""
        try:
            if skip_channels and self.separate_skip:
                parts = (channels - skip_channels, skip_channels)
                return ConcatNorm([make_norm(self.norm, part, activation=activation) for part in parts])
            return make_norm(self.norm, channels, activation=activation)
        except ValueError as error:
            raise ValueError(f"norm of {self.path}{name and '.'}{name}: {error}") from None


class NormSites:
    """The norm configs of a model: `norm`, completed from norm_num_groups and norm_eps, and updated by
    `norm.overrides` for a layer's resolution, then for its part of the network, then for attention.

    config: all arguments of UNet2D.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._norm = {
            "kind": "group",
            "groups": config["norm_num_groups"],
            "eps": config["norm_eps"],
            **(config["norm"] or {}),
        }
        overrides = self._norm.pop("overrides", None) or {}
        if not isinstance(overrides, Mapping):
            raise ValueError(f"norm.overrides must map regions to norm configs; got {overrides!r}")
        for region, norm in overrides.items():
            if not isinstance(norm, Mapping) or "overrides" in norm:
                raise ValueError(f"norm.overrides.{region} must be a norm config without overrides; got {norm!r}")
        self._overrides = {str(region): norm for region, norm in overrides.items()}
        self._mid_groups = config["attn_norm_num_groups"]
        size = config["sample_size"]
        self._height = size[0] if isinstance(size, (list, tuple)) else size
        self._regions: dict[str, None] = {}

    def at(self, path: str, level: int, *, attention: bool = False) -> NormSite:
        """The site of a layer. level: how often the resolution is halved before it. attention: whether it is attention
        with a norm."""
        regions = [REGIONS.get(path.split(".")[0], "encoder")]
        if self._height is not None:
            regions.insert(0, str(self._height // 2**level))
        if attention:
            regions.append("attention")
        self._regions |= dict.fromkeys(regions)
        norm = dict(self._norm)
        for region in regions:
            norm |= _replacing_groups(self._overrides.get(region, {}))
        if attention and path.startswith("mid_block") and self._mid_groups is not None:
            norm |= _replacing_groups({"groups": self._mid_groups})
        if "input_std" in norm:
            raise ValueError(f"norm of {path}: input_std is set for each layer of a U-Net; leave it out")
        if "split_skip" in norm:
            raise ValueError(f"norm of {path}: split_skip was renamed to separate_skip_norm")
        separate_skip = norm.pop("separate_skip_norm", False)
        if not isinstance(separate_skip, bool):
            raise ValueError(f"norm of {path}: separate_skip_norm must be true or false; got {separate_skip!r}")
        return NormSite(path, norm, separate_skip)

    def check_regions(self) -> None:
        """Raise ValueError for overrides of regions that no layer so far is in."""
        for region in self._overrides:
            if region not in self._regions:
                valid = ", ".join(map(repr, sorted(self._regions, key=str.isdigit)))
                raise ValueError(f"norm.overrides has no region {region!r}; regions of this model are {valid}")


def _replacing_groups(norm: Mapping[str, Any]) -> dict[str, Any]:
    """A partial config, whose `groups` replace channels_per_group from elsewhere."""
    return {"channels_per_group": None, **norm} if norm.get("groups") is not None else dict(norm)
