"""What the U-Net makes of a noise level and of labels besides its time embedding."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from torch import Tensor, nn

MAX_LOG_SNR = 20.0  # in magnitude; no process trains far beyond


def time_projection(config: Mapping[str, Any]) -> nn.Module:
    width = config["block_out_channels"][0]
    if config["time_embedding_type"] == "fourier":
        return GaussianFourierProjection(embedding_size=width, scale=16)
    if config["time_embedding_type"] == "learned":
        return nn.Embedding(config["num_train_timesteps"], width)
    return Timesteps(width, config["flip_sin_to_cos"], config["freq_shift"])


def class_embedding(config: Mapping[str, Any], time_width: int, temb_channels: int) -> nn.Module | None:
    if config["class_embed_type"] == "timestep":
        return TimestepEmbedding(time_width, temb_channels)
    if config["class_embed_type"] == "identity":
        return nn.Identity()
    if config["num_class_embeds"] is not None:
        return nn.Embedding(config["num_class_embeds"], temb_channels)
    return None


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
