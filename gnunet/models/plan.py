"""Which layers a U-Net has, worked out from its config before any is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from gnunet.norms import check_norm, valid_groups

DOWN_BLOCK_TYPES = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCK_TYPES = ("UpBlock2D", "AttnUpBlock2D")
MID_BLOCK_TYPES = ("UNetMidBlock2D", None)
RESAMPLE_TYPES = ("conv", "resnet")
TIME_EMBEDDING_TYPES = ("positional", "fourier", "learned")
CLASS_EMBED_TYPES = (None, "timestep", "identity")
TIME_SCALE_SHIFT_TYPES = ("default", "scale_shift")
ACTIVATIONS = ("silu", "swish")


@dataclass(frozen=True)
class BlockPlan:
    """One block: its path in the model and the channels of its layers.

    resnets: (in_channels, out_channels) of each. attentions: how many. resample: None, "conv" or "resnet".
    """

    path: str
    resnets: tuple[tuple[int, int], ...]
    attentions: int
    resample: str | None

    @property
    def out_channels(self) -> int:
        return self.resnets[-1][1]


def plan_blocks(config: Mapping[str, Any]) -> list[BlockPlan]:
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
        blocks.append(BlockPlan(f"down_blocks.{i}", resnets, attentions, resample))

    if config["mid_block_type"] is not None:
        width = channels[-1]
        blocks.append(BlockPlan("mid_block", ((width, width),) * 2, int(config["add_attention"]), None))

    channels.reverse()
    for i, (kind, out) in enumerate(zip(config["up_block_types"], channels, strict=True)):
        before, after = channels[max(i - 1, 0)], channels[min(i + 1, last)]
        resnets = tuple(
            ((before if j == 0 else out) + (after if j == layers else out), out) for j in range(layers + 1)
        )
        attentions = layers + 1 if kind.startswith("Attn") else 0
        resample = None if i == last else config["upsample_type"] if attentions else "conv"
        blocks.append(BlockPlan(f"up_blocks.{i}", resnets, attentions, resample))
    return blocks


def norm_config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The norm of all layers: `norm`, completed from norm_num_groups and norm_eps."""
    inherited = {"kind": "group", "groups": config["norm_num_groups"], "eps": config["norm_eps"]}
    return {**inherited, **(config["norm"] or {})}


def mid_attention_norm_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The norm of the middle block's attention; None where there is none.

    As in diffusers, it has its own group count, and without one it is absent from scale_shift models.
    """
    norm, groups = norm_config_of(config), config["attn_norm_num_groups"]
    if groups is not None:
        return {**norm, "groups": groups, "channels_per_group": None}
    return norm if config["resnet_time_scale_shift"] == "default" else None


def norm_sites(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(path, channels) of every norm layer, in the order in which they run; builds nothing."""
    sites = []
    for block in plan_blocks(config):
        attention_has_norm = block.path != "mid_block" or mid_attention_norm_of(config) is not None
        for j, (width_in, width_out) in enumerate(block.resnets):
            sites.append((f"{block.path}.resnets.{j}.norm1", width_in))
            sites.append((f"{block.path}.resnets.{j}.norm2", width_out))
            if j < block.attentions and attention_has_norm:
                sites.append((f"{block.path}.attentions.{j}.group_norm", width_out))
        if block.resample == "resnet":
            samplers = "downsamplers" if block.path.startswith("down") else "upsamplers"
            sites += [(f"{block.path}.{samplers}.0.norm{k}", block.out_channels) for k in (1, 2)]
    return [*sites, ("conv_norm_out", config["block_out_channels"][0])]


def check(config: Mapping[str, Any]) -> str | None:
    """What is wrong with a U-Net's config, in words, or None. config has all of UNet2D's keys."""
    for key, valid in (
        ("mid_block_type", MID_BLOCK_TYPES),
        ("downsample_type", RESAMPLE_TYPES),
        ("upsample_type", RESAMPLE_TYPES),
        ("time_embedding_type", TIME_EMBEDDING_TYPES),
        ("class_embed_type", CLASS_EMBED_TYPES),
        ("resnet_time_scale_shift", TIME_SCALE_SHIFT_TYPES),
        ("act_fn", ACTIVATIONS),
    ):
        if config[key] not in valid:
            return f"{key} must be one of {', '.join(map(str, valid))}; got {config[key]!r}"
    for key, valid_types in (("down_block_types", DOWN_BLOCK_TYPES), ("up_block_types", UP_BLOCK_TYPES)):
        for i, kind in enumerate(config[key]):
            if kind not in valid_types:
                return f"{key}[{i}] must be one of {', '.join(valid_types)}; got {kind!r}"
        if len(config[key]) != len(config["block_out_channels"]):
            return (
                f"{key} and block_out_channels must be of one length; "
                f"got {len(config[key])} and {len(config['block_out_channels'])}"
            )
    if config["time_embedding_type"] == "learned" and config["num_train_timesteps"] is None:
        return "time_embedding_type learned needs num_train_timesteps"
    narrowest = min((b.out_channels for b in plan_blocks(config) if b.attentions), default=None)
    head_dim = config["attention_head_dim"]
    if head_dim is not None and narrowest is not None and not 1 <= head_dim <= narrowest:
        return f"attention_head_dim must be 1 to {narrowest}, the channels with attention; got {head_dim}"
    return _check_norms(config)


def _check_norms(config: Mapping[str, Any]) -> str | None:
    sites = norm_sites(config)
    common = ", ".join(map(str, valid_groups(gcd(*(channels for _, channels in sites)))))
    norm, mid_norm = norm_config_of(config), mid_attention_norm_of(config)
    for path, channels in sites:
        in_mid_attention = path.startswith("mid_block.attentions")
        error = check_norm(mid_norm if in_mid_attention and mid_norm else norm, channels)
        if error:
            divide = f"; all norm layers can take {common}" if "does not divide" in error else ""
            return f"norm of {path}: {error}{divide}"
    return None
