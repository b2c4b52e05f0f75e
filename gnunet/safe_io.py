"""Reading untrusted files: JSON, YAML and safetensors headers, in bounded memory and without running code.

Only regular files are opened: a pipe or a device would block or never end.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import yaml
from safetensors import SafetensorError, safe_open

from gnunet.errors import CheckpointError, ConfigError, first_few, truncate

MAX_JSON_BYTES = 2**24
"""Enough for the names of several hundred thousand classes; parsing takes up to about 40 times as much memory."""
MAX_YAML_BYTES = 2**18
MAX_YAML_DEPTH = 16
MAX_YAML_SCALARS = 4000
MAX_YAML_SCALAR = 2048  # characters of one value: Python refuses to print integers of more than 4300 digits

_FLOATS = ("F16", "BF16", "F32", "F64")


class TensorSpec(NamedTuple):
    """A tensor as declared by a safetensors header."""

    dtype: str  # in safetensors' spelling, such as F32
    shape: tuple[int, ...]


def read_text(path: Path, max_bytes: int) -> str:
    """Read a UTF-8 file; CheckpointError if it is missing, not a regular file, not UTF-8, or above `max_bytes`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing, or not a regular file")
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        text = content.decode()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if len(content) > max_bytes:
        raise CheckpointError(f"{path}: is larger than the limit of {max_bytes} bytes")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError if the file cannot be read or holds anything else."""
    try:
        values = json.loads(read_text(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}; valid: a JSON object")
    return values


def check_yaml(text: str, source: str) -> None:
    """Raise ConfigError, with `source` and the line, for tags and for what is costly to load, check or print:
    aliases, depth, huge scalars, very many of them.

    Malformed YAML passes: the loader reports it.
    """
    depth = scalars = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            scalars += isinstance(event, yaml.ScalarEvent)
            if isinstance(event, yaml.AliasEvent):
                problem = "has an alias; valid: values written out"
            elif getattr(event, "tag", None) is not None:
                problem = f"has the YAML tag {truncate(event.tag)}; valid: values without tags"
            elif scalars > MAX_YAML_SCALARS:
                problem = f"has more than {MAX_YAML_SCALARS} keys and values"
            elif isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_YAML_SCALAR:
                problem = f"a value of {len(event.value)} characters; valid: at most {MAX_YAML_SCALAR}"
            elif depth > MAX_YAML_DEPTH:
                problem = f"is nested deeper than {MAX_YAML_DEPTH} levels"
            else:
                continue
            raise ConfigError(f"{source}, line {event.start_mark.line + 1}: {problem}")
    except yaml.YAMLError:
        return


def read_safetensors_header(path: Path) -> dict[str, TensorSpec]:
    """Read the dtypes and shapes in a safetensors file but no tensor; CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing, or not a regular file")
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: has a header of {size} bytes; valid: at most {MAX_JSON_BYTES}")
        with safe_open(path, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: TensorSpec(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError, OverflowError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from None


def check_fits_memory(files: Sequence[Path], copies: int = 1) -> None:
    """Raise CheckpointError if the files together, which hold `copies` of a model, leave no memory for one.

    Sparse files of any size cost nothing to store, but hours to read.
    """
    needed = sum(file.stat().st_size for file in files if file.is_file()) // copies
    available = psutil.virtual_memory().total
    if needed > available:
        raise CheckpointError(f"{files[0]}: the model's {needed} bytes exceed this machine's memory of {available}")


def describe_mismatch(actual: Mapping[str, TensorSpec], expected: Mapping[str, torch.Tensor]) -> str | None:
    """How names, shapes or kinds of dtype (floating point or not) differ, as text; None if they match."""
    if missing := [name for name in expected if name not in actual]:
        return f"lacks {first_few(missing)}"
    if unknown := [name for name in actual if name not in expected]:
        return f"has {first_few(unknown)}, which the model does not"
    for name, tensor in expected.items():
        dtype, shape = actual[name]
        if shape != tensor.shape or (dtype in _FLOATS) != tensor.is_floating_point():
            return f"{truncate(name)} is {dtype} {truncate(shape)}; valid: {tensor.dtype} {tuple(tensor.shape)}"
    return None
