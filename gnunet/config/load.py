"""Configurations from files, shipped configs and values; configurations as text, and how two differ."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gnunet.config.checks import check_config
from gnunet.config.init_from import with_initial_model
from gnunet.config.merge import ConfigSource, merge_and_validate, nest
from gnunet.config.renamed_keys import with_new_names
from gnunet.config.schema import Section
from gnunet.config.sections import Config
from gnunet.config.yaml_io import dump_yaml, load_yaml, load_yaml_file
from gnunet.errors import did_you_mean
from gnunet.files import packaged
from gnunet.safe_io import check_yaml

SHIPPED = packaged("configs")  # the folder of the shipped configs


def load_config(
    *sources: str | Path | Mapping[str, Any] | Config | ConfigSource, overrides: Mapping[str, Any] | None = None
) -> Config:
    """Merge sources over the defaults, later over earlier, and check the result.

    >>> config = load_config("cifar10", overrides={"train.batch_size": 8})
    >>> config = load_config(config, overrides={"model.norm": {"kind": "batch"}})

    Args:
        sources: YAML files by their paths, shipped configs by their names, nested mappings, or configurations.
        overrides: values by their dotted keys, over all sources.

    Raises:
        ConfigError: a file cannot be read, or one line for each issue: the key's full path, the value given and its
            source, and what is valid.
    """
    named = [_as_source(source) for source in sources]
    if overrides:
        named.append(ConfigSource("overrides", nest(overrides.items())))
    return merge_and_validate(Config, with_initial_model(named), check_config)


def _as_source(source: str | Path | Mapping[str, Any] | Config | ConfigSource) -> ConfigSource:
    if isinstance(source, ConfigSource):
        return source
    if isinstance(source, Config):
        return ConfigSource("configuration", source.model_dump())
    if isinstance(source, Mapping):
        return ConfigSource("mapping", source)
    path, here = Path(source), Path.cwd()
    shipped = SHIPPED / f"{path}.yaml"
    if not path.is_file() and path.name == str(source) and shipped.is_file():
        path = shipped
    name = str(path.relative_to(here) if path.is_relative_to(here) else path)
    names = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
    hint = f"valid: a YAML file, or one of the shipped configs {', '.join(names)}{did_you_mean(path.stem, names)}"
    return ConfigSource(name, load_yaml_file(path, name, hint))


def to_yaml(config: Config) -> str:
    """Write all keys, defaults included, as YAML that `load_config` and `from_yaml` read back equal."""
    return dump_yaml(config.model_dump())


def from_yaml(text: str, name: str) -> Config:
    """Read and check a configuration written by `to_yaml` of this or an earlier version, which may be untrusted.

    Raises:
        ConfigError: as `load_config`, or it has aliases or tags, which `to_yaml` never writes; `name` is the text's.
    """
    check_yaml(text, name)
    return merge_and_validate(Config, [ConfigSource(name, with_new_names(load_yaml(text, name)))], check_config)


def changed_keys(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """The keys in which two configurations differ, with both values, or `absent` for a key that one of them lacks."""
    left, right = dict(_flatten(a)), dict(_flatten(b))
    pairs = {key: (left.get(key, "absent"), right.get(key, "absent")) for key in {**left, **right}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flatten(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section:
        yield from _flatten(value, f"{prefix}{name}.") if isinstance(value, Section) else [(prefix + name, value)]
