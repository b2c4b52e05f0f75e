"""Merges the values of files and flags section by section, validates the result, and explains what is wrong with it."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from gnunet.config.renamed_keys import RENAMED_KEYS, RENAMED_VALUES
from gnunet.config.schema import (
    ConfigIssue,
    KeyPath,
    Section,
    Sections,
    describe_field,
    fields_of,
    join_or,
    kinds_with,
    of_kind,
    sections_of,
    walk,
)
from gnunet.config.yaml_io import format_value
from gnunet.errors import ConfigError

Tree = TypeVar("Tree", bound=Section)


@dataclass(frozen=True)
class ConfigSource:
    """The nested values of one file or of the command line, and its name in error messages."""

    name: str
    values: Mapping[str, Any]


def nest(values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Nested mappings from values with dotted keys; later values replace earlier ones."""
    tree: dict[str, Any] = {}
    for key, value in values:
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            below = section.get(part)
            section[part] = dict(below) if isinstance(below, Mapping) else {}
            section = section[part]
        section[name] = value
    return tree


def merge_and_validate(
    root: type[Tree],
    sources: Sequence[ConfigSource],
    check: Callable[[Tree], Iterable[ConfigIssue]] = lambda section: section.issues(),
) -> Tree:
    """Merge sources, later over earlier, and validate the result; ConfigError has one line for each issue.

    A section is merged key by key; any other value is replaced. A change of `kind` removes the keys of earlier
    sources that the new kind does not have, or has with other valid values. `check` finds values that are valid one by
    one but not together.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        merged = _merge({"": root}, merged, source.values)
    config = None
    try:
        config = root.model_validate(merged)
        issues = list(check(config))
    except ValidationError as error:
        issues = [issue for details in error.errors(include_url=False) for issue in _explain(root, merged, details)]
    raise_all((f"{i.key}: {i.message} ({_origin(sources, i.key)}); {i.hint}" for i in issues), "the configuration")
    return config


def raise_all(lines: Iterable[str], subject: str) -> None:
    """Raise one ConfigError with all distinct lines, if there are any; `subject` names what they are about."""
    lines = list(dict.fromkeys(lines))
    if len(lines) > 1:
        lines = [f"{len(lines)} problems in {subject}:", *(f"- {line}" for line in lines)]
    if lines:
        raise ConfigError("\n".join(lines))


def issue_lines(error: ConfigError) -> list[str]:
    """The lines of an error of `raise_all`."""
    first, *rest = str(error).splitlines()
    return [line.removeprefix("- ") for line in rest] or [first]


def _merge(sections: Sections, earlier: Mapping[str, Any], later: Mapping[Any, Any]) -> dict[str, Any]:
    """`later` over `earlier`, both for one of `sections`; an earlier kind is in `earlier`."""
    merged = dict(earlier)
    fields = fields_of(sections)
    if len(sections) > 1 and (kind := later.get("kind", merged["kind"])) != merged["kind"]:
        old, new = (fields_of(of_kind(sections, each)) for each in (merged["kind"], kind))
        kept = {name for name in new if name not in old or old[name].annotation == new[name].annotation}
        merged = {name: value for name, value in merged.items() if name in kept or name == "kind" or name not in fields}
    for section in sections.values():
        section.drop_overridden(merged, later)
    for name, value in ((str(key), value) for key, value in later.items()):
        field = fields.get(name)
        inner = sections_of(field)
        if inner and (isinstance(value, Mapping) or (value is None and field and field.default is not None)):
            below = merged.get(name)
            if not isinstance(below, Mapping):
                below = {"kind": getattr(field.default, "kind", None)} if len(inner) > 1 else {}
            merged[name] = _merge(inner, below, value or {})
        else:
            merged[name] = value
    return merged


ABSENT: Any = object()


def lookup(values: Any, path: Iterable[str]) -> Any:
    """The value under the keys of `path` in nested mappings; ABSENT if there is none."""
    for name in path:
        values = {str(key): value for key, value in values.items()} if isinstance(values, Mapping) else {}
        values = values.get(name, ABSENT)
    return values


def _origin(sources: Sequence[ConfigSource], key: str) -> str:
    """The name of the last source that gives a key."""
    path = key.split(".")
    return next((source.name for source in reversed(sources) if lookup(source.values, path) is not ABSENT), "default")


def _explain(root: type[Section], values: Mapping[str, Any], details: Any) -> Iterator[ConfigIssue]:
    """Turn one of pydantic's errors into an issue."""
    # Pydantic's location has a union's kind after its name, and continues inside of a key's value.
    path: KeyPath = ()
    sections: Sections = {"": root}
    inner, field = sections, None
    for part in details["loc"]:
        if len(inner) > 1:
            inner = of_kind(inner, part)
        elif inner:
            path, sections = (*path, str(part)), inner
            field = fields_of(sections).get(path[-1])
            inner = sections_of(field)
    key, given = ".".join(path), lookup(values, path)
    given = None if given is ABSENT else given
    if field is None:
        yield ConfigIssue(key, "unknown key", _suggest_key(root, path, sections, values))
    elif len(inner) > 1 and isinstance(given, Mapping):
        yield ConfigIssue.of(f"{key}.kind", format_value(given.get("kind")), join_or(inner))
    elif inner:
        yield ConfigIssue.of(key, format_value(given), f"a mapping with the keys {', '.join(fields_of(inner))}")
    else:
        valid = describe_field(field)
        if isinstance(given, str) and (new := RENAMED_VALUES.get(key, {}).get(given)):
            valid += f" ({given} was renamed to {new})"
        yield ConfigIssue.of(key, format_value(given), valid)


def _suggest_key(root: type[Section], path: KeyPath, sections: Sections, values: Any) -> str:
    """What an unknown key may have been meant to be; otherwise the valid keys next to it."""
    *above, name = path
    if new := RENAMED_KEYS.get(".".join(path)):
        return f"renamed to {new}"
    hint = root.hints.get(name, "")
    # Other programs have fewer sections.
    if hint and (above in ([], ["train"], ["model"]) or hint.startswith(f"{'.'.join(above)}.")):
        return f"use {hint}"
    keys = dict(walk({"": root}))
    where = f" of {'.'.join(above)}" if above else ""
    valid = f"valid keys{where}: {', '.join(fields_of(sections))}"
    if path in keys:
        kinds = join_or(kinds_with(sections_of(keys[tuple(above)]), name))
        return f"it belongs to kind {kinds}; with kind {lookup(values, (*above, 'kind'))}, {valid}"
    similar = [(*above, close) for close in difflib.get_close_matches(name, fields_of(sections), 1)]
    if not similar:
        close = difflib.get_close_matches(name, [key[-1] for key in keys], 1, cutoff=0.75)
        similar = [key for key in keys if key[-1] in close]
    return f"did you mean {join_or('.'.join(key) for key in similar)}?" if similar else valid
