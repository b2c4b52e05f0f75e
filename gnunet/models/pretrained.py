"""Where a model is, whether a folder's weights are those of its config, and what tells weights apart."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from gnunet.errors import CheckpointError, did_you_mean_path, expand, may_be_on_hub, truncate
from gnunet.safe_io import TensorSpec, check_fits_memory, describe_mismatch, read_json, read_safetensors_header

WEIGHTS = "diffusion_pytorch_model"  # diffusers' name for a model's weights


@cache
def find_model(name: str, *folders: str) -> Path:
    """The path that a name is, or else a snapshot of a model on the Hugging Face hub, with the weights in these
    folders, by default those of a U-Net and its autoencoder. CheckpointError if there is neither."""
    path = expand(name)
    if path.exists():
        return path
    if not may_be_on_hub(name):
        valid = "a path, or OWNER/NAME of a model on the Hugging Face hub"
        raise CheckpointError(f"{name}: no such path (in {os.getcwd()}){did_you_mean_path(path)}; valid: {valid}")
    from huggingface_hub import snapshot_download  # takes a second

    folders = folders or ("", "unet/", "vae/")
    files = [folder + file for folder in folders for file in ("config.json", f"{WEIGHTS}*.safetensors*")]
    files += ["config.yaml", "gnunet.json", "*scheduler_config.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["*.fp16.*"]))
    except Exception as error:  # of any of the libraries that it uses
        reason = truncate(" ".join(str(error).split()), 300)
        raise CheckpointError(f"{name}: no such path, and the Hugging Face hub does not give it: {reason}") from None


def check_weights_match(
    build: type[ModelMixin], config: Mapping[str, Any], stored: Mapping[str, TensorSpec], where: object
) -> None:
    """Compare a config, which may be untrusted, with the headers of weights, before any memory is allocated for them.

    Raises:
        CheckpointError: build(**config) is an error, or does not have exactly the tensors that the headers declare; its
            message begins with `where`.
    """
    try:
        with torch.device("meta"):
            model = build(**config)
    except Exception as error:  # of any class, since the values may be of any type
        raise CheckpointError(f"{where}: no {build.__name__} has this config: {str(error)[:1000]}") from None
    tensors = OrderedDict(stored)
    model._fix_state_dict_keys_on_load(tensors)  # diffusers' old names of attention's weights
    if difference := describe_mismatch(tensors, model.state_dict()):
        if getattr(model, "input_scale", None) is not None:
            difference += "; valid: weights of this version, which has other layers with this norm than earlier ones"
        raise CheckpointError(f"{where}: the weights are not those of its config: {difference}")


def weights_digest(text: str, module: nn.Module) -> str:
    """sha256 of a text and of a module's tensors."""
    found = hashlib.sha256(text.encode())
    for name, tensor in module.state_dict().items():
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def check_pretrained(build: type[ModelMixin], folder: Path, *, variant: str | None = None, **kwargs: Any) -> None:
    """`check_weights_match` for a folder written by save_pretrained, if it has safetensors weights.

    variant, kwargs: further arguments of from_pretrained, which may replace values of the stored config.
    """
    suffix = f".{variant}" if variant else ""
    index = folder / f"{WEIGHTS}.safetensors.index{suffix}.json"
    single = folder / f"{WEIGHTS}{suffix}.safetensors"
    if not index.exists() and not single.exists():
        return
    file = folder / "config.json"
    stored = read_json(file)
    if stored.get("quantization_config") is not None:
        raise CheckpointError(f"{file}: quantized weights; valid: floating-point ones")
    files = [folder / name for name in _shards(index)] if index.exists() else [single]
    if kwargs.get("device_map") is None:  # which may leave layers on disk
        check_fits_memory(files)
    weights = {name: tensor for file in files for name, tensor in read_safetensors_header(file).items()}
    try:
        config, _, _ = build.extract_init_dict(stored, **kwargs)  # what diffusers builds from this file
    except Exception as error:  # of any class, since the values may be of any type
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    check_weights_match(build, config, weights, folder)


def _shards(index: Path) -> list[str]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not isinstance(content.get("metadata"), dict):
        raise CheckpointError(f"{index}: valid: an object with weight_map and metadata")
    for name in weight_map.values():
        # Anything but safetensors would be unpickled.
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name or "\\" in name:
            raise CheckpointError(
                f"{index}: names the file {repr(name)[:100]}; valid: .safetensors files in the same folder"
            )
    return sorted(set(weight_map.values()))
