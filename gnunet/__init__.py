"""gnunet: diffusion U-Nets on a fused GroupNorm+SiLU operator."""

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gnunet.commands.api import evaluate, sample
    from gnunet.config import load_config
    from gnunet.fusion import fuse, unfuse
    from gnunet.ops import GroupNormSiLU, group_norm_silu
    from gnunet.training import fit as train
    from gnunet.training.post_hoc_ema import reconstruct as ema

__version__ = "0.1.0"
__all__ = ["GroupNormSiLU", "ema", "evaluate", "fuse", "group_norm_silu", "load_config", "sample", "train", "unfuse"]

_LOCATIONS = {
    "GroupNormSiLU": "gnunet.ops:GroupNormSiLU",
    "ema": "gnunet.training.post_hoc_ema:reconstruct",
    "evaluate": "gnunet.commands.api:evaluate",
    "fuse": "gnunet.fusion:fuse",
    "group_norm_silu": "gnunet.ops:group_norm_silu",
    "load_config": "gnunet.config:load_config",
    "sample": "gnunet.commands.api:sample",
    "train": "gnunet.training:fit",
    "unfuse": "gnunet.fusion:unfuse",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line's --help needs no torch, and the operator no trainer.
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = resolve_name(_LOCATIONS[name])
    return value
