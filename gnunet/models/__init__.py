"""The U-Net, key-compatible with diffusers' UNet2DModel."""

from .plan import check_config, norm_sites
from .unet import UNet2D

__all__ = ["UNet2D", "check_config", "norm_sites"]
