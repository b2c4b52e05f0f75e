"""Renamed and removed keys. In users' files and flags both are errors, and that of a renamed key gives the new
name; files that gnunet itself wrote with them, such as a run's config.yaml and a study's records, are still read."""

import re
from collections.abc import Mapping
from typing import Any

RENAMED_KEYS = {
    "data.label_drop": "data.label_dropout",
    "evaluate.keep_best": "evaluate.monitor",
    "model.norm.split_skip": "model.norm.separate_skip_norm",
    "model.recompute": "model.activation_checkpointing",
    "sampling.guidance": "sampling.guidance_scale",
    "sampling.steps": "sampling.num_inference_steps",
    "train.images": "train.total_images",
    "train.max_nonfinite": "train.max_nonfinite_steps",
    "train.precise_batches": "train.bn_update_batches",
}
REMOVED_KEYS = {"model.norm.noise_bins": 1}
"""Keys of earlier versions, with the value that had no effect."""
RENAMED_VALUES = {"data.on_error": {"stop": "raise"}}
_FORMER_KEYS = {new: old for old, new in RENAMED_KEYS.items()}
_FORMER_VALUES = {key: {new: old for old, new in values.items()} for key, values in RENAMED_VALUES.items()}


def with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration of any version with the current names of keys and values."""
    return _rename(values, RENAMED_KEYS, RENAMED_VALUES)


def with_former_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the first names of keys and values. Their hash names the records of a study."""
    return _rename(values, _FORMER_KEYS, _FORMER_VALUES)


def _rename(
    values: Mapping[str, Any], keys: Mapping[str, str], renamed_values: Mapping[str, Mapping[str, str]], above: str = ""
) -> dict[str, Any]:
    renamed = {}
    for name, value in values.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping):
            value = _rename(value, keys, renamed_values, f"{path}.")
        elif isinstance(value, str):
            value = renamed_values.get(path, {}).get(value, value)
        key = re.sub(r"^model\.norm\.overrides\.[^.]+\.", "model.norm.", path)  # a region has the keys of a norm
        if key in REMOVED_KEYS and value == REMOVED_KEYS[key]:
            continue
        renamed[keys[key].rpartition(".")[2] if key in keys else name] = value
    return renamed
