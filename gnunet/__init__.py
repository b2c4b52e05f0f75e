"""gnunet: diffusion U-Nets on a fused GroupNorm+SiLU operator."""

from gnunet.ops import GroupNormSiLU, group_norm_silu

__version__ = "0.1.0"
__all__ = ["GroupNormSiLU", "group_norm_silu"]
