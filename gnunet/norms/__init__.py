"""Normalization layers behind one factory, all with one forward signature."""

from .factory import NORMS, check_norm, make_conv, make_norm, make_residual, make_split_norm
from .group import valid_groups
from .layer import NormLayer
from .magnitude import force_weight_norm
from .options import Option
from .running import running_buffers, set_noise_level
from .update_bn_stats import update_bn_stats

__all__ = [
    "NORMS",
    "NormLayer",
    "Option",
    "check_norm",
    "force_weight_norm",
    "make_conv",
    "make_norm",
    "make_residual",
    "make_split_norm",
    "update_bn_stats",
    "running_buffers",
    "set_noise_level",
    "valid_groups",
]
