"""Networks whose features images are compared by."""

from collections.abc import Callable
from pathlib import Path

import torch

from gnunet.errors import ConfigError
from gnunet.evaluation.extractors.base import Extractor, Preprocessing
from gnunet.evaluation.extractors.dinov2 import load_dinov2
from gnunet.evaluation.extractors.efficientnet import load_efficientnet_lite0
from gnunet.evaluation.extractors.inception import load_inception
from gnunet.evaluation.extractors.user import load_user_extractor

__all__ = ["EXTRACTORS", "Extractor", "Preprocessing", "load_extractor"]

EXTRACTORS: dict[str, Callable[[str | Path | None, torch.device], Extractor]] = {
    "inception": load_inception,
    "dinov2": load_dinov2,
    "efficientnet_lite0": load_efficientnet_lite0,
}
"""The extractors that have a name, and what loads them."""


def load_extractor(
    name: str,
    *,
    source: str | None = None,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Extractor:
    """Load a feature extractor.

    Args:
        name: one of EXTRACTORS; with `source`, any other name to call it by.
        source: the user's own, see `load_user_extractor`: a TorchScript file or package.module:Class.
        weights: file of weights; None takes the extractor's own place for them.
        device: where it will run.

    Raises:
        ConfigError: an unknown name, or a package or file that is missing, with what to install or put where.
    """
    device = torch.device(device)
    if source is not None:
        if name in EXTRACTORS:
            raise ConfigError(f"extractor {name}: the name is taken; give {source} another one")
        return load_user_extractor(name, source, weights, device)
    if name not in EXTRACTORS:
        raise ConfigError(f"no extractor {name!r}; valid are {', '.join(EXTRACTORS)}, and any name with a source")
    return EXTRACTORS[name](weights, device)
