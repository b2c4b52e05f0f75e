"""Autoencoders of diffusers, in whose latent space a network is trained and sampled."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from gnunet.errors import CheckpointError, first_few, truncate
from gnunet.safe_io import read_json
from gnunet.scaling import to_unit_range

from .pretrained import check_pretrained, weights_digest

KINDS: dict[Any, Any] = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny, VQModel)}
SUBFOLDERS = ("", "vae", "vqvae")
"""Where the autoencoder is in a folder of its own, and in pipelines."""


@dataclass(frozen=True)
class Autoencoder:
    """A frozen autoencoder, fp32 and in eval mode, that is given pictures and takes and gives a network's latents.

    A network sees latents as x = (latents - offset) / scale, by the autoencoder's scaling_factor and shift_factor, or
    latents_mean and latents_std.
    """

    model: ModelMixin
    channels: int
    """Of pictures: 1 or 3."""
    latent_channels: int
    reduction: int
    """How many times latents are smaller than pictures, in height and width."""
    offset: tuple[float, ...]
    scale: tuple[float, ...]
    """One for each latent channel, as offset."""
    digest: str
    """sha256 of the weights and the scaling."""

    @classmethod
    def of(cls, model: ModelMixin) -> Autoencoder:
        """Raises CheckpointError if the channels of its pictures, or its scaling, are not valid."""
        config = model.config
        channels, latent_channels = config.in_channels, config.get("vq_embed_dim") or config.latent_channels
        if channels not in (1, 3) or config.out_channels != channels:
            given = f"in_channels {channels} and out_channels {config.out_channels}"
            raise CheckpointError(f"an autoencoder of {given}; valid: 1 for both, or 3")
        widths = config.get("encoder_block_out_channels") or config.block_out_channels
        means = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * latent_channels
        factor, stds = config.scaling_factor, config.get("latents_std") or [1.0] * latent_channels
        try:
            offset, scale = tuple(map(float, means)), tuple(float(std) / float(factor) for std in stds)
        except (TypeError, ValueError, ZeroDivisionError):
            offset, scale = (), ()
        valid = all(map(math.isfinite, [*offset, *scale])) and all(each > 0 for each in scale)
        if not valid or not len(offset) == len(scale) == latent_channels:
            given = truncate(f"scaling_factor {factor}, shift_factor, latents_mean {means}, latents_std {stds}")
            raise CheckpointError(f"an autoencoder of {given}; valid: numbers, and factor and deviations above 0")
        model = model.float().eval().requires_grad_(False)
        digest = weights_digest(repr((type(model).__name__, offset, scale)), model)
        return cls(model, channels, latent_channels, 2 ** (len(widths) - 1), offset, scale, digest)

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 pictures (n, H, W, channels) to latents as a network sees them, fp32 (n, h, w, latent_channels), or
        (n, h, w, 2 * latent_channels) with the means, then the standard deviations of AutoencoderKL's distributions."""
        images = to_unit_range(torch.from_numpy(pictures).to(self.model.device).permute(0, 3, 1, 2))
        offset, scale = self._scaling(images)
        with torch.no_grad():
            found = self.model.encode(images)
            parts = [(found.latents if "latents" in found else found.latent_dist.mean) - offset]
            parts += [] if "latents" in found else [found.latent_dist.std]
        return torch.cat([part / scale for part in parts], dim=1).permute(0, 2, 3, 1).cpu().numpy()

    def decode(self, x: Tensor) -> Tensor:
        """A network's latents (n, latent_channels, h, w), on any device, to images in [-1, 1], (n, channels, H, W)."""
        offset, scale = self._scaling(x)
        with torch.no_grad():
            return self.model.to(x.device).decode(x * scale + offset).sample

    def _scaling(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_tensor(self.offset).view(-1, 1, 1), x.new_tensor(self.scale).view(-1, 1, 1)


def load_autoencoder(name: str | Path, expected: str | None = None) -> Autoencoder:
    """Load an autoencoder on the CPU.

    A folder may be untrusted: only safetensors are read, after their headers match the configuration.

    Args:
        name: a folder of diffusers' AutoencoderKL, AutoencoderTiny or VQModel, or of a pipeline with one, or the name
            of an autoencoder on the Hugging Face hub.
        expected: the digest that it must have; not of the hub's.

    Raises:
        CheckpointError: there is none, it is damaged or of another kind, or has another digest.
    """
    folder = Path(name).expanduser()
    try:
        if folder.is_dir() or expected is not None:
            folder = next((folder / each for each in SUBFOLDERS if (folder / each / "config.json").is_file()), folder)
            kind = _kind(read_json(folder / "config.json"), folder)
            check_pretrained(kind, folder)
            model = kind.from_pretrained(folder, use_safetensors=True)
        else:
            kind = _kind(AutoencoderKL.load_config(str(name)), name)
            model = kind.from_pretrained(str(name), use_safetensors=True)
        found = Autoencoder.of(model)
    except CheckpointError as error:
        raise error if str(folder) in str(error) else CheckpointError(f"{name}: {error}") from None
    except Exception as error:  # of any kind, as diffusers and the hub's client raise them
        where = "" if folder.is_dir() else f"is not a folder (in {os.getcwd()}), and as a name of the Hugging Face hub "
        reason = first_few((str(error).strip() or type(error).__name__).splitlines()[:1])
        raise CheckpointError(f"{name}: {where}cannot be loaded: {reason}; valid: {_VALID}") from None
    if expected not in (None, found.digest):
        raise CheckpointError(f"{folder}: another autoencoder, or another scaling, than the model was trained with")
    return found


_VALID = "diffusers' AutoencoderKL, AutoencoderTiny or VQModel, with safetensors weights"


def _kind(config: Any, where: object) -> Any:
    """The class of a config, which builds in bounded time."""
    if (kind := KINDS.get(str(config.get("_class_name")))) is None:
        given = truncate(config.get("_class_name"))
        raise CheckpointError(f"{where}: a model of class {given}; valid: {_VALID}")
    for key in ("layers_per_block", "num_encoder_blocks", "num_decoder_blocks", "block_out_channels"):
        values = config.get(key) if isinstance(config.get(key), list) else [config.get(key, 1)]
        limit = 2**16 if key == "block_out_channels" else 64
        if len(values) > 14 or not all(type(value) is int and 0 < value <= limit for value in values):
            raise CheckpointError(f"{where}: {key} {truncate(values)}; valid: integers, above 0 and at most {limit}")
    return kind
