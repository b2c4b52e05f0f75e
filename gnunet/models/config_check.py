"""A U-Net's config is checked by building the model on the meta device, which takes no memory for weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from gnunet.norms import NormLayer

from .unet import UNet2D


def check_config(config: Mapping[str, Any]) -> str | None:
    """Why UNet2D(**config) raises an error, or None."""
    try:
        _build_on_meta(json.dumps(config))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def norm_sites(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(path, channels) of every norm layer of UNet2D(**config), and of every part of the norms of concatenations.

    Options that do not fit their layers, and attention_head_dim, are ignored.
    """
    norm = config.get("norm") or {}
    overrides = {region: _skip_option(partial) for region, partial in (norm.get("overrides") or {}).items()}
    norm = {**_skip_option(norm), "kind": "none", "overrides": overrides}
    model = _build_on_meta(json.dumps({**config, "norm": norm, "attention_head_dim": None}))
    modules = (each for path, norm in model.norm_layers().items() for each in norm.named_modules(prefix=path))
    return [(path, layer.num_channels) for path, layer in modules if isinstance(layer, NormLayer)]


def norms_without_checkpointing(config: Mapping[str, Any]) -> list[str]:
    """`UNet2D.norms_without_checkpointing` of UNet2D(**config)."""
    return _build_on_meta(json.dumps(config)).norms_without_checkpointing()


def _skip_option(norm: Mapping[str, Any]) -> dict[str, Any]:
    return {key: norm[key] for key in norm if key == "separate_skip_norm"}


@lru_cache(maxsize=32)
def _build_on_meta(config: str) -> UNet2D:
    with torch.device("meta"):
        return UNet2D(**json.loads(config))
