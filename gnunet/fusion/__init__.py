"""The fused operator inside models that were built without it: stock diffusers models, nn.Sequential."""

from .fuse_model import FuseReport, fuse, unfuse

__all__ = ["FuseReport", "fuse", "unfuse"]
