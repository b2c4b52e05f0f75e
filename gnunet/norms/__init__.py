"""Normalization layers with one forward signature, by kind: README.md lists them and says how to add one."""

from .factory import (
    NORMS,
    ConcatNorm,
    kind_of,
    make_conv,
    make_input,
    make_linear,
    make_norm,
    make_output,
    make_residual,
)
from .layer import NormLayer
from .magnitude import force_weight_norm
from .running_stats import running_buffers, update_bn_stats

__all__ = [
    "NORMS",
    "ConcatNorm",
    "NormLayer",
    "force_weight_norm",
    "kind_of",
    "make_conv",
    "make_input",
    "make_linear",
    "make_norm",
    "make_output",
    "make_residual",
    "running_buffers",
    "update_bn_stats",
]
