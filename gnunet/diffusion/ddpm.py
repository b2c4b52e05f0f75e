"""Discrete-time diffusion (Ho et al., 2020), with v-prediction and min-SNR weights."""

import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Gt, Le, Lt
from torch import Tensor
from typing_extensions import Doc

from gnunet.diffusion.process import MAX_START_LOG_SNR, NoiseLevel, Process, append_dims
from gnunet.errors import ConfigError

# Our names -> diffusers'.
PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large")

MIN_LOG_SNR = -10.2
"""The lowest log-SNR at which a deterministic sampler starts. The linear schedule ends just above it. The cosine
schedule reaches -20 in its last 4 timesteps of 1000, from where one step of Heun's method overshoots. DPM-Solver
advises the same bound for cosine schedules, as lambda = log-SNR / 2 = -5.1."""


class DDPM(Process):
    """Discrete-time diffusion (Ho et al., 2020; Nichol & Dhariwal, 2021).

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise for integer t of 0 to T - 1; the network sees x_t and t.

    Args:
        clip_sample: clip estimates of the image to -1..1 in sampling, where all images are.
        schedule: a DDPMScheduler to take betas, prediction type, variance and clipping from instead; ConfigError if
            its prediction type or variance is not supported.
    """

    kind = "ddpm"
    samplers = ("ddim", "ddpm", "dpm++", "euler", "heun")

    def __init__(
        self,
        num_train_timesteps: Annotated[int, Gt(0), Le(100_000), Doc("Number of noise levels.")] = 1000,
        beta_schedule: Annotated[Literal["linear", "cosine"], Doc("Noise schedule.")] = "linear",
        beta_start: Annotated[float, Gt(0), Lt(1), Doc("First beta of the linear schedule.")] = 1e-4,
        beta_end: Annotated[float, Gt(0), Lt(1), Doc("Last beta of the linear schedule.")] = 0.02,
        prediction_type: Annotated[
            Literal["epsilon", "v", "sample"],
            Doc("What the network predicts: the noise, the velocity (Salimans & Ho, 2022) or the image."),
        ] = "epsilon",
        min_snr_gamma: Annotated[
            Annotated[float, Gt(0)] | None,
            Doc("Upper limit of the SNR in the loss weight (Hang et al., 2023), usually 5; null is off."),
        ] = None,
        *,
        clip_sample: bool = True,
        schedule: Any = None,
    ) -> None:
        from diffusers import DDPMScheduler

        self.schedule = schedule or DDPMScheduler(
            num_train_timesteps=num_train_timesteps, beta_schedule=BETA_SCHEDULES[beta_schedule],
            beta_start=beta_start, beta_end=beta_end, prediction_type=PREDICTION_TYPES[prediction_type],
            timestep_spacing="trailing", clip_sample=clip_sample,
        )  # fmt: skip
        config = self.schedule.config
        names = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
        if config.prediction_type not in names:
            raise ConfigError(f"prediction_type: {config.prediction_type!r} given; valid: {', '.join(names)}")
        if config.variance_type not in VARIANCE_TYPES:
            raise ConfigError(f"variance_type: {config.variance_type!r} given; valid: {', '.join(VARIANCE_TYPES)}")
        self.prediction_type = names[config.prediction_type]
        self.num_train_timesteps = len(self.schedule.betas)
        self.clip = config.clip_sample_range if config.clip_sample else math.inf
        # diffusers' fp32 products, so that training and its schedulers agree to the bit; exact from here on.
        alphas_cumprod = self.schedule.alphas_cumprod.double()
        self._alpha, self._sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        snr = alphas_cumprod / (1 - alphas_cumprod)
        self._log_snr = snr.log()
        self._weight = min_snr_weight(snr, min_snr_gamma, self.prediction_type)
        if snr[-1] == 0:  # diffusers' Heun would start from infinity
            self.samplers = tuple(name for name in self.samplers if name != "heun")

    def noise_level(self, u: Tensor) -> NoiseLevel:
        """The noise levels of t = floor(u * T)."""
        t = (u * self.num_train_timesteps).long()
        return self._from_t(t.clamp(max=self.num_train_timesteps - 1))  # u * T may round up to T

    def untrained_levels(self) -> tuple[str, str, str] | None:
        config, steps, alpha = self.schedule.config, self.num_train_timesteps, float(self._alpha[-1])
        if self._log_snr[-1] > MAX_START_LOG_SNR:
            reason = f"the last timestep leaves {alpha:.2f} of the image, but sampling starts from pure noise"
            if config.trained_betas is not None or config.beta_schedule != "linear":
                return "betas", f"{steps} of them", f"a schedule that ends at noise; {reason}"
            goal = -math.log1p(math.exp(-MAX_START_LOG_SNR))  # log alpha^2 at that SNR
            ends = [end for end in np.arange(0.01, 1, 0.01) if steps * _log_decay(config.beta_start, end) <= goal]
            enough = math.ceil(goal / _log_decay(config.beta_start, config.beta_end)) + 1
            wider = f"; or beta_end at least {ends[0]:g}" if ends else ""
            valid = f"at least {enough}{wider}; or beta_schedule cosine: {reason} (Lin et al., 2024)"
            return "num_train_timesteps", f"{steps} with beta_end {config.beta_end:g}", valid
        if alpha == 0 and self.prediction_type == "epsilon":
            valid = "v or sample with a last timestep of pure noise, whose noise says nothing of the image"
            return "prediction_type", "epsilon", valid
        return None

    def from_log_snr(self, log_snr: Tensor) -> NoiseLevel:
        return self._from_t((self._log_snr - log_snr[:, None]).abs().argmin(dim=1))

    def from_timestep(self, timestep: Tensor) -> NoiseLevel:
        return self._from_t(timestep.long())

    def levels(self, steps: int) -> NoiseLevel:
        return self._from_t(torch.tensor(self._timesteps("ddpm", steps)))

    def _from_t(self, t: Tensor) -> NoiseLevel:
        return NoiseLevel.from_float64(self._alpha[t], self._sigma[t], t, self._weight[t])

    def target(self, images: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return images
        return append_dims(level.alpha) * noise - append_dims(level.sigma) * images

    def predict_x0(self, output: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
        alpha, sigma = append_dims(level.alpha), append_dims(level.sigma)
        if self.prediction_type == "epsilon":
            return (x - sigma * output) / alpha
        if self.prediction_type == "sample":
            return output
        return alpha * x - sigma * output

    def to_scheduler(self, output: Tensor, model_input: Tensor, timestep: Tensor) -> Tensor:
        # The estimate of x0, clipped to the images' range. diffusers clips it in some schedulers only, and its DDIM
        # goes on with the noise of the unclipped estimate.
        level = self.from_timestep(timestep.expand(len(output))).to(output.device)
        return self.predict_x0(output, model_input, level).clamp(-self.clip, self.clip)

    def resolve_sampler(self, sampler: str | None, steps: int) -> str:
        if steps > self.num_train_timesteps:
            raise ConfigError(
                f"sampling.num_inference_steps: {steps} given; valid: at most {self.num_train_timesteps}, "
                "the process's timesteps"
            )
        return super().resolve_sampler(sampler, steps)

    def scheduler(self, sampler: str, steps: int) -> Any:
        """A scheduler over the betas of this process, set to take estimates of x0.

        ddpm is the ancestral sampler over timesteps spaced evenly from T - 1 to 0 (Nichol & Dhariwal, 2021).
        The others are deterministic and "trailing" (Lin et al., 2024): the last step goes from T / steps - 1
        to the clean image. ddim is DPM-Solver++ of order 1, which is the same formula (Lu et al., 2022):
        diffusers' DDIMScheduler does not step to its own next timestep where `steps` does not divide T.
        """
        import diffusers

        sampler = self.resolve_sampler(sampler, steps)
        variance = self.schedule.config.variance_type
        cls, options = {
            "ddpm": (diffusers.DDPMScheduler, {"variance_type": variance, "clip_sample": False}),
            "ddim": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 1}),
            "dpm++": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2}),
            "euler": (diffusers.EulerDiscreteScheduler, {}),
            "heun": (diffusers.HeunDiscreteScheduler, {}),
        }[sampler]
        if self.schedule.config.get("rescale_betas_zero_snr"):
            # Rescaling again changes nothing, and the flag keeps some schedulers from starting at infinity.
            options["rescale_betas_zero_snr"] = True
        betas = {"num_train_timesteps": self.num_train_timesteps, "trained_betas": self.schedule.betas.tolist()}
        scheduler = cls(**betas, prediction_type="sample", **options)
        scheduler.set_timesteps(timesteps=self._timesteps(sampler, steps))
        return scheduler

    def _timesteps(self, sampler: str, steps: int) -> list[int]:
        # diffusers' own "trailing" adds a timestep of -1 for 62 of the step counts up to 1000, such as 61.
        if sampler == "ddpm":
            return np.linspace(self.num_train_timesteps - 1, 0, steps).round().astype(int).tolist()
        count = max(1, int((self._log_snr >= MIN_LOG_SNR).sum()))
        steps = min(steps, count)
        return [round(count * (steps - i) / steps) - 1 for i in range(steps)]

    def export_scheduler(self) -> Any:
        return type(self.schedule).from_config(self.schedule.config)


def _log_decay(beta_start: float, beta_end: float) -> float:
    """The mean of log(1 - beta) over a linear schedule."""
    return float(np.log1p(-np.linspace(beta_start, beta_end, 1000)).mean())


def min_snr_weight(snr: Tensor, gamma: float | None, prediction_type: str) -> Tensor:
    """Weight of the network's squared error at each SNR, of any shape (Hang et al., 2023).

    min(SNR, gamma) is the weight of the error in x0. The error in the noise is SNR times as large, and the
    error in v SNR + 1 times.
    """
    if gamma is None:
        return torch.ones_like(snr)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    return snr.clamp(max=gamma) / (snr + 1)
