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
"""Loaders of the built-in extractors, by name."""


def load_extractor(
    name: str, *, source: str | None = None, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """Load a feature extractor.

    Args:
        name: one of EXTRACTORS; with `source`, any other name.
        source: the user's own extractor: a TorchScript file or package.module:Class (see `load_user_extractor`).
        weights: a weights file; None takes the extractor's default location.

    Raises:
        ConfigError: an unknown name, or a missing package or file; the message says what to install, or put where.
    """
    device = torch.device(device)
    if source is not None:
        if name in EXTRACTORS:
            raise ConfigError(f"extractor {name}: the name is taken; give {source} another one")
        return load_user_extractor(name, source, weights, device)
    if name not in EXTRACTORS:
        raise ConfigError(f"no extractor {name!r}; valid: {', '.join(EXTRACTORS)}, or any name with a source")
    return EXTRACTORS[name](weights, device)
