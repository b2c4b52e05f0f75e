"""A tree from files and flags, checked; and a tree as text."""

from collections.abc import Sequence
from typing import Any

from gnunet.config.checks import problems
from gnunet.config.merge import Layer, dump_yaml, inline, load_yaml, resolve
from gnunet.config.renamed_keys import with_new_names
from gnunet.config.schema import Section
from gnunet.config.sections import Config
from gnunet.safe_io import check_yaml


def load_config(layers: Sequence[Layer]) -> Config:
    """Merge layers, later over earlier, and check the tree that they make.

    Raises:
        ConfigError: one line for each problem: the key's full path, what was given and where, and what is valid.
    """
    return resolve(Config, layers, problems)


def to_yaml(config: Config) -> str:
    """Write the whole tree, defaults included, as YAML that `from_yaml` and `--config` read back equal."""
    return dump_yaml(config.model_dump())


def from_yaml(text: str, where: str) -> Config:
    """Read and check a tree written by `to_yaml`, which may have come from a stranger.

    Raises ConfigError with one line for each problem; `where` names the text in it. Aliases and tags, which `to_yaml`
    never writes, are refused. Keys of an earlier version are read by their new names.
    """
    check_yaml(text, where)
    return load_config([Layer(where, with_new_names(load_yaml(text, where)))])


def differences(a: Config, b: Config) -> list[str]:
    """List the keys in which two trees differ, each as `full.path: value in a -> value in b`."""
    left, right = _flat(a), _flat(b)

    def shown(values: dict[str, Any], path: str) -> str:
        return inline(values[path]) if path in values else "absent"

    return [
        f"{path}: {shown(left, path)} -> {shown(right, path)}"
        for path in dict.fromkeys([*left, *right])
        if path not in left or path not in right or left[path] != right[path]
    ]


def _flat(section: Section, prefix: str = "") -> dict[str, Any]:
    """Every key below a section by its full path, with its value."""
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            values.update(_flat(value, f"{prefix}{name}."))
        else:
            values[prefix + name] = value
    return values
