"""Autoencoders of diffusers, in whose latent space a network is trained and sampled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from gnunet.errors import CheckpointError, first_line, truncate
from gnunet.safe_io import read_json
from gnunet.scaling import Scaling, per_channel, to_unit_range

from .pretrained import check_pretrained, find_model, weights_digest

KINDS: dict[Any, Any] = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny, VQModel)}
WEIGHTLESS = ("act_fn", "norm_num_groups", "upsample_fn")  # config keys that change outputs and no weight
SUBFOLDERS = ("", "vae/", "vqvae/")  # where the autoencoder is in a folder of its own, and in pipelines


@dataclass(frozen=True)
class Autoencoder:
    """A frozen autoencoder, fp32 and in eval mode, that is given pictures and takes and gives a network's latents."""

    model: ModelMixin
    channels: int  # of pictures: 1 or 3
    latent_channels: int
    reduction: int  # how many times latents are smaller than pictures, in height and width
    scaling: Scaling  # of latents, by scaling_factor and shift_factor, or latents_mean and latents_std
    digest: str  # sha256 of the weights, the scaling, and keys of WEIGHTLESS that do not have diffusers' values
    earlier_digest: str  # without these keys, as runs may have stored it

    @classmethod
    def of(cls, model: ModelMixin) -> Autoencoder:
        """Raises CheckpointError if the channels or the size of its pictures, or its scaling, are not valid."""
        config = model.config
        channels, latent_channels = config.in_channels, config.get("vq_embed_dim") or config.latent_channels
        if channels not in (1, 3) or config.out_channels != channels:
            given = f"in_channels {channels} and out_channels {config.out_channels}"
            raise CheckpointError(f"{given}; valid: 1 for both, or 3")
        widths = config.get("encoder_block_out_channels") or config.block_out_channels
        means = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * latent_channels
        factor, stds = config.scaling_factor, config.get("latents_std") or [1.0] * latent_channels
        try:
            scales = {"offset": means, "scale": [std / factor for std in stds]}
            scaling = Scaling.from_dict({"dtype": "float32", **scales}, latent_channels, "its config")
        except (TypeError, ZeroDivisionError, CheckpointError):
            given = truncate(f"scaling_factor {factor}, shift_factor, latents_mean {means}, latents_std {stds}")
            raise CheckpointError(f"{given}; valid: numbers, and factor and deviations above 0") from None
        reduction, model = 2 ** (len(widths) - 1), model.float().eval().requires_grad_(False)
        with torch.device("meta"):  # shapes alone, as an untrusted config may enlarge without bound
            enlarged = type(model).from_config(config).decode(torch.zeros(1, latent_channels, 2, 2)).sample.shape
        if enlarged != (1, channels, 2 * reduction, 2 * reduction):
            raise CheckpointError(f"decodes 2 x 2 to {tuple(enlarged)}; valid: {reduction} times larger, as its config")
        text, options = repr((type(model).__name__, scaling.offset, scaling.scale)), signature(type(model)).parameters
        changed = [(key, config[key]) for key in WEIGHTLESS if key in config and config[key] != options[key].default]
        earlier = weights_digest(text, model)
        digest = weights_digest(text + repr(changed), model) if changed else earlier
        return cls(model, channels, latent_channels, reduction, scaling, digest, earlier)

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 pictures (n, H, W, channels) to latents as a network sees them, fp32 (n, h, w, latent_channels), or
        (n, h, w, 2 * latent_channels) with the means, then the standard deviations of AutoencoderKL's distributions."""
        found = self.model.encode(to_unit_range(torch.from_numpy(pictures).to(self.model.device).permute(0, 3, 1, 2)))
        if "latents" in found:
            latents = self.scaling.to_network(found.latents)
        else:
            mean, std = found.latent_dist.mean, found.latent_dist.std
            scaled = std / per_channel(self.scaling.scale, std.device)
            latents = torch.cat([self.scaling.to_network(mean), scaled], dim=1)
        return latents.permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """A network's latents (n, latent_channels, h, w), on any device, to images in [-1, 1], (n, channels, H, W)."""
        offset, scale = (per_channel(values, x.device) for values in (self.scaling.offset, self.scaling.scale))
        return self.model.to(x.device).decode(x * scale + offset).sample


def load_autoencoder(name: str | Path, expected: str | None = None) -> Autoencoder:
    """Load an autoencoder on the CPU from a folder of diffusers' AutoencoderKL, AutoencoderTiny or VQModel, or of a
    pipeline with one, or by its name on the Hugging Face hub.

    It may be untrusted: only safetensors are read, after their headers match the configuration. Raises CheckpointError
    if there is none, it is damaged or of another kind, or has another digest than the one that is expected.
    """
    found = find_model(str(name), *SUBFOLDERS)
    folder = next((found / each for each in SUBFOLDERS if (found / each / "config.json").is_file()), found)
    try:
        kind = _kind(read_json(folder / "config.json"))
        check_pretrained(kind, folder)
        autoencoder = Autoencoder.of(kind.from_pretrained(folder, use_safetensors=True))
    except Exception as error:  # of any kind, as diffusers raises them
        valid = "diffusers' AutoencoderKL, AutoencoderTiny or VQModel, with safetensors weights"
        reason = truncate(first_line(error), 300)
        raise CheckpointError(f"{name}: no autoencoder that gnunet can load: {reason}; valid: {valid}") from None
    if expected == autoencoder.earlier_digest:
        return replace(autoencoder, digest=expected)
    if expected not in (None, autoencoder.digest):
        raise CheckpointError(f"{folder}: another autoencoder, or another scaling, than the model was trained with")
    return autoencoder


def _kind(config: dict[str, Any]) -> Any:
    """The class of a config, which builds in bounded time."""
    if (kind := KINDS.get(str(config.get("_class_name")))) is None:
        raise CheckpointError(f"a model of class {truncate(config.get('_class_name'))}")
    for key in ("layers_per_block", "num_encoder_blocks", "num_decoder_blocks", "block_out_channels"):
        values = config.get(key) if isinstance(config.get(key), list) else [config.get(key, 1)]
        limit = 2**16 if key == "block_out_channels" else 64
        if len(values) > 14 or not all(type(value) is int and 0 < value <= limit for value in values):
            raise CheckpointError(f"{key} {truncate(values)}; valid: integers, above 0 and at most {limit}")
    return kind
