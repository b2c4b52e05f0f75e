"""The configuration: its sections, how files and flags are merged and checked, and the keywords made from it."""

from gnunet.config.checks import accumulation_steps
from gnunet.config.load import differences, from_yaml, load_config, to_yaml
from gnunet.config.model_kwargs import image_kwargs, unet_kwargs
from gnunet.config.sections import (
    Config,
    DataConfig,
    DDPMConfig,
    EDMConfig,
    EvaluateConfig,
    FlowConfig,
    ModelConfig,
    SamplingConfig,
    Text,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "Config",
    "DDPMConfig",
    "DataConfig",
    "EDMConfig",
    "EvaluateConfig",
    "FlowConfig",
    "ModelConfig",
    "SamplingConfig",
    "Text",
    "TrainConfig",
    "ValidationConfig",
    "accumulation_steps",
    "differences",
    "from_yaml",
    "image_kwargs",
    "load_config",
    "to_yaml",
    "unet_kwargs",
]
