"""The U-Net, key-compatible with diffusers' UNet2DModel."""

from .unet import UNet2D, check_config, norm_sites, norms_without_checkpointing

__all__ = ["UNet2D", "check_config", "norm_sites", "norms_without_checkpointing"]
