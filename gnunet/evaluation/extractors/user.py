"""User-defined feature extractors: a TorchScript file, or a class and its weights. Both run their author's code."""

import hashlib
import importlib
import inspect
import re
from pathlib import Path

import torch
from torch import nn

from gnunet.errors import ConfigError, expand
from gnunet.evaluation.extractors.base import Extractor, fitting_weights, read_weights, weights_digest


def load_user_extractor(name: str, source: str, weights: str | Path | None, device: torch.device) -> Extractor:
    """Load an extractor from a file or a class.

    Its network takes uint8 RGB (N, 3, H, W) at the images' own size, does its own preprocessing, and returns floating
    point (N, D).

    Args:
        source: a TorchScript file (`torch.jit.save`), or package.module:Class, an nn.Module importable from
            sys.path whose constructor takes no arguments.
        weights: a weights file for the class; None if the class loads its own.
    """
    if Path(source).is_file():
        if weights is not None:
            raise ConfigError(f"extractor {name}: the TorchScript file {source} contains its weights; give no others")
        return _from_torchscript(name, Path(source), device)
    if re.fullmatch(r"\w+(\.\w+)*:\w+", source):
        return _from_class(name, source, weights, device)
    raise ConfigError(
        f"extractor {name}: {source!r} is neither an existing TorchScript file nor of the form package.module:Class"
    )


def _from_torchscript(name: str, path: Path, device: torch.device) -> Extractor:
    try:
        network = torch.jit.load(path, map_location=device)
    except RuntimeError as error:
        raise ConfigError(
            f"extractor {name}: {path} is not a TorchScript file ({str(error).splitlines()[0]}); for weights "
            "alone, give package.module:Class and the weights file"
        ) from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Extractor(name, network.eval(), "torchscript", digest, None, device)


def _from_class(name: str, source: str, weights: str | Path | None, device: torch.device) -> Extractor:
    module_name, class_name = source.split(":")
    try:
        network_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"extractor {name}: cannot import {class_name} from {module_name}: {error}; is its directory in PYTHONPATH?"
        ) from error
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise ConfigError(f"extractor {name}: {source} is not a subclass of torch.nn.Module")
    network = network_class()
    state = network.state_dict() if weights is None else read_weights(expand(weights), name)
    with fitting_weights(name):
        network.load_state_dict(state)
    code = hashlib.sha256(Path(inspect.getfile(network_class)).read_bytes()).hexdigest()
    digest = weights_digest(network.state_dict())
    network.eval().requires_grad_(False).to(device)
    return Extractor(name, network, f"{source} in code {code}", digest, None, device)
