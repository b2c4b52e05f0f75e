"""What a diffusion process is: noise levels, noising, the training loss, the denoiser and sampling.

Every process noises an image as x = alpha * x0 + sigma * noise. Processes differ in how noise levels are
distributed, in what the network sees and predicts, and in how its error is weighted; a subclass defines only
that. Noise, target, loss and sampler state are fp32 whatever the precision inside the network. diffusers, whose
import takes a second or two, is imported where a scheduler is made: a configuration is made of these classes, too.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gnunet.errors import ConfigError

ModelFn = Callable[[Tensor, Tensor], Tensor]
"""(network input (N, C, H, W), timestep (N,)) -> network output (N, C, H, W), all fp32."""


@dataclass(frozen=True)
class NoiseLevel:
    """The noise levels of N examples; every field is an fp32 tensor of shape (N,)."""

    alpha: Tensor  # factor of the image in x = alpha * x0 + sigma * noise
    sigma: Tensor  # factor of the noise
    timestep: Tensor  # the network's argument
    weight: Tensor  # of the network's mean squared error in the loss
    log_snr: Tensor  # log(alpha^2 / sigma^2)

    @classmethod
    def from_float64(cls, alpha: Tensor, sigma: Tensor, timestep: Tensor, weight: Tensor) -> "NoiseLevel":
        """Round float64 tensors of shape (N,) to fp32, after computing log_snr from them."""
        log_snr = 2 * (alpha.log() - sigma.log())
        return cls(alpha.float(), sigma.float(), timestep.float(), weight.float(), log_snr.float())

    def to(self, device: torch.device | str) -> "NoiseLevel":
        return NoiseLevel(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


MAX_START_LOG_SNR = math.log(0.01)
"""Sampling starts from pure noise, so the image may have at most a tenth of the noise's amplitude at the highest noise
level. It has 0.07 in Stable Diffusion's schedule, 0.006 in DDPM's."""
NEVER = 1e-9  # share of the examples below which noise levels count as not trained: six standard deviations of a normal


class Process(ABC):
    """A diffusion process: `DDPM`, `EDM` or `Flow`; `make_process` makes one by name."""

    kind: ClassVar[str]
    samplers: tuple[str, ...]  # names of the samplers, the default first
    clip: float = math.inf  # bound of the estimates of x0 in sampling

    @abstractmethod
    def noise_level(self, u: Tensor) -> NoiseLevel:
        """Map `u`, float64 (N,) uniform in (0, 1), to training noise levels by their inverse distribution function.

        Computed on the host in float64, so that an example's level is the same on every device.
        """

    @abstractmethod
    def untrained_levels(self) -> tuple[str, str, str] | None:
        """The key, value and valid values of a setting with which sampling starts at noise, or passes levels, that
        training does not have; None if there is none."""

    def _is_far_from_noise_or_image(self) -> bool:
        """Whether training hardly ever draws the levels between image and noise through which sampling passes."""
        extremes = torch.tensor([1 - NEVER, NEVER], dtype=torch.float64)
        noise, image = self.noise_level(extremes).log_snr.tolist()
        return not (noise <= MAX_START_LOG_SNR and image >= -MAX_START_LOG_SNR)

    @abstractmethod
    def from_log_snr(self, log_snr: Tensor) -> NoiseLevel:
        """The noise levels of the process nearest to `log_snr`, float64 (N,) on the host."""

    @abstractmethod
    def from_timestep(self, timestep: Tensor) -> NoiseLevel:
        """The noise levels of the network's timesteps, (N,) on the host."""

    @abstractmethod
    def levels(self, steps: int) -> NoiseLevel:
        """The noise levels of `steps` sampling steps, from noise to image, without the image itself."""

    def network_input(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """What the network sees of the noisy images `x`, fp32 (N, C, H, W)."""
        return x

    @abstractmethod
    def target(self, images: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """What the network should output, fp32 (N, C, H, W)."""

    @abstractmethod
    def predict_x0(self, output: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
        """Convert the network's output at `x` to an estimate of x0, fp32 (N, C, H, W)."""

    def add_noise(self, images: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """The noisy images alpha * images + sigma * noise, fp32 (N, C, H, W)."""
        return append_dims(level.alpha) * images + append_dims(level.sigma) * noise

    def loss_and_objective(
        self, network: nn.Module, images: Tensor, noise: Tensor, level: NoiseLevel, labels: Tensor | None = None,
        condition: Tensor | None = None, **inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Each example's weighted loss, averaged over channels and pixels, and what training minimizes: the loss or,
        where the network gives the logarithm u of the loss that it expects (EDM2), loss / exp(u) + u. Both fp32 (N,).

        Args:
            network: called as network(x, timestep, class_labels=labels, return_dict=False, **inputs); it returns its
                output and, if it gives it, u, fp32 (N,).
            images, noise: fp32 (N, C, H, W); images in [-1, 1], noise standard normal.
            level: from `noise_level`, on the images' device.
            labels: int64 (N,), or None for a network without classes.
            condition: fp32 (N, channels, H, W), what is concatenated to the network's input, or None.
            inputs: what else the network takes.
        """
        x = concatenate(self.network_input(self.add_noise(images, noise, level), level), condition)
        output, *u = network(x, level.timestep, class_labels=labels, return_dict=False, **inputs)
        loss = level.weight * per_sample_mse(output.float(), self.target(images, noise, level))
        return loss, loss * (-u[0]).exp() + u[0] if u else loss

    def denoise(
        self, network: nn.Module, x: Tensor, level: NoiseLevel, labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The network's estimate of x0 from noisy images `x`, fp32 (N, C, H, W)."""
        output = call_model(network, self.network_input(x, level), level.timestep, labels, condition)
        return self.predict_x0(output, x, level)

    @abstractmethod
    def scheduler(self, sampler: str, steps: int) -> Any:
        """A new diffusers scheduler with its timesteps set; its `step` takes what `to_scheduler` returns."""

    def to_scheduler(self, output: Tensor, model_input: Tensor, timestep: Tensor) -> Tensor:
        """Convert the network's output at the scheduler's scaled input to what the scheduler's `step` expects."""
        return output

    @abstractmethod
    def export_scheduler(self) -> Any:
        """The diffusers scheduler saved with an exported model; `process_from_scheduler` reads it."""

    def sample(
        self, model_fn: ModelFn, noise: Tensor, sampler: str, steps: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Turn standard normal noise, fp32 (N, C, H, W), into images, fp32 (N, C, H, W), nominally in [-1, 1].

        Args:
            model_fn: the network, with classifier-free guidance if any.
            generators: one host generator per image, for the noise that a stochastic sampler adds.

        Raises:
            ConfigError: the process has no such sampler, or the sampler cannot take that many steps.
        """
        scheduler = self.scheduler(sampler, steps)
        # Not every diffusers scheduler scales its input or its noise, or takes generators.
        scale_input = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": list(generators)} if takes_generator else {}
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        for timestep in scheduler.timesteps:
            model_input = scale_input(x, timestep)
            output = model_fn(model_input, timestep.float().expand(len(x)).to(x.device))
            output = self.to_scheduler(output, model_input, timestep)
            x = scheduler.step(output, timestep, x, return_dict=False, **options)[0]
        return x

    def resolve_sampler(self, sampler: str | None, steps: int) -> str:
        """The sampler, or by default the first; ConfigError if the process lacks it or it cannot take the steps."""
        if sampler is not None and sampler not in self.samplers:
            raise ConfigError(f"sampling.sampler: {sampler!r} given; valid: {', '.join(self.samplers)} ({self.kind})")
        if steps < 1:
            raise ConfigError(f"sampling.num_inference_steps: {steps} given; valid: 1 or more")
        return sampler or self.samplers[0]


def concatenate(x: Tensor, condition: Tensor | None) -> Tensor:
    """A network's input (N, C, H, W) with a condition, if any, as further channels."""
    return x if condition is None else torch.cat([x, condition], dim=1)


def call_model(
    network: nn.Module, x: Tensor, timestep: Tensor, labels: Tensor | None, condition: Tensor | None = None
) -> Tensor:
    """The network's output, fp32 (N, C, H, W), at `x`, to which a condition is concatenated."""
    x = concatenate(x, condition)
    return network(x, timestep, class_labels=labels, return_dict=False)[0].float()


def append_dims(values: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1)."""
    return values[:, None, None, None]


def per_sample_mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each example, (N, C, H, W) -> (N,)."""
    return (output - target).square().mean(dim=(1, 2, 3))
