"""What turns images into features, and how it tells itself from any other."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from gnunet.errors import ConfigError


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 pixels to a network's input; part of what reference statistics are cached by.

    Images are resized to `size` x `size` by torch's bicubic filter, antialiased where they shrink, neither
    rounded nor clamped (as in EDM2's FD-DINOv2), then (pixel - mean) / std, with mean and std in 0 to 255.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str = "torch bicubic antialias, version 1"

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> fp32 (N, 3, size, size), channels_last."""
        x = images.float()
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network that gives features, called on images.

    Args:
        name: what metrics call it, as in fd_NAME.
        network: in eval mode on `device`; given the preprocessed images (fp32), or, where `preprocessing` is
            None, the uint8 RGB images at their own size; returns floating point (N, D).
        kind: which network it is: an architecture or a class.
        weights: sha256 of the weights.
        preprocessing: what comes before the network; None where the network does all itself.
        device: where the network is.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    kind: str
    weights: str
    preprocessing: Preprocessing | None
    device: torch.device

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that differs wherever the features of the same image may differ."""
        preprocessing = None if self.preprocessing is None else asdict(self.preprocessing)
        return {"kind": self.kind, "weights": self.weights, "preprocessing": preprocessing}

    def __call__(self, images: Tensor) -> Tensor:
        """The features of a batch, in fp32 without autocast or TF32.

        Args:
            images: uint8 (N, C, H, W), C 1 (grey, repeated to RGB) or 3, on any device.

        Returns:
            float32 (N, D) on the extractor's device.

        Raises:
            TypeError: not uint8. ValueError: not (N, 1 or 3, H, W).
            ConfigError: the network of a user's file does not give finite (N, D).
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images are {images.dtype}; valid is torch.uint8, 0 to 255")
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images have shape {tuple(images.shape)}; valid is (N, 1 or 3, H, W)")
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.no_grad(), exact, torch.autocast(self.device.type, enabled=False):
            x = images.to(self.device).expand(-1, 3, -1, -1).contiguous()
            features = self.network(x if self.preprocessing is None else self.preprocessing(x))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigError(f"extractor {self.name} gave {given} for {len(images)} images; valid is (N, D)")
        if not features.isfinite().all():
            raise ConfigError(f"extractor {self.name} gave features that are not finite")
        return features.float()


def read_weights(path: Path, name: str) -> dict[str, Tensor]:
    """Read a file of weights: .safetensors, or torch's own format without code in it.

    The file is one that the user names: torch's format has no code here, but its tensors may grow as they are
    unpacked, without bound. Strangers' configurations name safetensors alone (see `sanitize_config`).

    Raises:
        ConfigError: the file is missing, broken, or holds more than weights.
    """
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"extractor {name}: there is no file of weights {path}") from error
    except Exception as error:  # of any kind, as their parsers stumble over what is no such file
        reason = str(error).split(". ")[0]  # torch goes on to advise loading it all the same
        raise ConfigError(f"extractor {name}: {path} is not a whole file of plain weights: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"extractor {name}: {path} is not a state_dict, a dict of tensors by name")
    return state


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_weights(name: str, given: str | Path | None, url: str) -> Path:
    """The weights file that was given, else the one of `url` in torch.hub's cache.

    Nothing is downloaded: processes of one launch would do it side by side, and wait long where no network is.

    Raises:
        ConfigError: there is no such file; says what to put where.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise ConfigError(f"extractor {name}: there is no file of weights {path}; the published ones are {url}")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        raise ConfigError(
            f"extractor {name}: its weights are not at {path}; put them there with "
            f"`curl --location --create-dirs --output {path} {url}`, or give another path to them"
        )
    return path


def load_state_dict_strict(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load weights whose keys and shapes are exactly the network's, for inference; ConfigError otherwise."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = shorten(str(error), 400)  # torch names every key
        raise ConfigError(f"extractor {name}: the weights do not fit its network: {reason}") from error
    network.eval().requires_grad_(False)
