"""Configuration files and layers: YAML in and out, later layers over earlier ones, readable messages.

A layer is what one file or the command line gives. Layers are merged key by key into one mapping, which the
tree of pydantic models then judges; what it refuses is reported with the layer that it came from.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from gnunet.config.renamed_keys import RENAMED_KEYS, RENAMED_VALUES
from gnunet.config.schema import (
    InvalidConfig,
    Path,
    Problem,
    Section,
    default_kind,
    describe_field,
    fields_of,
    find,
    kinds_of,
    one_of,
    section_types,
    walk,
    with_kind,
)
from gnunet.errors import ConfigError

Tree = TypeVar("Tree", bound=Section)

_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)


def _scalar_types(base: Mapping[str, list[tuple[str, Any]]]) -> dict[str, list[tuple[str, Any]]]:
    """PyYAML's rules for what a plain scalar is, but `1e-4` is a number and `2024-01-01` is text."""
    dropped = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    rules = {first: [rule for rule in old if rule[0] not in dropped] for first, old in base.items()}
    for first in "-+.0123456789":
        rules.setdefault(first, []).append(("tag:yaml.org,2002:float", _FLOAT))
    return rules


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads every spelling of a number and refuses a key given twice."""

    yaml_implicit_resolvers = _scalar_types(yaml.SafeLoader.yaml_implicit_resolvers)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper whose strings are read back as what they were; lists on one line."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Unicode's further line breaks are escaped between double quotes alone.
        style = '"' if any(ch in data for ch in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


@dataclass(frozen=True)
class Layer:
    """The values that one file or the command line gives, as nested mappings, and its name in messages."""

    where: str
    values: dict[str, Any]


@dataclass(frozen=True)
class UnparsedValue:
    """A value from the command line that is not one YAML value; the tree refuses it as any wrong value."""

    text: str


_Dumper.add_representer(UnparsedValue, lambda dumper, value: dumper.represent_str(value.text))


def read_value(text: str) -> Any:
    """Read one YAML value; raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)
    except ValueError as error:  # PyYAML takes 0x_ for a number
        raise yaml.YAMLError(str(error)) from None


def load_yaml(text: str, where: str) -> dict[str, Any]:
    """Read the text of a configuration file; raises ConfigError naming `where` and the line."""
    try:
        values = read_value(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{line}: not valid YAML: {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: given {inline(values)}; valid: a mapping from keys to values")
    return values


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Write nested mappings as YAML that `load_yaml` reads back unchanged."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def inline(value: Any) -> str:
    """Write a value on one line as it would stand in a configuration file, cut where it is long."""
    if isinstance(value, UnparsedValue):
        return value.text or "nothing"
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
    text = " ".join(text.removesuffix("...\n").split())
    return text if len(text) <= 120 else text[:117] + "..."


def resolve(
    root: type[Tree], layers: Sequence[Layer], check: Callable[[Tree], Sequence[Problem]] = lambda tree: ()
) -> Tree:
    """Merge layers, later over earlier, and build the tree from them.

    Args:
        check: finds what does not go together in a tree whose keys are valid one by one.

    Raises:
        ConfigError: one line for each problem: the key's full path, what was given and where, and what is valid.
    """
    merged, tree = _Merged(root), None
    for layer in layers:
        merged.add(layer)
    try:
        tree = root.model_validate(merged.values)
        problems = check(tree)
    except ValidationError as error:
        problems = list(_problems(root, merged.values, error))
    refuse((f"{p.path}: {p.what} ({merged.where(p.path)}); {p.mend}" for p in problems), "the configuration")
    return tree


def lines_of(error: ConfigError) -> list[str]:
    """The lines of an error of `resolve`, one for each problem."""
    first, *rest = str(error).splitlines()  # of several problems, the first line says only how many
    return [line.removeprefix("- ") for line in rest] or [first]


def refuse(lines: Iterable[str], where: str) -> None:
    """Raise a ConfigError that has every line once, if there are any; `where` names what they are about."""
    lines = list(dict.fromkeys(lines))
    if len(lines) > 1:
        lines = [f"{len(lines)} problems in {where}:", *(f"- {line}" for line in lines)]
    if lines:
        raise ConfigError("\n".join(lines))


@dataclass
class _Merged:
    """The layers so far as one mapping, with the name of the layer that gave each key."""

    root: type[Section]
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def add(self, layer: Layer) -> None:
        self._merge([self.root], self.values, layer.values, (), layer.where)

    def where(self, path: str) -> str:
        """The layer that gave a key, or the last of the keys below a section."""
        below = [origin for key, origin in self.origins.items() if key == path or key.startswith(f"{path}.")]
        return below[-1] if below else "default"

    def _merge(self, sections: list[type[Section]], old: dict, new: dict, path: Path, where: str) -> None:
        for section in sections:
            for stale in section.keys_to_reset(old, new):
                self._drop(old, path, stale)
        for name, value in ((str(key), value) for key, value in new.items()):
            owners = fields_of(sections).get(name)
            field_ = next(iter(owners.values())) if owners else None
            inner = section_types(field_.annotation) if field_ else []
            if inner and (value is None or isinstance(value, dict)):
                self._merge_section(field_, inner, old, value or {}, (*path, name), where)
            else:
                old[name] = value
                self.origins[".".join((*path, name))] = where

    def _merge_section(
        self, field_: FieldInfo, sections: list[type[Section]], old: dict, new: dict, path: Path, where: str
    ) -> None:
        if not isinstance(old.get(path[-1]), dict):
            old[path[-1]] = {}
        section = old[path[-1]]
        if len(sections) > 1:
            before = section.setdefault("kind", default_kind(field_))
            after = new.get("kind", before)
            if after != before:
                kept = fields_of(with_kind(sections, after))
                for name in [n for n in section if n not in kept and n in fields_of(sections)]:
                    self._drop(section, path, (name,))
            sections = with_kind(sections, after)
        self._merge(sections, section, new, path, where)

    def _drop(self, values: dict, path: Path, below: Path) -> None:
        for name in below[:-1]:
            values = values[name]
        del values[below[-1]]
        self.origins.pop(".".join((*path, *below)), None)


def _problems(root: type[Section], values: dict[str, Any], error: ValidationError) -> Iterable[Problem]:
    """Translate what pydantic refused into the tree's own words."""
    for detail in error.errors(include_url=False):
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, InvalidConfig):
            yield from cause.problems
            continue
        path, parents, field_ = _locate(root, detail["loc"])
        key, given = ".".join(path), inline(_value_at(values, path))
        if field_ is None:
            yield Problem(key, "unknown key", _suggest_key(root, path, parents, values))
        elif inner := section_types(field_.annotation):
            if detail["type"].startswith("union_tag") and isinstance(_value_at(values, path), dict):
                kinds = [kind for section in inner for kind in kinds_of(section)]
                given = inline(_value_at(values, (*path, "kind")))
                yield Problem.of(f"{key}.kind", given, one_of(kinds))
            else:
                yield Problem.of(key, given, "its keys " + ", ".join(f"{key}.{n}" for n in fields_of(inner)))
        else:
            new = RENAMED_VALUES.get(key, {}).get(given)
            yield Problem.of(key, given, describe_field(field_) + (f" ({given} was renamed to {new})" if new else ""))


def _locate(root: type[Section], loc: Sequence[Any]) -> tuple[Path, list[type[Section]], FieldInfo | None]:
    """Turn pydantic's location into a key's path, the section types it is in, and its field (None: unknown).

    Pydantic's locations have a union's kind after the section's name, and go on inside a key's value.
    """
    path, sections, inner, parts = (), [root], [root], list(loc)
    field_ = None
    while parts and inner:
        sections, name = inner, str(parts.pop(0))
        path = (*path, name)
        owners = fields_of(sections).get(name)
        if owners is None:
            return path, sections, None
        field_ = next(iter(owners.values()))
        inner = section_types(field_.annotation)
        if len(inner) > 1 and parts:
            inner = with_kind(inner, parts.pop(0))
    return path, sections, field_


def _value_at(values: Any, path: Path) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _suggest_key(root: type[Section], path: Path, parents: list[type[Section]], values: Any) -> str:
    """Say what a key that does not exist may have been meant to be, and which keys exist beside it."""
    *above, name = path
    beside = fields_of(parents)
    tree = dict.fromkeys(key for key, _ in walk([root]))
    elsewhere = [".".join(key) for key in tree if key[-1] == name]
    guess = ""
    if new := RENAMED_KEYS.get(".".join(path)):
        return f"renamed to {new}"
    if hint := next((section.hints[name] for section in parents if name in section.hints), None):
        guess = f"use {hint}; "
    elif path in tree:
        siblings = section_types(find(root, tuple(above)).annotation)
        owners = [kind for section in siblings if name in section.model_fields for kind in kinds_of(section)]
        guess = f"it belongs to kind {one_of(owners)}; "
    elif elsewhere:
        guess = f"did you mean {one_of(elsewhere)}? "
    elif close := difflib.get_close_matches(name, beside, 1):
        guess = f"did you mean {'.'.join((*above, *close))}? "
    elif close := difflib.get_close_matches(name, [key[-1] for key in tree], 1, cutoff=0.75):
        guess = f"did you mean {one_of(['.'.join(key) for key in tree if key[-1] == close[0]])}? "
    where = f" of {'.'.join(above)}" if above else ""
    kind = f" with kind {_value_at(values, (*above, 'kind'))}" if "kind" in beside else ""
    return f"{guess}valid keys{where}{kind}: {', '.join(beside)}"
