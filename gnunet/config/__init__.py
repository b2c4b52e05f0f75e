"""The configuration: sections.py has all keys (data_section.py those of data, kinds.py those of model.norm and
diffusion), on the base class in schema.py.

load.py and cli.py read files and flags, merge.py merges and validates them and explains errors, checks.py finds values
that do not work together.
"""

from gnunet.config.checks import accumulation_steps, check_latents
from gnunet.config.cli import parse_args
from gnunet.config.load import changed_keys, from_yaml, load_config, to_yaml
from gnunet.config.model_kwargs import image_kwargs, label_shape, make_condition, process_kwargs, unet_kwargs
from gnunet.config.sections import Config, EvaluateConfig, ModelConfig, SamplingConfig, Text, TrainConfig

__all__ = [
    "Config",
    "EvaluateConfig",
    "ModelConfig",
    "SamplingConfig",
    "Text",
    "TrainConfig",
    "accumulation_steps",
    "check_latents",
    "changed_keys",
    "from_yaml",
    "image_kwargs",
    "label_shape",
    "load_config",
    "make_condition",
    "parse_args",
    "process_kwargs",
    "to_yaml",
    "unet_kwargs",
]
