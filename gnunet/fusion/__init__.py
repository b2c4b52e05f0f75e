"""The fused operator in models that were built without it: diffusers' models and nn.Sequential."""

from .fuse_model import FuseReport, fuse, unfuse

__all__ = ["FuseReport", "fuse", "unfuse"]
