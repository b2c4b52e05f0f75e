"""Rectified flow (Liu et al., 2022; Lipman et al., 2023), with logit-normal times (Esser et al., 2024)."""

from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Gt
from torch import Tensor
from typing_extensions import Doc

from gnunet.diffusion.process import NoiseLevel, Process, append_dims


class Flow(Process):
    """Rectified flow (Liu et al., 2022), with the time distributions of Esser et al. (2024).

    x_t = (1 - t) x0 + t noise; the network sees x_t and 1000 t, and predicts the velocity noise - x0.
    The loss weight is 1.

    Args:
        num_train_timesteps: the timestep at t = 1; diffusers' convention is 1000.
    """

    kind = "flow"
    samplers = ("euler", "heun")

    def __init__(
        self,
        t_distribution: Annotated[
            Literal["logit_normal", "uniform"], Doc("Distribution of the time t in training; t = 1 is pure noise.")
        ] = "logit_normal",
        t_mean: Annotated[float, Doc("Mean of logit t (logit_normal).")] = 0.0,
        t_std: Annotated[float, Gt(0), Doc("Standard deviation of logit t (logit_normal).")] = 1.0,
        shift: Annotated[float, Gt(0), Doc("Shift of the sampling times towards noise, for large images.")] = 1.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        self.t_distribution, self.t_mean, self.t_std, self.shift = t_distribution, t_mean, t_std, shift
        self.num_train_timesteps = num_train_timesteps

    def noise_level(self, u: Tensor) -> NoiseLevel:
        """The noise levels of t ~ U(0, 1), or of logit t ~ N(t_mean, t_std^2)."""
        if self.t_distribution == "uniform":
            return self._from_t(u)
        return self._from_t((self.t_mean + self.t_std * torch.special.ndtri(u)).sigmoid())

    def untrained_levels(self) -> tuple[str, str, str] | None:
        if not self._is_far_from_noise_or_image():
            return None
        valid = "at most 6 t_std from -2.3 and from 2.3, so that training has the times between 0.09 and 0.91"
        return "t_mean", f"{self.t_mean:g} with t_std {self.t_std:g}", valid

    def from_log_snr(self, log_snr: Tensor) -> NoiseLevel:
        return self._from_t((-log_snr / 2).sigmoid())

    def levels(self, steps: int) -> NoiseLevel:
        return self._from_t(self.scheduler("euler", steps).sigmas[:-1].double())

    def _from_t(self, t: Tensor) -> NoiseLevel:
        return NoiseLevel.from_float64(1 - t, t, t * self.num_train_timesteps, torch.ones_like(t))

    def target(self, images: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        return noise - images

    def predict_x0(self, output: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
        return x - append_dims(level.sigma) * output  # x - t * velocity

    def scheduler(self, sampler: str, steps: int) -> Any:
        """FlowMatchEulerDiscreteScheduler (euler) or FlowMatchHeunDiscreteScheduler (heun).

        The times are evenly spaced, then shifted. euler's are 1, 1 - 1/steps, ..., 1/steps, 0. heun's are
        diffusers' own: steps - 1 steps to the smallest time, 1/1000 before shifts, then one step of Euler's.
        """
        if self.resolve_sampler(sampler, steps) == "heun":
            from diffusers import FlowMatchHeunDiscreteScheduler

            scheduler = FlowMatchHeunDiscreteScheduler(self.num_train_timesteps, shift=self.shift)
            scheduler.set_timesteps(steps)
        else:
            scheduler = self.export_scheduler()
            # By default its last step goes from 1/1000, shifted twice, to 0.
            scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
        return scheduler

    def export_scheduler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(self.num_train_timesteps, shift=self.shift)
