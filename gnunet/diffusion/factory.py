"""A process by name, or from the scheduler saved with a diffusers model."""

import math
from collections.abc import Mapping
from typing import Any

from diffusers import (
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from gnunet.diffusion.ddpm import DDPM, beta_options
from gnunet.diffusion.edm import EDM
from gnunet.diffusion.flow import Flow
from gnunet.diffusion.process import Process
from gnunet.errors import ConfigError

PROCESSES: dict[str, type[Process]] = {"ddpm": DDPM, "edm": EDM, "flow": Flow}

MAX_CONFIG_VALUE = 100_000
"""Largest number and longest list in a scheduler's config: it builds tables of that many entries."""


def make_process(kind: str, **settings: Any) -> Process:
    """One of PROCESSES by name; `settings` are the arguments of its class."""
    return PROCESSES[kind](**settings)


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Raise ConfigError if an untrusted scheduler config, as read from JSON, could take unbounded memory."""
    for key, value in config.items():
        if isinstance(value, list) and len(value) > MAX_CONFIG_VALUE:
            raise ConfigError(f"{key[:100]}: a list of {len(value)}; valid: at most {MAX_CONFIG_VALUE} numbers")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, (list, dict)) or (isinstance(item, str) and len(item) > 1000):
                raise ConfigError(f"{key[:100]}: {repr(item)[:100]}; valid: a number, a string or a list of these")
            # Some classes save a missing bound of lambda as minus infinity.
            if isinstance(item, (int, float)) and not abs(item) <= MAX_CONFIG_VALUE and key != "lambda_min_clipped":
                raise ConfigError(f"{key[:100]}: {repr(item)[:100]} given; valid: at most {MAX_CONFIG_VALUE}")


def process_from_scheduler(scheduler: Any) -> Process:
    """The process that a diffusers scheduler samples from; settings of training alone keep their defaults.

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
        return DDPM(schedule=scheduler)
    require_config(config, name, use_flow_sigmas=False, timestep_type="discrete")
    return DDPM(
        schedule=DDPMScheduler(
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
    """Raise ConfigError where a key of a scheduler's config has another value than the supported one."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{name}.{key}: {config[key]!r} given; valid: {value!r}")
