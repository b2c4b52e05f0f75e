"""Inpainting with a model that has not seen masks: RePaint (Lugmayr et al., 2022), written from the paper."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gnunet.diffusion.process import ModelFn, NoiseLevel, Process


def repaint_positions(steps: int, jump_length: int, resample: int) -> list[int]:
    """The levels that are visited, from `steps` (noise) to 0 (the image).

    Level 1 and every jump_length-th above it are reached `resample` times: all but the last time, noise is added again
    up to jump_length levels above (Sec. 4.2 of the paper, whose Algorithm 1 has jumps of length 1).
    """
    jumps = dict.fromkeys(range(1, steps - jump_length + 1, jump_length), resample - 1)
    positions = [steps]
    while positions[-1] > 0:
        positions.append(positions[-1] - 1)
        if jumps.get(positions[-1], 0):
            jumps[positions[-1]] -= 1
            positions.append(positions[-1] + jump_length)
    return positions


def repaint(
    process: Process, model_fn: ModelFn, noise: Tensor, known: Tensor, generators: Sequence[torch.Generator], *,
    steps: int, jump_length: int, resample: int,
) -> Tensor:  # fmt: skip
    """Sample images, fp32 (N, C, H, W), that are `known` where it is known.

    Ancestral sampling over the `steps` levels of `process.levels`, for any alpha and sigma. Where the image is known,
    it is replaced after each step by the known image with noise of the level (Eq. 8).

    `noise` is standard normal, fp32 (N, C, H, W); `known` fp32 (N, C + 1, H, W), images in the network's values and 1
    where they are known, 0 elsewhere; `generators` are of the host, one per image, for the noise of each step.
    """
    known, is_known = known[:, :-1], known[:, -1:] > 0
    levels = process.levels(steps)
    count = len(levels.sigma)
    alphas, sigmas = [1.0, *levels.alpha.tolist()[::-1]], [0.0, *levels.sigma.tolist()[::-1]]

    def draw() -> Tensor:
        return torch.stack([torch.randn(noise.shape[1:], generator=each) for each in generators]).to(noise.device)

    x = sigmas[-1] * noise
    for now, following in pairwise(repaint_positions(count, min(jump_length, count), resample)):
        low, high = min(now, following), max(now, following)
        ratio = alphas[high] / alphas[low]
        added = max(sigmas[high] ** 2 - (ratio * sigmas[low]) ** 2, 0.0)  # variance from the lower to the higher level
        if following > now:
            x = ratio * x + math.sqrt(added) * draw()
            continue
        level = NoiseLevel(*(each[count - now].expand(len(x)).to(x.device) for each in vars(levels).values()))
        x0 = process.predict_x0(model_fn(process.network_input(x, level), level.timestep), x, level)
        x0 = x0.clamp(-process.clip, process.clip)
        keep, total = ratio * sigmas[low] ** 2, sigmas[high] ** 2
        mean = (keep * x + alphas[low] * added * x0) / total
        x = mean + sigmas[low] * math.sqrt(added / total) * draw()
        x = torch.where(is_known, alphas[low] * known + sigmas[low] * draw(), x)
    return x
