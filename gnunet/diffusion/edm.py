"""The preconditioned process of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative
Models" (2022), written from the paper."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Gt
from torch import Tensor
from typing_extensions import Doc

from gnunet.diffusion.process import MAX_START_LOG_SNR, ModelFn, NoiseLevel, Process, append_dims


class EDM(Process):
    """The preconditioned process of Karras et al. (2022).

    x = x0 + sigma * noise; the network sees c_in * x and log(sigma) / 4, and its output F gives the
    denoiser D = c_skip * x + c_out * F (Table 1). The loss is the mean squared error of F, with weight 1.
    """

    kind = "edm"
    samplers = ("heun", "euler", "dpm++")

    def __init__(
        self,
        p_mean: Annotated[float, Doc("Mean of log sigma in training.")] = -1.2,
        p_std: Annotated[float, Gt(0), Doc("Standard deviation of log sigma in training.")] = 1.2,
        sigma_data: Annotated[
            float, Gt(0), Doc("Standard deviation of the images, which are scaled to [-1, 1].")
        ] = 0.5,
        sigma_min: Annotated[float, Gt(0), Doc("Lowest noise level in sampling.")] = 0.002,
        sigma_max: Annotated[float, Gt(0), Doc("Highest noise level in sampling.")] = 80.0,
        rho: Annotated[float, Gt(0), Doc("Curvature of the sampling schedule.")] = 7.0,
    ) -> None:
        self.p_mean, self.p_std, self.sigma_data = p_mean, p_std, sigma_data
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def noise_level(self, u: Tensor) -> NoiseLevel:
        """The noise levels of log sigma ~ N(p_mean, p_std^2)."""
        return self._from_sigma((self.p_mean + self.p_std * torch.special.ndtri(u)).exp())

    def untrained_levels(self) -> tuple[str, str, str] | None:
        if -2 * math.log(self.sigma_max) > MAX_START_LOG_SNR:
            reason = "sampling starts from noise of this standard deviation, without the image that training adds"
            return "sigma_max", f"{self.sigma_max:g}", f"at least {math.exp(-MAX_START_LOG_SNR / 2):g}, since {reason}"
        if self._is_far_from_noise_or_image():
            valid = "at most 6 p_std from -2.3 and from 2.3, so that training has the levels between sigma 0.1 and 10"
            return "p_mean", f"{self.p_mean:g} with p_std {self.p_std:g}", valid
        return None

    def from_log_snr(self, log_snr: Tensor) -> NoiseLevel:
        return self._from_sigma((-log_snr / 2).exp().clamp(self.sigma_min, self.sigma_max))

    def from_timestep(self, timestep: Tensor) -> NoiseLevel:
        return self._from_sigma((4 * timestep.double()).exp())

    def levels(self, steps: int) -> NoiseLevel:
        sigmas = edm_sigmas(steps, self.sigma_min, self.sigma_max, self.rho)
        return self._from_sigma(torch.tensor(sigmas[:-1], dtype=torch.float64))

    def _from_sigma(self, sigma: Tensor) -> NoiseLevel:
        # The paper's weight lambda = 1 / c_out^2 of the error in D is a weight of 1 of the error in F.
        ones = torch.ones_like(sigma)
        return NoiseLevel.from_float64(ones, sigma, sigma.log() / 4, ones)

    def network_input(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return x * append_dims((level.sigma.square() + self.sigma_data**2).rsqrt())

    def target(self, images: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        # (x0 - c_skip * x) / c_out, multiplied out: the difference would cancel at small sigma.
        sigma, data = append_dims(level.sigma), self.sigma_data
        return (images * (sigma / data) - data * noise) * (sigma.square() + data**2).rsqrt()

    def predict_x0(self, output: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
        sigma, data = append_dims(level.sigma), self.sigma_data
        total = sigma.square() + data**2
        return x * (data**2 / total) + output * (sigma * data * total.rsqrt())

    def scheduler(self, sampler: str, steps: int) -> Any:
        """EDMEulerScheduler (euler) or EDMDPMSolverMultistepScheduler (dpm++); heun needs no scheduler."""
        from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

        sampler = self.resolve_sampler(sampler, steps)
        cls = EDMDPMSolverMultistepScheduler if sampler == "dpm++" else EDMEulerScheduler
        scheduler = cls.from_config(self.export_scheduler().config)
        scheduler.set_timesteps(steps)
        return scheduler

    def export_scheduler(self) -> Any:
        from diffusers import EDMEulerScheduler

        # It scales the network's input and output as this process does.
        return EDMEulerScheduler(
            sigma_min=self.sigma_min, sigma_max=self.sigma_max, sigma_data=self.sigma_data, rho=self.rho
        )

    def sample(
        self, model_fn: ModelFn, noise: Tensor, sampler: str, steps: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        if self.resolve_sampler(sampler, steps) != "heun":
            return super().sample(model_fn, noise, sampler, steps, generators)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            level = self._from_sigma(torch.full((len(x),), sigma, dtype=torch.float64)).to(x.device)
            return self.predict_x0(model_fn(self.network_input(x, level), level.timestep), x, level)

        return edm_heun(denoise, noise, edm_sigmas(steps, self.sigma_min, self.sigma_max, self.rho))


def edm_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """The steps + 1 values of sigma from sigma_max to sigma_min, then 0 (Eq. 5)."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / max(steps - 1, 1) * (low - high)) ** rho for i in range(steps)] + [0.0]


def edm_heun(denoise: Callable[[Tensor, float], Tensor], noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Integrate dx/dsigma = (x - D(x; sigma)) / sigma by Heun's second-order method (Algorithm 1).

    `denoise` is D, from x (N, C, H, W) and one sigma to an estimate of x0. The sigmas decrease; where the last is 0,
    it is called 2 * steps - 1 times.
    """
    x = noise * sigmas[0]
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - denoise(x, sigma)) / sigma
        x_next = x + (next_sigma - sigma) * slope
        if next_sigma > 0:  # the slope is not defined at 0, so the last step is Euler's
            slope = (slope + (x_next - denoise(x_next, next_sigma)) / next_sigma) / 2
            x_next = x + (next_sigma - sigma) * slope
        x = x_next
    return x
