"""The U-Net, key-compatible with diffusers' UNet2DModel."""

from .unet import UNet2D, check_config, norm_sites, unrepeatable_norms

__all__ = ["UNet2D", "check_config", "norm_sites", "unrepeatable_norms"]
