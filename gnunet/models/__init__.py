"""The U-Net, key-compatible with diffusers' UNet2DModel."""

from .config_check import check_config, norm_sites, norms_without_checkpointing
from .unet import UNet2D

__all__ = ["UNet2D", "check_config", "norm_sites", "norms_without_checkpointing"]
