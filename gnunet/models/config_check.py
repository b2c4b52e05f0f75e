"""Whether a U-Net can be built from a config, and whether a folder's weights are its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from gnunet.errors import CheckpointError
from gnunet.safe_io import TensorSpec, describe_mismatch, read_json, read_safetensors_header

from .block_specs import block_specs
from .norm_sites import check_norms

DOWN_BLOCK_TYPES = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCK_TYPES = ("UpBlock2D", "AttnUpBlock2D")
MID_BLOCK_TYPES = ("UNetMidBlock2D", None)
RESAMPLE_TYPES = ("conv", "resnet")
TIME_EMBEDDING_TYPES = ("positional", "fourier", "learned")
CLASS_EMBED_TYPES = (None, "timestep", "identity")
TIME_SCALE_SHIFT_TYPES = ("default", "scale_shift")
ACTIVATIONS = ("silu", "swish")
WEIGHTS = "diffusion_pytorch_model"
"""diffusers' name for a model's weights."""
CLASSES = 2**20
"""Far above any data set's; a network may have no tensor with a row for each, so that no file would bound them."""


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _sizes(value: Any) -> bool:
    return _whole(value, 1, 8192) or (
        isinstance(value, (list, tuple)) and len(value) == 2 and all(_whole(size, 1, 8192) for size in value)
    )


def _widths(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and 1 <= len(value) <= 14 and all(_whole(width, 1, 2**16) for width in value)
    )


def _names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= 100


def _norm(value: Any) -> bool:
    """A mapping that `check_norms` can look at, with a kind, if any, that is a word."""
    if not isinstance(value, Mapping) or not isinstance(value.get("kind", ""), str):
        return False
    overrides = value.get("overrides") or {}
    parts = overrides.values() if isinstance(overrides, Mapping) else ()
    return all(isinstance(part.get("kind", ""), str) for part in parts if isinstance(part, Mapping))


_OPTIONAL = ("sample_size", "time_embedding_dim", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds",
             "num_train_timesteps", "norm")  # fmt: skip
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sample_size": (_sizes, "a whole number from 1 to 8192, or two of them"),
    "in_channels": (lambda value: _whole(value, 1, 2**16), "a whole number from 1 to 65536"),
    "out_channels": (lambda value: _whole(value, 1, 2**16), "a whole number from 1 to 65536"),
    "time_embedding_dim": (lambda value: _whole(value, 1, 2**18), "a whole number from 1 to 262144"),
    "freq_shift": (lambda value: _number(value, -(2**16), 2**16), "a number from -65536 to 65536"),
    "down_block_types": (_names, "a list of block types"),
    "up_block_types": (_names, "a list of block types"),
    "block_out_channels": (_widths, "a list of 1 to 14 whole numbers from 1 to 65536"),
    "layers_per_block": (lambda value: _whole(value, 1, 64), "a whole number from 1 to 64"),
    "mid_block_scale_factor": (lambda value: _number(value, 1e-6, 1e6), "a number from 1e-6 to 1e6"),
    "downsample_padding": (lambda value: _whole(value, 0, 1), "0 or 1"),
    "dropout": (lambda value: _number(value, 0, 1), "a number from 0 to 1"),
    "attention_head_dim": (lambda value: isinstance(value, int), "a whole number"),
    "norm_num_groups": (lambda value: isinstance(value, int), "a whole number"),
    "attn_norm_num_groups": (lambda value: isinstance(value, int), "a whole number"),
    "norm_eps": (lambda value: _number(value, 0, 1) and isfinite(value), "a number from 0 to 1"),
    "num_class_embeds": (lambda value: _whole(value, 1, CLASSES), f"a whole number from 1 to {CLASSES}"),
    "num_train_timesteps": (lambda value: _whole(value, 1, 100_000), "a whole number from 1 to 100000"),
    "norm": (_norm, "a norm config, whose kind is a word"),
}
"""What values may be before they are looked at together. Bounds lie far beyond what trains: a config may be a
stranger's, and what it asks for is built, if without memory, before its weights are compared with it."""


def check(config: Mapping[str, Any]) -> str | None:
    """What is wrong with a U-Net's config, in words, or None. config has all of UNet2D's keys."""
    for key, (is_valid, words) in _VALUES.items():
        if not (is_valid(config[key]) or (config[key] is None and key in _OPTIONAL)):
            return f"{key} must be {words}; got {repr(config[key])[:100]}"
    for key, valid in (
        ("mid_block_type", MID_BLOCK_TYPES),
        ("downsample_type", RESAMPLE_TYPES),
        ("upsample_type", RESAMPLE_TYPES),
        ("time_embedding_type", TIME_EMBEDDING_TYPES),
        ("class_embed_type", CLASS_EMBED_TYPES),
        ("resnet_time_scale_shift", TIME_SCALE_SHIFT_TYPES),
        ("act_fn", ACTIVATIONS),
    ):
        if config[key] not in valid:
            return f"{key} must be one of {', '.join(map(str, valid))}; got {config[key]!r}"
    for key, valid_types in (("down_block_types", DOWN_BLOCK_TYPES), ("up_block_types", UP_BLOCK_TYPES)):
        for i, kind in enumerate(config[key]):
            if kind not in valid_types:
                return f"{key}[{i}] must be one of {', '.join(valid_types)}; got {kind!r}"
        if len(config[key]) != len(config["block_out_channels"]):
            return (
                f"{key} and block_out_channels must be of one length; "
                f"got {len(config[key])} and {len(config['block_out_channels'])}"
            )
    if config["time_embedding_type"] == "learned" and config["num_train_timesteps"] is None:
        return "time_embedding_type learned needs num_train_timesteps"
    narrowest = min((b.out_channels for b in block_specs(config) if b.attentions), default=None)
    head_dim = config["attention_head_dim"]
    if head_dim is not None and narrowest is not None and not 1 <= head_dim <= narrowest:
        return f"attention_head_dim must be 1 to {narrowest}, the channels with attention; got {head_dim}"
    return check_norms(config)


def check_fits(build: type[ModelMixin], config: Mapping[str, Any], stored: Mapping[str, TensorSpec]) -> None:
    """Refuse a config whose model does not have exactly the tensors that are stored, before any memory is taken.

    Args:
        build: the class of the model.
        config: its keyword arguments, from anywhere.
        stored: what the headers of the weights declare.

    Raises:
        CheckpointError: the config is not valid, or the weights are another model's.
    """
    widths, layers = config.get("block_out_channels"), config.get("layers_per_block")
    blocks = 0
    if widths and layers and _widths(widths) and _whole(layers, 1, 64):
        blocks = len(widths) * (2 * layers + 1)
    if blocks > len(stored):  # thousands of modules take time even without memory
        raise CheckpointError(f"the weights are not those of its config: {len(stored)} for {blocks} residual blocks")
    try:
        with torch.device("meta"):
            model = build(**config)
    except Exception as error:  # of any kind, as its values may be
        raise CheckpointError(f"no U-Net has this config: {str(error)[:1000]}") from None
    found = OrderedDict(stored)
    model._fix_state_dict_keys_on_load(found)  # diffusers' old names of attention's weights
    if difference := describe_mismatch(found, model.state_dict()):
        raise CheckpointError(f"the weights are not those of its config: {difference}")


def read_folder(folder: Path, variant: str | None = None) -> tuple[dict[str, Any], dict[str, TensorSpec]] | None:
    """The config and the headers of the weights in a model's folder, as diffusers saves it; no weight is read.

    Returns:
        The config as stored, and every tensor by its name; None where there are no safetensors weights.

    Raises:
        CheckpointError: a file that cannot be read; an index of shards that names other files than safetensors in
            this folder; a quantized model.
    """
    suffix = f".{variant}" if variant else ""
    index = folder / f"{WEIGHTS}.safetensors.index{suffix}.json"
    single = folder / f"{WEIGHTS}{suffix}.safetensors"
    if index.exists():
        files = [folder / name for name in _shards(index)]
    elif single.exists():
        files = [single]
    else:
        return None
    config = read_json(folder / "config.json")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{folder / 'config.json'}: quantized weights; valid: floating-point ones")
    return config, {name: tensor for file in files for name, tensor in read_safetensors_header(file).items()}


def _shards(index: Path) -> list[str]:
    places = read_json(index)
    weight_map = places.get("weight_map")
    if not isinstance(weight_map, dict) or not isinstance(places.get("metadata"), dict):
        raise CheckpointError(f"{index}: valid: an object with weight_map and metadata")
    for name in weight_map.values():
        # Anything but safetensors would be unpickled.
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index}: names the file {repr(name)[:100]}; valid: .safetensors files beside it")
    return sorted(set(weight_map.values()))
