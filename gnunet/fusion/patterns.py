"""Where a module's own code passes the output of a GroupNorm to an activation.

For diffusers these patterns are read off the `forward` of each class (0.33 to 0.42): between norm and activation there
is nothing, or only a rearrangement of elements, such as folding frames into the batch. Only ResnetBlock2D may scale
and shift there, which is why it has its own fused forward.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import nn

from .modules import FusedAwaySiLU, SiLUOfTimeEmbedding


class FusionPattern(NamedTuple):
    """Names of a module's children: its `forward` calls `activation` on the output of each of `norms`."""

    activation: str
    norms: tuple[str, ...]
    replacement: type[FusedAwaySiLU] | None = FusedAwaySiLU
    """Replaces the activation, while the norms apply it; None if the module's own forward changes instead."""


_PATTERNS: dict[str, FusionPattern] = {
    "ResnetBlock2D": FusionPattern("nonlinearity", ("norm1", "norm2"), None),
    **dict.fromkeys(
        (
            "TemporalResnetBlock", "CogVideoXResnetBlock3D", "EasyAnimateResidualBlock3D", "HunyuanImageResnetBlock",
            "HunyuanVideoResnetBlockCausal3D", "KVAEResnetBlock2D",
        ),
        FusionPattern("nonlinearity", ("norm1", "norm2"), SiLUOfTimeEmbedding),
    ),
    "LTX2AudioResnetBlock": FusionPattern("non_linearity", ("norm1", "norm2"), SiLUOfTimeEmbedding),
    **dict.fromkeys(("AttnSkipUpBlock2D", "SkipUpBlock2D"), FusionPattern("act", ("skip_norm",))),
    **dict.fromkeys(
        (
            "UNet2DModel", "UNet2DConditionModel", "UNet3DConditionModel", "UNetMotionModel",
            "UNetSpatioTemporalConditionModel", "I2VGenXLUNet", "Encoder", "Decoder", "MaskConditionDecoder",
            "TemporalDecoder", "AllegroEncoder3D", "AllegroDecoder3D", "EasyAnimateEncoder", "EasyAnimateDecoder",
            "HunyuanVideoEncoder3D", "HunyuanVideoDecoder3D",
        ),
        FusionPattern("conv_act", ("conv_norm_out",)),
    ),
    "UNetControlNetXSModel": FusionPattern("base_conv_act", ("base_conv_norm_out",)),
    "CogVideoXEncoder3D": FusionPattern("conv_act", ("norm_out",)),
    **dict.fromkeys(
        ("HunyuanImageEncoder2D", "HunyuanImageDecoder2D", "KVAEEncoder2D"),
        FusionPattern("nonlinearity", ("norm_out",)),
    ),
    **dict.fromkeys(("LTX2AudioEncoder", "LTX2AudioDecoder"), FusionPattern("non_linearity", ("norm_out",))),
}  # fmt: skip


def patterns_of(module: nn.Module) -> list[FusionPattern]:
    """The patterns of `module` itself, not of its children; an nn.Sequential has one for each pair of neighbours.

    A subclass has those of the class whose `forward` it runs. The children of these names may be missing, None, or
    other modules than a GroupNorm and a SiLU.
    """
    forward = type(module).forward
    if forward is nn.Sequential.forward:
        return [FusionPattern(after, (name,), None) for name, after in pairwise(module._modules)]
    for cls in type(module).__mro__:
        is_known = cls.__module__.startswith("diffusers.") and cls.__name__ in _PATTERNS
        if is_known and cls.__dict__.get("forward") is forward:
            return [_PATTERNS[cls.__name__]]
    return []
