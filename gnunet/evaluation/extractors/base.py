"""Feature extractors: the network, its preprocessing, its weights, and what identifies them in a cache."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from gnunet.errors import ConfigError, expand


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 pixels to a network's input.

    Images are resized to `size` x `size` by torch's bicubic filter, antialiased when downsampling, neither rounded
    nor clamped (as in EDM2's FD-DINOv2), then (pixel - mean) / std, with mean and std in 0 to 255.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str = "torch bicubic antialias, version 1"  # part of the cache key of reference statistics

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> fp32 (N, 3, size, size), channels_last."""
        x = images.float()
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, eq=False)
class Extractor:
    """A frozen network whose features images are compared by.

    The network, in eval mode, takes images as `preprocessing` leaves them, or uint8 RGB (N, 3, H, W) at their own
    size, and returns floating point (N, D).
    """

    name: str  # as in the metric fd_NAME
    network: Callable[[Tensor], Tensor]  # on `device`
    kind: str  # the architecture, or the user's class
    weights: str  # sha256 of the weights
    preprocessing: Preprocessing | None  # applied before the network; None if it does its own
    device: torch.device

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that differs between extractors whose features of the same image may differ."""
        preprocessing = None if self.preprocessing is None else asdict(self.preprocessing)
        return {"kind": self.kind, "weights": self.weights, "preprocessing": preprocessing}

    @property
    def statistics_device(self) -> torch.device:
        """Where float64 statistics of the features are computed: the CPU for MPS, which has no float64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def __call__(self, images: Tensor) -> Tensor:
        """The features of a batch, in fp32 without autocast or TF32.

        Args:
            images: uint8 (N > 0, C, H, W), C 1 (grey, repeated to RGB) or 3, on any device.

        Returns:
            float32 (N, D) on the extractor's device.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images are {images.dtype}; valid: torch.uint8, 0 to 255")
        if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
            raise ValueError(f"images have shape {tuple(images.shape)}; valid: (N > 0, 1 or 3, H, W)")
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.no_grad(), exact, torch.autocast(self.device.type, enabled=False):
            x = images.to(self.device).expand(-1, 3, -1, -1).contiguous()
            features = self.network(x if self.preprocessing is None else self.preprocessing(x))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigError(f"extractor {self.name} returned {given} for {len(images)} images; valid: (N, D)")
        if not features.isfinite().all():
            raise ConfigError(f"extractor {self.name} returned features that are not finite")
        return features.float()


def read_weights(path: Path, name: str) -> dict[str, Tensor]:
    """Read a state_dict from .safetensors, or from torch's format with `weights_only`."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"extractor {name}: there is no weights file {path}") from error
    except Exception as error:  # the parsers raise many kinds of exceptions for other files
        reason = str(error).split(". ")[0]  # torch then suggests loading it without weights_only
        raise ConfigError(f"extractor {name}: {path} is not a complete file of plain weights: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"extractor {name}: {path} is not a state_dict, a dict of tensors by name")
    return state


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and values, independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_weights(name: str, given: str | Path | None, url: str) -> dict[str, Tensor]:
    """`read_weights` of the given file, or by default of that of `url` in torch.hub's cache; nothing is downloaded."""
    default = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    path = default if given is None else expand(given)
    if not path.is_file():
        raise ConfigError(
            f"extractor {name}: its weights are not at {path}; put them there with "
            f"`curl --location --create-dirs --output {path} {url}`, or give another path"
        )
    return read_weights(path, name)


@contextmanager
def fitting_weights(name: str) -> Iterator[None]:
    """Turn the error of a network whose weights do not fit it into a ConfigError."""
    try:
        yield
    except (KeyError, RuntimeError) as error:
        reason = shorten(str(error), 400)  # torch names every key
        raise ConfigError(f"extractor {name}: the weights do not fit its network: {reason}") from error
