"""What every diffusion process offers: noise levels, the training loss, the denoiser, sampling.

All of them noise an image the same way, x = alpha * x0 + sigma * noise, and differ in where the levels lie,
in what the network sees and predicts, and in how its error is weighted. A subclass states those and no more.
Noising, target, loss and sampling state are fp32 whatever the precision inside the network.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gnunet.errors import ConfigError

Predict = Callable[[Tensor, Tensor], Tensor]
"""(network input (N, C, H, W), timestep (N,)) -> network output (N, C, H, W), all fp32."""


@dataclass(frozen=True)
class Level:
    """Noise levels of N examples; every field is an fp32 tensor of shape (N,)."""

    alpha: Tensor
    """Factor of the image in x = alpha * x0 + sigma * noise."""
    sigma: Tensor
    """Factor of the noise."""
    timestep: Tensor
    """What the network's `timestep` argument takes."""
    weight: Tensor
    """Weight of the network's mean squared error in the loss."""
    log_snr: Tensor
    """log(alpha^2 / sigma^2)."""

    @classmethod
    def from_float64(cls, alpha: Tensor, sigma: Tensor, timestep: Tensor, weight: Tensor) -> "Level":
        """Round float64 tensors of shape (N,) to a level, with the log-SNR that they imply."""
        log_snr = 2 * (alpha.log() - sigma.log())
        return cls(alpha.float(), sigma.float(), timestep.float(), weight.float(), log_snr.float())

    def to(self, device: torch.device | str) -> "Level":
        """The same levels on another device."""
        return Level(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def __len__(self) -> int:
        return len(self.alpha)


class Process(ABC):
    """A diffusion process: see `DDPM`, `EDM` and `Flow`, and `make_process` to get one by name."""

    kind: ClassVar[str]
    samplers: tuple[str, ...]
    """Names of the samplers it has."""
    default_sampler: ClassVar[str]

    @abstractmethod
    def level(self, u: Tensor) -> Level:
        """Levels of training: `u`, float64 (N,) uniform in (0, 1), through the inverse of their distribution.

        Computed on the host in float64, so that an example's level is the same whatever device trains on it.
        """

    @abstractmethod
    def from_log_snr(self, log_snr: Tensor) -> Level:
        """The process' levels nearest to `log_snr`, float64 (N,), on the host."""

    @abstractmethod
    def target(self, images: Tensor, noise: Tensor, level: Level) -> Tensor:
        """What the network should output, fp32 (N, C, H, W)."""

    @abstractmethod
    def predict_x0(self, output: Tensor, x: Tensor, level: Level) -> Tensor:
        """The estimate of x0 that a network output at `x` stands for, fp32 (N, C, H, W)."""

    @abstractmethod
    def scheduler(self, sampler: str, steps: int) -> Any:
        """A fresh diffusers scheduler with its timesteps set, on the host; `to_scheduler` makes its input.

        Raises:
            ConfigError: the process has no such sampler, or the sampler cannot take so many steps.
        """

    @abstractmethod
    def export_scheduler(self) -> Any:
        """The diffusers scheduler to save beside an exported model, which `process_from_scheduler` reads."""

    def network_input(self, x: Tensor, level: Level) -> Tensor:
        """What the network sees of `x`, fp32 (N, C, H, W)."""
        return x

    def to_scheduler(self, output: Tensor, model_input: Tensor, timestep: Tensor) -> Tensor:
        """What `scheduler`'s step expects, from the network's output at the scheduler's scaled input."""
        return output

    def loss(
        self, network: nn.Module, images: Tensor, noise: Tensor, level: Level, labels: Tensor | None = None
    ) -> Tensor:
        """Each example's weighted loss, fp32 (N,), averaged over channels and pixels.

        Args:
            network: called as network(x, timestep, class_labels=labels, return_dict=False)[0].
            images: (N, C, H, W) fp32 in [-1, 1].
            noise: (N, C, H, W) fp32, standard normal.
            level: from `level`, on the images' device.
            labels: (N,) int64, or None for a network without classes.
        """
        x = expand(level.alpha) * images + expand(level.sigma) * noise
        output = call_model(network, self.network_input(x, level), level.timestep, labels)
        return level.weight * mean_square(output - self.target(images, noise, level))

    def denoise(self, network: nn.Module, x: Tensor, level: Level, labels: Tensor | None = None) -> Tensor:
        """The network's estimate of x0 given x = alpha * x0 + sigma * noise; all fp32 (N, C, H, W)."""
        output = call_model(network, self.network_input(x, level), level.timestep, labels)
        return self.predict_x0(output, x, level)

    def sample(
        self, predict: Predict, noise: Tensor, sampler: str, steps: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Turn noise into images.

        Args:
            predict: the network, guided if need be.
            noise: (N, C, H, W) fp32, standard normal.
            sampler: one of `samplers`.
            steps: sampling steps.
            generators: one host generator per image, for the noise that a stochastic sampler adds.

        Returns:
            (N, C, H, W) fp32, nominally in [-1, 1].

        Raises:
            ConfigError: the process has no such sampler, or the sampler cannot take so many steps.
        """
        scheduler = self.scheduler(sampler, steps)
        # Not every diffusers scheduler scales its input or its noise, or takes generators.
        scale_input = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": list(generators)} if takes_generator else {}
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        for timestep in scheduler.timesteps:
            model_input = scale_input(x, timestep)
            output = predict(model_input, timestep.float().expand(len(x)).to(x.device))
            output = self.to_scheduler(output, model_input, timestep)
            x = scheduler.step(output, timestep, x, return_dict=False, **options)[0]
        return x

    def check_sampler(self, sampler: str | None, steps: int) -> str:
        """The name of the sampler to use: `sampler`, or `default_sampler` for None.

        Raises:
            ConfigError: the process has no such sampler, or the sampler cannot take so many steps.
        """
        name = self.default_sampler if sampler is None else sampler
        if name not in self.samplers:
            raise ConfigError(
                f"sampling.sampler: {self.kind} has no sampler {name!r}; valid: {', '.join(self.samplers)}"
            )
        if steps < 1:
            raise ConfigError(f"sampling.steps: {steps} given; valid: 1 or more")
        return name


def call_model(network: nn.Module, x: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
    """The network's output, fp32 (N, C, H, W)."""
    return network(x, timestep, class_labels=labels, return_dict=False)[0].float()


def expand(values: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1)."""
    return values[:, None, None, None]


def mean_square(x: Tensor) -> Tensor:
    """Mean of the squares over each example, (N, C, H, W) -> (N,)."""
    return x.square().mean(dim=(1, 2, 3))
