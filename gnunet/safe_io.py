"""Reading what a stranger may have written: settings and the headers of weights, in bounded memory and time.

Only regular files are opened (a pipe would wait for ever, a device never ends), and nothing is parsed whose size was
not looked at before.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError, safe_open

from gnunet.errors import CheckpointError, ConfigError, first_few, truncate

JSON_BYTES = 2**24
"""Enough for the names of some hundred thousand classes; once parsed it takes up to about 40 times as much."""
HEADER_BYTES = 2**24
"""Of a safetensors file, which names some hundred bytes' worth for each tensor."""
YAML_BYTES = 2**18
YAML_DEPTH = 16
YAML_NAMES = 1000
"""Keys and single values of mappings; a whole configuration has about 250."""
YAML_SCALAR = 2048
"""Characters of one value. Beyond twice as many a whole number could not be written in a message any more."""

_FLOATS = ("F16", "BF16", "F32", "F64")


class TensorSpec(NamedTuple):
    """A tensor as a safetensors header declares it."""

    dtype: str
    """As safetensors calls it, such as F32."""
    shape: tuple[int, ...]


def read_text(path: Path, limit: int) -> str:
    """The text of a regular file of at most `limit` bytes.

    Raises:
        CheckpointError: it is missing, no regular file, larger, or no UTF-8; names it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing, or no regular file")
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
        text = content.decode()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if len(content) > limit:
        raise CheckpointError(f"{path}: is larger than {limit} bytes; valid: at most that")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: see `read_text`; it is not one JSON object, or nested too deep to be read.
    """
    text = read_text(path, JSON_BYTES)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}; valid: a JSON object")
    return values


def check_yaml(text: str, where: str) -> None:
    """Refuse YAML that could grow without bound when it is read or described, or that asks for types by tags.

    Nothing that a configuration is written with is lost: it has no aliases and no tags.

    Raises:
        ConfigError: names `where` and the line. Text that is no YAML passes; who reads it says what is wrong with it.
    """
    if len(text) > YAML_BYTES:
        raise ConfigError(f"{where}: {len(text)} characters; valid: at most {YAML_BYTES}")
    open_nodes: list[bool] = []  # whether each is a mapping
    names = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            refused = None
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                refused = "has an anchor or alias; valid: values written out"
            elif tag := getattr(event, "tag", None):
                refused = f"has the YAML tag {str(tag)[:100]}; valid: values without tags"
            elif isinstance(event, yaml.ScalarEvent) and len(event.value) > YAML_SCALAR:
                refused = f"a value of {len(event.value)} characters; valid: at most {YAML_SCALAR}"
            elif isinstance(event, yaml.ScalarEvent):
                names += bool(open_nodes) and open_nodes[-1]
            elif isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append(isinstance(event, yaml.MappingStartEvent))
            elif isinstance(event, yaml.CollectionEndEvent):
                open_nodes.pop()
            if len(open_nodes) > YAML_DEPTH:
                refused = f"is nested deeper than {YAML_DEPTH}; valid: at most that"
            elif names > YAML_NAMES:
                refused = f"has more than {YAML_NAMES} keys and values; valid: at most that"
            if refused:
                line = f", line {event.start_mark.line + 1}" if event.start_mark else ""
                raise ConfigError(f"{where}{line}: {refused}")
    except yaml.YAMLError:
        return


def read_safetensors_header(path: Path) -> dict[str, TensorSpec]:
    """What the header of a safetensors file declares, by name; the library checks it against the file's size.

    No tensor is read.

    Raises:
        CheckpointError: the file is missing or damaged, or its header lies or is too large.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing, or no regular file")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > HEADER_BYTES:
            raise CheckpointError(f"{path}: a header of {length} bytes; valid: at most {HEADER_BYTES}")
        with safe_open(path, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: TensorSpec(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError, OverflowError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from None


def describe_mismatch(stored: Mapping[str, TensorSpec], wanted: Mapping[str, torch.Tensor]) -> str | None:
    """How stored tensors differ from those wanted in names, shapes, or floating point or not; None where not."""
    if missing := [name for name in wanted if name not in stored]:
        return f"lacks {first_few(missing)}"
    if unknown := [name for name in stored if name not in wanted]:
        return f"has {first_few(unknown)}, which the model does not"
    for name, tensor in wanted.items():
        dtype, shape = stored[name]
        if shape != tensor.shape or (dtype in _FLOATS) != tensor.is_floating_point():
            return f"{truncate(name)} is {dtype} {truncate(shape)}; valid: {tensor.dtype} {tuple(tensor.shape)}"
    return None
