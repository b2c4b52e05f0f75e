"""Fused GroupNorm + SiLU: one public function, its module, and the implementations behind them."""

from .group_norm_silu import ACTIVATIONS, backend_names, group_norm_silu
from .module import GroupNormSiLU
from .recompute import checkpoint_inputs

__all__ = ["ACTIVATIONS", "GroupNormSiLU", "backend_names", "checkpoint_inputs", "group_norm_silu"]
