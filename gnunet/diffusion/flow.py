"""Rectified flow (Liu et al., 2022; Lipman et al., 2023), with logit-normal times (Esser et al., 2024) or prediction of
the image (Li & He, "Back to Basics: Let Denoising Generative Models Denoise", 2025)."""

from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Gt
from torch import Tensor
from typing_extensions import Doc

from gnunet.diffusion.process import NoiseLevel, Process, append_dims

MIN_T = 0.05
"""The least t by which an error of the image is divided for that of the velocity (Li & He, 2025)."""


class Flow(Process):
    """Rectified flow (Liu et al., 2022), with the time distributions of Esser et al. (2024).

    x_t = (1 - t) x0 + t noise; the network sees x_t and 1000 t, and predicts the velocity noise - x0, or x0.
    The loss is the mean squared error of the velocity; that of a predicted x0 is divided by max(t, MIN_T)^2 for it.

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
        prediction_type: Annotated[
            Literal["velocity", "sample"],
            Doc("What the network predicts: the velocity, or the image (Li & He, 2025); the loss is the velocity's."),
        ] = "velocity",
    ) -> None:
        self.t_distribution, self.t_mean, self.t_std, self.shift = t_distribution, t_mean, t_std, shift
        self.prediction_type, self.num_train_timesteps = prediction_type, num_train_timesteps

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

    def from_timestep(self, timestep: Tensor) -> NoiseLevel:
        return self._from_t(timestep.double() / self.num_train_timesteps)

    def levels(self, steps: int) -> NoiseLevel:
        return self._from_t(self.scheduler("euler", steps).sigmas[:-1].double())

    def _from_t(self, t: Tensor) -> NoiseLevel:
        weight = torch.ones_like(t) if self.prediction_type == "velocity" else t.clamp(min=MIN_T) ** -2
        return NoiseLevel.from_float64(1 - t, t, t * self.num_train_timesteps, weight)

    def target(self, images: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        return noise - images if self.prediction_type == "velocity" else images

    def predict_x0(self, output: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
        return output if self.prediction_type == "sample" else x - append_dims(level.sigma) * output

    def to_scheduler(self, output: Tensor, model_input: Tensor, timestep: Tensor) -> Tensor:
        if self.prediction_type == "velocity":
            return output
        return (model_input - output) * (self.num_train_timesteps / timestep)

    def scheduler(self, sampler: str, steps: int) -> Any:
        """FlowMatchEulerDiscreteScheduler (euler) or FlowMatchHeunDiscreteScheduler (heun).

        The times are evenly spaced, then shifted. euler's are 1, 1 - 1/steps, ..., 1/steps, 0. heun's are
        diffusers' own: steps - 1 steps to the smallest time, 1/1000 before shifts, then one step of Euler's. There an
        error of a predicted image is one of 1000 times its size in the velocity: then the smallest time is euler's.
        """
        if self.resolve_sampler(sampler, steps) == "heun":
            from diffusers import FlowMatchHeunDiscreteScheduler

            scheduler = FlowMatchHeunDiscreteScheduler(self.num_train_timesteps, shift=self.shift)
            if self.prediction_type == "sample":
                scheduler.sigma_min = 1 / steps
            scheduler.set_timesteps(steps)
        else:
            scheduler = self.export_scheduler()
            # By default its last step goes from 1/1000, shifted twice, to 0.
            scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
        return scheduler

    def export_scheduler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(self.num_train_timesteps, shift=self.shift)
        if self.prediction_type == "sample":  # which it does not know: it takes velocities
            scheduler.register_to_config(prediction_type="sample")
        return scheduler
