"""gnunet: diffusion U-Nets on a fused GroupNorm+SiLU operator."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gnunet.fusion import fuse, unfuse
    from gnunet.ops import GroupNormSiLU, group_norm_silu

__version__ = "0.1.0"
__all__ = ["GroupNormSiLU", "fuse", "group_norm_silu", "unfuse"]

_MODULES = {
    "GroupNormSiLU": "gnunet.ops",
    "group_norm_silu": "gnunet.ops",
    "fuse": "gnunet.fusion",
    "unfuse": "gnunet.fusion",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line's --help needs no torch, and the operator no trainer.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
