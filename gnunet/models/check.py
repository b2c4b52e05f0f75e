"""Whether a U-Net can be built from a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .norm_plan import check_norms
from .plan import plan_blocks

DOWN_BLOCK_TYPES = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCK_TYPES = ("UpBlock2D", "AttnUpBlock2D")
MID_BLOCK_TYPES = ("UNetMidBlock2D", None)
RESAMPLE_TYPES = ("conv", "resnet")
TIME_EMBEDDING_TYPES = ("positional", "fourier", "learned")
CLASS_EMBED_TYPES = (None, "timestep", "identity")
TIME_SCALE_SHIFT_TYPES = ("default", "scale_shift")
ACTIVATIONS = ("silu", "swish")


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
    return check_norms(config)
