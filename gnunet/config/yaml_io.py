"""YAML in and out: PyYAML's safe loader and dumper, in which `1e-4` is a number and duplicate keys are errors."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gnunet.errors import ConfigError, truncate


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML escapes Unicode's own line breaks only between double quotes.
        style = '"' if any(ch in data for ch in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


# YAML 1.1, which PyYAML implements, wants a dot and a signed exponent in a float.
_EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def parse_value(text: str) -> Any:
    """Parse one YAML value; raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)
    # Of PyYAML's constructors: `0x_` looks like an integer, `2024-13-01` like a date, and tags may not fit.
    except (ValueError, KeyError, AttributeError, IndexError) as error:
        raise yaml.YAMLError(str(error)) from None


def load_yaml(text: str, name: str) -> dict[str, Any]:
    """Parse the text of a configuration file; raises ConfigError with the file's `name` and the line."""
    try:
        values = parse_value(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{name}{line}: not valid YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: given {format_value(values)}; valid: a mapping from keys to values")
    return values


def load_yaml_file(path: Path, name: str, hint: str) -> dict[str, Any]:
    """Read a configuration file; raises ConfigError with `name`, and with `hint` if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{name}: {reason}; {hint}") from None
    return load_yaml(text, name)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Write nested mappings as YAML that `load_yaml` reads back unchanged."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def format_value(value: Any) -> str:
    """A value on one line, as in a configuration file, cut to 120 characters."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
    return truncate(" ".join(text.removesuffix("...\n").split()), 120)
