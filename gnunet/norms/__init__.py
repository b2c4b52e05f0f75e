"""Normalization layers behind one factory, all with one forward signature."""

from .factory import NORMS, NormLayer, check_norm, make_norm
from .group import valid_groups

__all__ = ["NORMS", "NormLayer", "check_norm", "make_norm", "valid_groups"]
