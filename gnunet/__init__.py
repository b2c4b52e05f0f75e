"""gnunet: diffusion U-Nets on a fused GroupNorm+SiLU operator."""

from gnunet.fusion import fuse, unfuse
from gnunet.ops import GroupNormSiLU, group_norm_silu

__version__ = "0.1.0"
__all__ = ["GroupNormSiLU", "fuse", "group_norm_silu", "unfuse"]
