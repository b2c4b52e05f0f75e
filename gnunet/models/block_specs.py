"""Which blocks a U-Net has, worked out from its config before any is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockSpec:
    """One block: its path in the model and the channels of its layers.

    level: how often the resolution has been halved in front of its layers. resnets: (in_channels, out_channels) of
    each. skips: how many of its in_channels, the last ones, come from a skip connection. attentions: how many.
    resample: None, "conv" or "resnet".
    """

    path: str
    level: int
    resnets: tuple[tuple[int, int], ...]
    skips: tuple[int, ...]
    attentions: int
    resample: str | None

    @property
    def out_channels(self) -> int:
        return self.resnets[-1][1]


def block_specs(config: Mapping[str, Any]) -> list[BlockSpec]:
    """The blocks, in the order in which they run. config has all of UNet2D's keys."""
    channels, layers = list(config["block_out_channels"]), config["layers_per_block"]
    last = len(channels) - 1
    blocks = []

    for i, (kind, out) in enumerate(zip(config["down_block_types"], channels, strict=True)):
        first = channels[max(i - 1, 0)]
        resnets = tuple((first if j == 0 else out, out) for j in range(layers))
        attentions = layers if kind.startswith("Attn") else 0
        # As in diffusers, only blocks with attention can resample by a resnet.
        resample = None if i == last else config["downsample_type"] if attentions else "conv"
        blocks.append(BlockSpec(f"down_blocks.{i}", i, resnets, (0,) * layers, attentions, resample))

    if config["mid_block_type"] is not None:
        width = channels[-1]
        blocks.append(BlockSpec("mid_block", last, ((width, width),) * 2, (0, 0), int(config["add_attention"]), None))

    channels.reverse()
    for i, (kind, out) in enumerate(zip(config["up_block_types"], channels, strict=True)):
        before, after = channels[max(i - 1, 0)], channels[min(i + 1, last)]
        skips = (out,) * layers + (after,)
        resnets = tuple(((before if j == 0 else out) + skip, out) for j, skip in enumerate(skips))
        attentions = layers + 1 if kind.startswith("Attn") else 0
        resample = None if i == last else config["upsample_type"] if attentions else "conv"
        blocks.append(BlockSpec(f"up_blocks.{i}", last - i, resnets, skips, attentions, resample))
    return blocks
