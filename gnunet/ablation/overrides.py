"""Resolves the overrides of a study to configurations."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gnunet.ablation.study import Study
from gnunet.config import Config, load_config
from gnunet.config.merge import ConfigSource, nest
from gnunet.config.schema import find, sections_of
from gnunet.config.yaml_io import format_value, load_yaml_file
from gnunet.errors import ConfigError

RESERVED_KEYS = {"seed": "seeds in the study", "run_dir": "--folder"}
"""Keys that overrides may not set, and what sets them."""

Keys = tuple[str, ...]


class StudyLayers:
    """The sources that the configurations of a study are merged from."""

    def __init__(self, study: Study, path: Path, budget: str | None, flags: Mapping[str, Any]):
        self.study, self.name = study, path.name
        tuned = {} if study.tuning is None else {study.tuning.key: "tuning in the study"}
        self.reserved_above_base = RESERVED_KEYS | tuned
        self.below = [_read(path.parent / file, f"config {file} of {path.name}") for file in study.config]
        self.below.append(self._layer("base", study.base))
        if budget is not None:
            size, where = study.budgets[budget], f"budget {budget!r}"
            if isinstance(size, str):
                self.below.append(_read(path.parent / size, f"{where} of {path.name}"))
            else:
                self.below.append(self._layer(where, size))
        self.above = _checked(ConfigSource("command line", dict(flags)), self.reserved_above_base)

    def resolve(
        self, variant: str, setting: tuple[tuple[str, str], ...], tuned: list[Any], *, tries: bool = False
    ) -> Config:
        """The configuration of a variant in a setting, with the value of the tuned key if there is one.

        `tries` says whether it is of a tuning trial, which has the overrides of `tuning.set`.
        """
        reserved = self.reserved_above_base
        layers = [self._layer(f"variant {variant!r}", self.study.variants[variant].set, reserved)]
        for axis, value in setting:
            layers.append(self._layer(f"{axis} {value}", self.study.axes[axis].values[value], reserved))
        for value in tuned:
            more = self.study.tuning.set if tries else {}
            layers.append(self._layer("tuning", {self.study.tuning.key: value, **more}))
        return load_config(*self.below, *layers, self.above)

    def _layer(
        self, what: str, overrides: Mapping[str, Any], reserved: Mapping[str, str] = RESERVED_KEYS
    ) -> ConfigSource:
        where = f"{what} of {self.name}"
        return _checked(ConfigSource(where, nested(overrides, where)), reserved)


def nested(overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Nested mappings from overrides with dotted keys at any depth; raises ConfigError for a key given twice."""
    values: dict[Keys, Any] = {}
    for path, value in _leaves(overrides):
        if any(path[: len(other)] == other or other[: len(path)] == path for other in values):
            raise ConfigError(f"{'.'.join(path)}: given twice ({where}); valid: once")
        values[path] = value
    return nest((".".join(path), value) for path, value in values.items())


def _leaves(overrides: Mapping[str, Any], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """The path and value of every key below the sections."""
    for key, value in overrides.items():
        path = (*above, *str(key).split("."))
        field = find(Config, ".".join(path))
        if isinstance(value, Mapping) and sections_of(field):
            yield from _leaves(value, path)
        else:
            yield path, value


def _checked(layer: ConfigSource, reserved: Mapping[str, str]) -> ConfigSource:
    """The source itself; raises ConfigError if it sets a reserved key."""
    for path, value in _leaves(layer.values):
        if decides := reserved.get(key := ".".join(path)):
            raise ConfigError(f"{key}: given {format_value(value)} ({layer.name}); valid: leave it to {decides}")
    return layer


def _read(path: Path, where: str) -> ConfigSource:
    hint = "valid: a configuration file, relative to the study"
    return ConfigSource(path.name, load_yaml_file(path, f"{where}: {path}", hint))
