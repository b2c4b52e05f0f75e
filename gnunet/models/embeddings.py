"""What the U-Net makes of a noise level and of labels besides its time embedding."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from torch import Tensor, nn

from gnunet.norms.magnitude import MagnitudePreservingLinear, mp_silu

MAX_LOG_SNR = 20.0  # in magnitude; no process trains far beyond


def time_projection(config: Mapping[str, Any]) -> nn.Module:
    width = config["block_out_channels"][0]
    if config["time_embedding_type"] == "fourier":
        return GaussianFourierProjection(embedding_size=width, scale=16)
    if config["time_embedding_type"] == "learned":
        return nn.Embedding(config["num_train_timesteps"], width)
    return Timesteps(width, config["flip_sin_to_cos"], config["freq_shift"])


def sinusoid_embedding(time_width: int, temb_channels: int, preserves_magnitude: bool) -> nn.Module:
    embedding = MPSinusoidEmbedding if preserves_magnitude else TimestepEmbedding
    return embedding(time_width, temb_channels)


def class_embedding(
    config: Mapping[str, Any], time_width: int, temb_channels: int, preserves_magnitude: bool
) -> nn.Module | None:
    if config["class_embed_type"] == "timestep":
        return sinusoid_embedding(time_width, temb_channels, preserves_magnitude)
    if config["class_embed_type"] == "identity":
        return nn.Identity()
    if config["num_class_embeds"] is not None:
        embedding = MagnitudePreservingLinear if preserves_magnitude else nn.Embedding
        return embedding(config["num_class_embeds"], temb_channels)
    return None


def embed(
    unet: Any, timestep: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """SiLU of a UNet2D's embedding of timesteps and labels, (N, temb_channels) in `dtype`."""
    projected = unet.time_proj(timestep).to(dtype)
    if augment_labels is not None:
        projected = projected + unet.augment_embedding(augment_labels.to(dtype))
    emb = unet.time_embedding(projected)
    if unet.class_embedding is None:
        if class_labels is not None:
            raise ValueError("class_labels were given to a model without class embedding")
    else:
        if class_labels is None:
            raise ValueError("a model with class embedding needs class_labels")
        if unet.config.class_embed_type == "timestep":
            class_labels = unet.time_proj(class_labels).to(dtype)
        elif unet.preserves_magnitude and (classes := unet.config.num_class_embeds):
            class_labels = F.one_hot(class_labels, classes).to(dtype) * math.sqrt(classes)
        emb = emb + unet.class_embedding(class_labels).to(dtype)
        emb = emb / math.sqrt(2) if unet.preserves_magnitude else emb
    return mp_silu(emb) if unet.preserves_magnitude else F.silu(emb)


class MPSinusoidEmbedding(nn.Module):
    """diffusers' TimestepEmbedding of sines and cosines, of unit magnitude and without biases (Karras et al., 2024)."""

    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = MagnitudePreservingLinear(in_channels, time_embed_dim)
        self.linear_2 = MagnitudePreservingLinear(time_embed_dim, time_embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear_1(x * math.sqrt(2))
        return self.linear_2(mp_silu(h))


class LossLogVariance(nn.Module):
    """u(log-SNR), learned by minimizing loss / exp(u) + u, where exp(u) is the loss that is expected at a noise level.

    Linear in a Fourier basis (Karras et al., 2024, EDM2, after Kendall et al., 2018); zero at first.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, log_snr: Tensor) -> Tensor:
        """fp32 (N,) -> fp32 (N,)."""
        angle = math.pi / 2 * (1 + log_snr.clamp(-MAX_LOG_SNR, MAX_LOG_SNR) / MAX_LOG_SNR)
        basis = (angle[:, None] * torch.arange(len(self.weight), device=log_snr.device)).cos()
        return (basis * self.weight).sum(dim=1)
