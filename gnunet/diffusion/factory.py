"""A process by name, or from the scheduler saved beside a diffusers model."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from diffusers import (
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from gnunet.diffusion.ddpm import DDPM, beta_options, make_schedule
from gnunet.diffusion.edm import EDM
from gnunet.diffusion.flow import Flow
from gnunet.diffusion.process import Process
from gnunet.errors import ConfigError

LARGEST = 100_000
"""Bound of a scheduler's numbers and lists: it makes tables of as many entries as it has timesteps."""


def make_process(kind: str, **settings: Any) -> Process:
    """The process of a kind: `ddpm`, `edm` or `flow`.

    Args:
        settings: the arguments of `ddpm_process`, `EDM` or `Flow`.
    """
    processes: dict[str, Callable[..., Process]] = {"ddpm": ddpm_process, "edm": EDM, "flow": Flow}
    return processes[kind](**settings)


def ddpm_process(
    num_train_timesteps: int = 1000,
    beta_schedule: str = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    prediction_type: str = "epsilon",
    min_snr_gamma: float | None = None,
) -> DDPM:
    """DDPM over a `linear` or `cosine` schedule of betas, predicting `epsilon`, `v` or the `sample`."""
    schedule = make_schedule(num_train_timesteps, beta_schedule, beta_start, beta_end, prediction_type)
    return DDPM(schedule, min_snr_gamma)


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Refuse a scheduler's config, as JSON has it, that could make building the scheduler take without bound.

    Raises:
        ConfigError: a number beyond LARGEST, a longer list, or a nested value; names the key.
    """
    for key, value in config.items():
        if isinstance(value, list) and len(value) > LARGEST:
            raise ConfigError(f"{key[:100]}: a list of {len(value)}; valid: at most {LARGEST} numbers")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, (list, dict)) or (isinstance(item, str) and len(item) > 1000):
                raise ConfigError(f"{key[:100]}: {repr(item)[:100]}; valid: a number, a word or a list of these")
            # Some classes save no bound of lambda as minus infinity.
            if isinstance(item, (int, float)) and not abs(item) <= LARGEST and key != "lambda_min_clipped":
                raise ConfigError(f"{key[:100]}: {repr(item)[:100]} given; valid: a number, at most {LARGEST}")


def process_from_scheduler(scheduler: Any) -> Process:
    """The process that a diffusers scheduler samples from; what concerns training only takes its default.

    Args:
        scheduler: an EDM or flow-match scheduler, or one over betas (DDPM, DDIM, DPM-Solver, Euler, ...).

    Raises:
        ConfigError: the scheduler belongs to none of the processes, or has an option that they lack.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    if isinstance(scheduler, (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)):
        require_config(config, name, prediction_type="epsilon", sigma_schedule="karras")
        keys = ("sigma_min", "sigma_max", "sigma_data", "rho")
        return EDM(**{key: _positive(config, name, key) for key in keys})
    if isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)):
        require_config(config, name, use_dynamic_shifting=False, invert_sigmas=False)
        return Flow(shift=_positive(config, name, "shift"), num_train_timesteps=config.num_train_timesteps)
    if not hasattr(scheduler, "betas"):
        raise ConfigError(
            f"scheduler: {name} given; valid: schedulers over betas (DDPMScheduler, DDIMScheduler, ...), "
            "EDMEulerScheduler, EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, "
            "FlowMatchHeunDiscreteScheduler"
        )
    if isinstance(scheduler, DDPMScheduler):
        return DDPM(scheduler)
    require_config(config, name, use_flow_sigmas=False, timestep_type="discrete")
    return DDPM(
        DDPMScheduler(
            **beta_options(scheduler), prediction_type=config.prediction_type,
            variance_type=config.get("variance_type") or "fixed_small",
            clip_sample=config.get("clip_sample", True),
            clip_sample_range=config.get("clip_sample_range", 1.0), timestep_spacing="trailing",
        )
    )  # fmt: skip


def _positive(config: Any, name: str, key: str) -> float:
    value = float(config[key])
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}.{key}: {value!r} given; valid: a number above 0")
    return value


def require_config(config: Any, name: str, **expected: Any) -> None:
    """Raise ConfigError where a scheduler's config has another value under a key than the one supported."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{name}.{key}: {config[key]!r} given; valid: {value!r}")
