"""The input of a network whose norms plan with the magnitude of their input instead of measuring it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn
from typing_extensions import Doc

from gnunet.ops.reference import append_dims

DATA_STD = 0.5


class UnitInput(nn.Module):
    """A noisy image, divided by its expected standard deviation at the timestep.

    With `sample_levels`, rows of an ascending timestep and the factors of image and noise in what the network sees
    there, that is sqrt((image * data_std)^2 + noise^2), linear between the timesteps and constant beyond them. Without
    it, the input is taken to have unit variance. What is concatenated to the image is divided by data_std.

    Args:
        image_channels: how many of the input's channels, the first ones, are the noisy image.
        with_one: append a channel of ones, which stands in for the bias of a convolution without one (Karras et al.,
            arXiv:2312.02696).
    """

    segments: Tensor  # (3, K): start, width and slope of each, fp32 as int32

    def __init__(
        self,
        image_channels: int,
        with_one: bool,
        *,
        data_std: Annotated[
            float,
            Gt(0),
            Doc("Root mean square of images or latents, by which the network's input is scaled to unit variance."),
        ] = DATA_STD,
        sample_levels: Annotated[
            Sequence[Sequence[float]], Doc("Timesteps, with the factors of image and noise in the network's input.")
        ] = (),
    ) -> None:
        super().__init__()
        levels = [tuple(row) for row in sample_levels]
        ascending = all(len(row) == 3 for row in levels) and all(a[0] < b[0] for a, b in pairwise(levels))
        if not (ascending and all(0 < math.hypot(*row[1:]) < math.inf for row in levels)):
            raise ValueError("sample_levels must be ascending timesteps with factors of image and noise, not both 0")
        timesteps, stds = [t for t, _, _ in levels], [math.hypot(image * data_std, noise) for _, image, noise in levels]
        self.image_channels, self.with_one = image_channels, with_one
        self.data_std, self.first_std = (data_std, stds[0]) if stds else (1.0, 1.0)
        widths = [high - low for low, high in pairwise(timesteps)]
        slopes = [(high - low) / width for (low, high), width in zip(pairwise(stds), widths, strict=True)]
        segments = torch.tensor([timesteps[:-1], widths, slopes], dtype=torch.float32)
        # As integers, since Module.to(torch.bfloat16) would round them.
        self.register_buffer("segments", segments.view(torch.int32), persistent=False)

    def expected_std(self, timestep: Tensor) -> Tensor:
        """timestep: (N,) -> fp32 (N,)."""
        start, width, slope = self.segments.view(torch.float32).unbind()
        within = torch.minimum((timestep.float()[:, None] - start).clamp_min(0), width)
        return self.first_std + (within * slope).sum(1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample: (N, C, H, W); timestep: (N,) -> (N, C, H, W), one channel more with_one."""
        factor = self.expected_std(timestep).reciprocal()[:, None].repeat(1, sample.shape[1])
        factor[:, self.image_channels :] = 1 / self.data_std
        scaled = sample * append_dims(factor.to(sample.dtype), sample)
        return F.pad(scaled, (0, 0, 0, 0, 0, 1), value=1.0) if self.with_one else scaled
