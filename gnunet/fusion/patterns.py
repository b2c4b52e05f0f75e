"""Where a model's own code hands a GroupNorm's output to an activation.

For diffusers this is knowledge of each class's `forward` (0.32 to 0.42): between norm and activation lies
nothing, or what moves elements only, such as folding frames into the batch. Only ResnetBlock2D may scale and
shift there; it has a fused class of its own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import nn

from .modules import FusedAwaySiLU, SiLUOfTimeEmbedding


class Site(NamedTuple):
    """Children of one module: its `forward` calls `activation` on the output of each of `norms`."""

    activation: str
    norms: tuple[str, ...]
    stand_in: type[FusedAwaySiLU] | None = FusedAwaySiLU
    """What takes the activation's place; None where the module's own class changes instead."""


_HEAD = Site("conv_act", ("conv_norm_out",))
_SITES: dict[str, Site] = {
    "ResnetBlock2D": Site("nonlinearity", ("norm1", "norm2"), None),
    **dict.fromkeys(
        (
            "TemporalResnetBlock",
            "CogVideoXResnetBlock3D",
            "EasyAnimateResidualBlock3D",
            "HunyuanImageResnetBlock",
            "HunyuanVideoResnetBlockCausal3D",
            "KVAEResnetBlock2D",
        ),
        Site("nonlinearity", ("norm1", "norm2"), SiLUOfTimeEmbedding),
    ),
    "LTX2AudioResnetBlock": Site("non_linearity", ("norm1", "norm2"), SiLUOfTimeEmbedding),
    **dict.fromkeys(("AttnSkipUpBlock2D", "SkipUpBlock2D"), Site("act", ("skip_norm",))),
    **dict.fromkeys(
        (
            "UNet2DModel",
            "UNet2DConditionModel",
            "UNet3DConditionModel",
            "UNetMotionModel",
            "UNetSpatioTemporalConditionModel",
            "I2VGenXLUNet",
            "Encoder",
            "Decoder",
            "MaskConditionDecoder",
            "TemporalDecoder",
            "AllegroEncoder3D",
            "AllegroDecoder3D",
            "EasyAnimateEncoder",
            "EasyAnimateDecoder",
            "HunyuanVideoEncoder3D",
            "HunyuanVideoDecoder3D",
        ),
        _HEAD,
    ),
    "UNetControlNetXSModel": Site("base_conv_act", ("base_conv_norm_out",)),
    "CogVideoXEncoder3D": Site("conv_act", ("norm_out",)),
    **dict.fromkeys(
        ("HunyuanImageEncoder2D", "HunyuanImageDecoder2D", "KVAEEncoder2D"), Site("nonlinearity", ("norm_out",))
    ),
    **dict.fromkeys(("LTX2AudioEncoder", "LTX2AudioDecoder"), Site("non_linearity", ("norm_out",))),
}


def sites_of(module: nn.Module) -> list[Site]:
    """The sites that `module`, not its children, is known to have; an nn.Sequential has one at each step.

    A subclass has those of the class whose `forward` it runs. That the children are a GroupNorm and a SiLU
    is not said: a name may be missing, None or another module.
    """
    forward = type(module).forward
    if forward is nn.Sequential.forward:
        return [Site(after, (name,)) for name, after in pairwise(module._modules)]
    for cls in type(module).__mro__:
        is_known = cls.__module__.startswith("diffusers.") and cls.__name__ in _SITES
        if is_known and cls.__dict__.get("forward") is forward:
            return [_SITES[cls.__name__]]
    return []
