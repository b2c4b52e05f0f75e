"""Rectified flow (Liu et al., 2022; Lipman et al., 2023), with logit-normal times (Esser et al., 2024)."""

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from gnunet.config import FlowConfig
from gnunet.diffusion.process import Level, Process, expand


class Flow(Process):
    """x_t = (1 - t) x0 + t noise; the network sees x_t and 1000 t, and predicts the velocity noise - x0.

    Args:
        config: distribution of t in training, shift of the times in sampling.
        num_train_timesteps: the timestep at t = 1; diffusers' convention is 1000.
    """

    kind = "flow"
    samplers = ("euler", "heun")
    default_sampler = "euler"

    def __init__(self, config: FlowConfig, num_train_timesteps: int = 1000) -> None:
        self.config = config
        self.num_train_timesteps = num_train_timesteps

    def level(self, u: Tensor) -> Level:
        """Levels of t ~ U(0, 1), or of logit t ~ N(t_mean, t_std^2)."""
        if self.config.t_distribution == "uniform":
            return self._at(u)
        return self._at((self.config.t_mean + self.config.t_std * torch.special.ndtri(u)).sigmoid())

    def level_at(self, log_snr: Tensor) -> Level:
        """Levels at `log_snr`, float64 (N,): t = 1 / (1 + exp(log_snr / 2)); every finite log-SNR has one."""
        return self._at((-log_snr / 2).sigmoid())

    def _at(self, t: Tensor) -> Level:
        return Level.from_float64(1 - t, t, t * self.num_train_timesteps, torch.ones_like(t))

    def target(self, images: Tensor, noise: Tensor, level: Level) -> Tensor:
        return noise - images

    def to_image(self, output: Tensor, x: Tensor, level: Level) -> Tensor:
        """x - t * velocity (alpha and sigma sum to 1)."""
        return x - expand(level.sigma) * output

    def scheduler(self, sampler: str, steps: int) -> Any:
        """FlowMatchEulerDiscreteScheduler (euler) or FlowMatchHeunDiscreteScheduler (heun).

        The times are even, then shifted. euler's are 1, 1 - 1/steps, ..., 1/steps, 0. heun's are diffusers'
        own: steps - 1 steps to the smallest time, 1/1000 before shifts, and one step of Euler's from there.
        """
        sampler = self.check_sampler(sampler, steps)
        if sampler == "heun":
            scheduler = FlowMatchHeunDiscreteScheduler(self.num_train_timesteps, shift=self.config.shift)
            scheduler.set_timesteps(steps)
        else:
            scheduler = self.export_scheduler()
            # Left to itself it spends its last step between 1/1000, shifted twice, and 0.
            scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
        return scheduler

    def export_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """A FlowMatchEulerDiscreteScheduler with this process' shift."""
        return FlowMatchEulerDiscreteScheduler(self.num_train_timesteps, shift=self.config.shift)
