"""Discrete-time diffusion (Ho et al., 2020), with v-prediction and min-SNR weights."""

import math
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from gnunet.diffusion.process import Level, Process, expand
from gnunet.errors import ConfigError

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
"""Our names of the prediction types, and diffusers'."""

BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
"""Our names of the beta schedules, and diffusers'."""

# The lowest log-SNR at which a deterministic sampler starts. The linear schedule ends just above it. The
# cosine schedule goes on to -20 in its last 4 timesteps of 1000, from where one step of Heun's method
# overshoots. The same bound, as lambda = log-SNR / 2 = -5.1, is DPM-Solver's advice for cosine schedules.
LOWEST_LOG_SNR = -10.2


class DDPM(Process):
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise for integer t; the network sees x_t and t.

    Args:
        schedule: a DDPMScheduler, whose betas, prediction type and clipping are taken.
        min_snr_gamma: clamp of the SNR in the loss weight (Hang et al., 2023); None weighs all levels 1.

    Raises:
        ConfigError: the schedule predicts something else than epsilon, sample or v, or learns its variance.
    """

    kind = "ddpm"
    default_sampler = "ddim"

    def __init__(self, schedule: DDPMScheduler, min_snr_gamma: float | None = None) -> None:
        config = schedule.config
        names = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
        if config.prediction_type not in names:
            raise ConfigError(f"prediction_type: {config.prediction_type!r} given; valid: {', '.join(names)}")
        if config.variance_type not in ("fixed_small", "fixed_small_log", "fixed_large"):
            raise ConfigError(
                f"variance_type: {config.variance_type!r} given; valid: fixed_small, fixed_small_log, fixed_large"
            )
        self.schedule = schedule
        self.prediction_type = names[config.prediction_type]
        self.num_train_timesteps = len(schedule.betas)
        self._clip = config.clip_sample_range if config.clip_sample else math.inf
        # diffusers' fp32 products, so that training and its schedulers agree to the bit; exact from here on.
        signal = schedule.alphas_cumprod.double()
        self._alpha, self._sigma = signal.sqrt(), (1 - signal).sqrt()
        snr = signal / (1 - signal)
        self._log_snr = snr.log()
        self._weight = min_snr_weight(snr, min_snr_gamma, self.prediction_type)
        self.samplers = ("ddpm", "ddim", "dpm++", "euler", "heun")
        if snr[-1] == 0:
            self.samplers = ("ddpm", "ddim", "dpm++", "euler")  # diffusers' Heun would start from infinity

    def level(self, u: Tensor) -> Level:
        """Levels of t = floor(u * T)."""
        t = (u * self.num_train_timesteps).long()
        return self._at(t.clamp(max=self.num_train_timesteps - 1))  # u * T may round up to T

    def from_log_snr(self, log_snr: Tensor) -> Level:
        """Levels of the timesteps whose log-SNR is nearest to `log_snr`, float64 (N,)."""
        return self._at((self._log_snr - log_snr[:, None]).abs().argmin(dim=1))

    def _at(self, t: Tensor) -> Level:
        return Level.from_float64(self._alpha[t], self._sigma[t], t, self._weight[t])

    def target(self, images: Tensor, noise: Tensor, level: Level) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return images
        return expand(level.alpha) * noise - expand(level.sigma) * images

    def predict_x0(self, output: Tensor, x: Tensor, level: Level) -> Tensor:
        alpha, sigma = expand(level.alpha), expand(level.sigma)
        if self.prediction_type == "epsilon":
            return (x - sigma * output) / alpha
        if self.prediction_type == "sample":
            return output
        return alpha * x - sigma * output

    def to_scheduler(self, output: Tensor, model_input: Tensor, timestep: Tensor) -> Tensor:
        """The estimate of x0, clipped to the images' range: the schedulers are set to take that.

        (diffusers clips it in some schedulers only, and DDIM's goes on with the unclipped estimate's noise.)
        """
        level = self._at(timestep.long().expand(len(output))).to(output.device)
        return self.predict_x0(output, model_input, level).clamp(-self._clip, self._clip)

    def check_sampler(self, sampler: str | None, steps: int) -> str:
        name = super().check_sampler(sampler, steps)
        if steps > self.num_train_timesteps:
            raise ConfigError(
                f"sampling.steps: {steps} given; valid: at most {self.num_train_timesteps}, "
                "the timesteps of the process"
            )
        return name

    def scheduler(self, sampler: str, steps: int) -> Any:
        """A scheduler over the betas of this process; see `Process.scheduler`.

        ddpm is the ancestral sampler over timesteps spaced evenly from T - 1 to 0 (Nichol & Dhariwal, 2021).
        The others are deterministic and "trailing" (Lin et al., 2024): the last step goes from T / steps - 1
        to the clean image. ddim is DPM-Solver++ of order 1, which is the same formula (Lu et al., 2022):
        diffusers' DDIMScheduler does not step to its own next timestep where `steps` does not divide T.
        """
        sampler = self.check_sampler(sampler, steps)
        cls, options = {
            "ddpm": (
                DDPMScheduler, {"variance_type": self.schedule.config.variance_type, "clip_sample": False}
            ),
            "ddim": (DPMSolverMultistepScheduler, {"solver_order": 1}),
            "dpm++": (DPMSolverMultistepScheduler, {"solver_order": 2}),
            "euler": (EulerDiscreteScheduler, {}),
            "heun": (HeunDiscreteScheduler, {}),
        }[sampler]  # fmt: skip
        scheduler = cls(**beta_options(self.schedule), prediction_type="sample", **options)
        scheduler.set_timesteps(timesteps=self._timesteps(sampler, steps))
        return scheduler

    def _timesteps(self, sampler: str, steps: int) -> list[int]:
        """The timesteps of a sampler, falling.

        (diffusers' own "trailing" adds a timestep of -1 for 62 of the step counts up to 1000, such as 61.)
        """
        if sampler == "ddpm":
            return np.linspace(self.num_train_timesteps - 1, 0, steps).round().astype(int).tolist()
        count = max(1, int((self._log_snr >= LOWEST_LOG_SNR).sum()))
        steps = min(steps, count)
        return [round(count * (steps - i) / steps) - 1 for i in range(steps)]

    def export_scheduler(self) -> DDPMScheduler:
        """A DDPMScheduler, as diffusers' DDPMPipeline takes it."""
        return DDPMScheduler.from_config(self.schedule.config)


def make_schedule(
    num_train_timesteps: int, beta_schedule: str, beta_start: float, beta_end: float, prediction_type: str
) -> DDPMScheduler:
    """diffusers' scheduler for our names of schedule and prediction type."""
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps, beta_schedule=BETA_SCHEDULES[beta_schedule],
        beta_start=beta_start, beta_end=beta_end, prediction_type=PREDICTION_TYPES[prediction_type],
        timestep_spacing="trailing",
    )  # fmt: skip


def beta_options(scheduler: Any) -> dict[str, Any]:
    """The betas of a diffusers scheduler as arguments of another one, whatever its own names for them."""
    options = {"num_train_timesteps": len(scheduler.betas), "trained_betas": scheduler.betas.tolist()}
    if scheduler.config.get("rescale_betas_zero_snr"):
        # Rescaling again changes nothing, and the flag keeps some schedulers from starting at infinity.
        options["rescale_betas_zero_snr"] = True
    return options


def min_snr_weight(snr: Tensor, gamma: float | None, prediction_type: str) -> Tensor:
    """Weight of the network's squared error at each SNR, of any shape (Hang et al., 2023).

    min(SNR, gamma) is the weight of the error in x0. The same error, as that of the noise, is SNR times
    larger, and as that of v, SNR + 1 times.
    """
    if gamma is None:
        return torch.ones_like(snr)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    return snr.clamp(max=gamma) / (snr + 1)
