"""Reads a tree of pydantic models as a tree of keys: which there are, and what each takes, in words.

Help text and error messages take their words from here, so that they always agree with the tree.
"""

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

Path = tuple[str, ...]


class Section(BaseModel):
    """Base of every section: unknown keys refused, no silent conversion, immutable.

    Where a section's type is a union, the key `kind` tells which of the types it is.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    hints: ClassVar[dict[str, str]] = {}
    """What to use instead of a key that users know from elsewhere and that this section lacks."""

    @classmethod
    def keys_to_reset(cls, earlier: dict[str, Any], later: dict[str, Any]) -> Iterator[Path]:
        """Yield the keys given in earlier layers, as paths below this section, that a later layer's keys
        put out of force. A change of `kind` needs no mention here."""
        yield from ()


@dataclass(frozen=True)
class ValidValues:
    """Annotates a type with what it takes, in words, where spelling it out would not be readable."""

    words: str


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: `path: what (where it was given); mend`."""

    path: str
    what: str
    mend: str

    @classmethod
    def of(cls, path: str, given: str, valid: str) -> "Problem":
        """The problem of a value that is not valid, or not valid beside the others."""
        return cls(path, f"given {given}", f"valid: {valid}")


class InvalidConfig(ValueError):
    """Raised by a validator of the tree, with everything that it found."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(f"{p.path}: {p.what}; {p.mend}" for p in self.problems))


def section_types(annotation: Any) -> list[type[Section]]:
    """The section types that a field can hold: none for a value, one, or one for each kind of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return section_types(get_args(annotation)[0])
    if _is_union(annotation):
        return [section for arm in get_args(annotation) for section in section_types(arm)]
    return []


def kinds_of(section: type[Section]) -> tuple[str, ...]:
    """The values of `kind` that select a section type; empty where it has no such key."""
    field = section.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def with_kind(sections: Sequence[type[Section]], kind: Any) -> list[type[Section]]:
    """The section types that a kind selects; all of them where the kind is not one of theirs."""
    return [section for section in sections if kind in kinds_of(section)] or list(sections)


def default_kind(field: FieldInfo) -> str | None:
    """The kind of a union section that is not given one."""
    return getattr(field.get_default(call_default_factory=True), "kind", None)


def fields_of(sections: Sequence[type[Section]]) -> dict[str, dict[type[Section], FieldInfo]]:
    """Every key of any of the section types, with the types that have it, in the order of declaration."""
    found: dict[str, dict[type[Section], FieldInfo]] = {}
    for section in sections:
        for name, field in section.model_fields.items():
            found.setdefault(name, {})[section] = field
    return found


def walk(sections: Sequence[type[Section]], path: Path = ()) -> Iterator[tuple[Path, FieldInfo]]:
    """Yield each key of the tree, of every kind of its unions, with its full path; sections before keys."""
    for name, owners in fields_of(sections).items():
        field = next(iter(owners.values()))
        yield (*path, name), field
        yield from walk(section_types(field.annotation), (*path, name))


def find(root: type[Section], path: Path) -> FieldInfo | None:
    """The field at a path, of whichever kind has it."""
    sections, field = [root], None
    for name in path:
        owners = fields_of(sections).get(name)
        if owners is None:
            return None
        field = next(iter(owners.values()))
        sections = section_types(field.annotation)
    return field


def describe(annotation: Any, metadata: Sequence[Any] = (), plural: bool = False) -> str:
    """Say in words what values an annotation takes, bounds included."""
    annotation, metadata = _unwrap(annotation, metadata)
    for item in metadata:
        if isinstance(item, ValidValues):
            return item.words
    if _is_union(annotation):
        arms = [arm for arm in get_args(annotation) if arm is not type(None)]
        words = " or ".join(describe(arm, metadata, plural) for arm in arms)
        return f"{words}, or null" if len(arms) < len(get_args(annotation)) else words
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return one_of(arguments)
    if origin is list:
        size = "one or more " if any(getattr(item, "min_length", 0) for item in metadata) else ""
        return f"a list of {size}{describe(arguments[0], plural=True)}"
    one, many = {
        bool: ("true or false", "true or false"),
        int: ("a whole number", "whole numbers"),
        float: ("a number", "numbers"),
        str: ("text", "text"),
    }[annotation]
    bounds = _bounds(metadata)
    if not bounds:
        return many if plural else one
    return f"{many}, each {bounds}" if plural else f"{one}, {bounds}"


def describe_field(field: FieldInfo) -> str:
    """Say in words what values a key takes."""
    return describe(field.annotation, field.metadata)


def metavar(annotation: Any) -> str:
    """A short name for the values of an annotation, as help shows it after a flag."""
    annotation, _ = _unwrap(annotation, ())
    if _is_union(annotation):
        return "|".join(dict.fromkeys(metavar(arm) for arm in get_args(annotation)))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "{" + ",".join(str(value) for value in arguments) + "}"
    if origin is list:
        return f"[{metavar(arguments[0])} ...]"
    names = {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT", type(None): "null"}
    return "{KEY: VALUE}" if origin is dict else names[annotation]


def accepts(annotation: Any, kind: type) -> bool:
    """Whether values of a Python type (str, list, ...) are among those an annotation takes."""
    annotation, _ = _unwrap(annotation, ())
    if _is_union(annotation):
        return any(accepts(arm, kind) for arm in get_args(annotation))
    if get_origin(annotation) is Literal:
        return any(isinstance(value, kind) for value in get_args(annotation))
    return (get_origin(annotation) or annotation) is kind


def list_item(annotation: Any) -> Any:
    """The annotation of the items where an annotation takes lists and nothing else, or None."""
    annotation, _ = _unwrap(annotation, ())
    return get_args(annotation)[0] if get_origin(annotation) is list else None


def _unwrap(annotation: Any, metadata: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Take Annotated and FieldInfo apart into the bare annotation and one flat list of metadata."""
    flat = list(metadata)
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        for item in inner:
            flat.extend(item.metadata if isinstance(item, FieldInfo) else [item])
    return annotation, flat


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def one_of(values: Sequence[Any]) -> str:
    """Join alternatives as English does: `a, b or c`."""
    words = [str(value) for value in values]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _bounds(metadata: Sequence[Any]) -> str:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return " and ".join(
        f"{word} {getattr(item, name)}"
        for name, word in words.items()
        for item in metadata
        if getattr(item, name, None) is not None
    )
