"""A process by name, or from the scheduler saved with a diffusers model."""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gnunet.diffusion.ddpm import BETA_SCHEDULES, DDPM
from gnunet.diffusion.edm import EDM
from gnunet.diffusion.flow import Flow
from gnunet.diffusion.process import Process
from gnunet.errors import CheckpointError, ConfigError, truncate
from gnunet.safe_io import read_json

PROCESSES: dict[str, type[Process]] = {"ddpm": DDPM, "edm": EDM, "flow": Flow}

MAX_CONFIG_VALUE = 100_000
"""Largest number and longest list in a scheduler's config: it builds tables of that many entries."""

BETA_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "variance_type", "clip_sample", "clip_sample_range",
)  # fmt: skip
"""What a process over betas depends on in a scheduler's config."""


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
    """The process that a diffusers scheduler samples from, as `process_from_config`."""
    return process_from_config({**scheduler.config, "_class_name": type(scheduler).__name__})


def process_from_config(config: Mapping[str, Any]) -> Process:
    """The process of a diffusers scheduler's config, which may be untrusted; settings of training alone keep their
    defaults.

    Raises:
        ConfigError: the scheduler belongs to none of the processes, has an option that they lack, or does not end at
            pure noise, from which sampling starts.
    """
    import diffusers

    check_scheduler(config)
    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ConfigError(f"_class_name {truncate(name)} is not a scheduler of diffusers")
    arguments = inspect.signature(cls.__init__).parameters.values()
    defaults = {each.name: each.default for each in arguments if each.default is not each.empty}
    process = _make_process_of(cls, {**defaults, **config})
    if issue := process.untrained_levels():
        key, given, valid = issue
        raise ConfigError(f"{name}.{key}: {given} given; valid: {valid}")
    return process


def load_process(folder: Path) -> Process:
    """The process of the scheduler in a diffusers folder; CheckpointError if it has none, or none that is supported."""
    files = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    if (file := next((file for file in files if file.exists()), None)) is None:
        raise CheckpointError(f"{files[0]}: is missing")
    settings = read_json(file)
    try:
        return process_from_config(settings)
    except Exception as error:  # diffusers checks none of the values
        raise CheckpointError(f"{file}: {error}") from None


def process_settings(process: Process) -> dict[str, Any]:
    """Arguments of `make_process` for the same noise levels; ConfigError for betas that it does not make."""
    defaults = {each.name: each.default for each in inspect.signature(type(process)).parameters.values()}
    settings = {name: getattr(process, name, defaults[name]) for name in defaults if name != "schedule"}
    if isinstance(process, DDPM):
        given, names = process.schedule.config, {theirs: ours for ours, theirs in BETA_SCHEDULES.items()}
        settings |= {"beta_start": given["beta_start"], "beta_end": given["beta_end"]}
        settings["beta_schedule"] = names.get(given["beta_schedule"], "linear")
        if not torch.equal(DDPM(**settings).schedule.betas, process.schedule.betas):
            options = {key: truncate(given[key]) for key in BETA_KEYS[1:6]}
            raise ConfigError(f"{options} given; valid: a linear or cosine (squaredcos_cap_v2) schedule of betas")
    return {"kind": process.kind, **{name: value for name, value in settings.items() if value != defaults[name]}}


def _make_process_of(cls: type, config: Mapping[str, Any]) -> Process:
    from diffusers import DDPMScheduler

    name = cls.__name__
    if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        require_config(config, name, prediction_type="epsilon", sigma_schedule="karras")
        keys = ("sigma_min", "sigma_max", "sigma_data", "rho")
        return EDM(**{key: _positive(config, name, key) for key in keys})
    if name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"):
        require_config(config, name, use_dynamic_shifting=False, invert_sigmas=False)
        timesteps = int(_positive(config, name, "num_train_timesteps"))
        predicts = "sample" if config.get("prediction_type") == "sample" else "velocity"  # diffusers knows no such key
        return Flow(shift=_positive(config, name, "shift"), prediction_type=predicts, num_train_timesteps=timesteps)
    if not {"beta_schedule", "prediction_type"} <= config.keys():
        raise ConfigError(
            f"scheduler: {name} given; valid: schedulers over betas (DDPMScheduler, DDIMScheduler, ...), "
            "EDMEulerScheduler, EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, "
            "FlowMatchHeunDiscreteScheduler"
        )
    require_config(config, name, use_flow_sigmas=False, timestep_type="discrete", snr_shift_scale=1.0)
    # Of their class, a scheduler may take a time that is quadratic in the timesteps to be built.
    options = {key: config[key] for key in BETA_KEYS if config.get(key) is not None}
    return DDPM(schedule=DDPMScheduler(**options, timestep_spacing="trailing"))


def _positive(config: Mapping[str, Any], name: str, key: str) -> float:
    value = config[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ConfigError(f"{name}.{key}: {truncate(repr(value))} given; valid: a number above 0")
    return float(value)


def require_config(config: Mapping[str, Any], name: str, **expected: Any) -> None:
    """Raise ConfigError where a key of a scheduler's config has another value than the supported one."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{name}.{key}: {config[key]!r} given; valid: {value!r}")
