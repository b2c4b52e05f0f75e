"""The base class of all sections, and what merging, errors and --help need to know about their fields."""

import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, WithJsonSchema, model_validator
from pydantic.fields import FieldInfo

KeyPath = tuple[str, ...]


class Section(BaseModel):
    """A part of the configuration: immutable; unknown keys and implicit conversions are errors.

    If a field is a union of sections, the key `kind` selects one of them.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    hints: ClassVar[dict[str, str]] = {}  # keys that users know from other libraries, and what to use instead

    @classmethod
    def drop_overridden(cls, earlier: dict[str, Any], later: Mapping[str, Any]) -> None:
        """Remove from `earlier` the values that cannot hold with those of a later file or flag."""

    def issues(self) -> "Iterable[ConfigIssue]":
        """What is wrong with values that are valid one by one but not together."""
        return ()

    @model_validator(mode="before")
    @classmethod
    def _integral_floats_as_ints(cls, values: Any) -> Any:
        """Accept 1e6 for an integer."""
        return {name: _as_int(value) for name, value in values.items()} if isinstance(values, dict) else values


def _as_int(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def ValidValues(text: str) -> WithJsonSchema:
    """Annotates a type with a description of its valid values, for error messages and --help."""
    return WithJsonSchema({"valid": text})


@dataclass(frozen=True)
class ConfigIssue:
    """One thing wrong with a configuration, shown as `key: message (source); hint`."""

    key: str
    message: str
    hint: str

    @classmethod
    def of(cls, key: str, given: object, valid: str) -> "ConfigIssue":
        """A value that is not valid, by itself or in combination with others."""
        return cls(key, f"given {given}", f"valid: {valid}")


Sections = Mapping[str, type[Section]]
"""The section types that a field can hold, by their kinds; one without a kind is under ""."""


def sections_of(field: FieldInfo | None) -> Sections:
    """The section types that a field can hold; none if it is a plain value."""
    annotation = field.annotation if field else None
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    sections = [member for member in members if isinstance(member, type(Section))]
    return {getattr(section.model_fields.get("kind"), "default", ""): section for section in sections}


def of_kind(sections: Sections, kind: Any) -> Sections:
    """The section type of a kind; all of them if none has it."""
    return {name: section for name, section in sections.items() if name == kind} or sections


def fields_of(sections: Sections) -> dict[str, FieldInfo]:
    """The keys of all section types, in order of declaration, with the field of the first that has it."""
    fields: dict[str, FieldInfo] = {}
    for section in sections.values():
        fields |= {name: field for name, field in section.model_fields.items() if name not in fields}
    return fields


def kinds_with(sections: Sections, name: str) -> list[str]:
    """The kinds that have a key."""
    return [kind for kind, section in sections.items() if name in section.model_fields]


def walk(sections: Sections, path: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Yield the full path and the field of every key, of all kinds; sections before their keys."""
    for name, field in fields_of(sections).items():
        yield (*path, name), field
        yield from walk(sections_of(field), (*path, name))


def find(root: type[Section], key: str) -> FieldInfo | None:
    """The field of a dotted key, of whichever kind has it."""
    return next((field for path, field in walk({"": root}) if ".".join(path) == key), None)


def json_schema(field: FieldInfo) -> dict[str, Any]:
    """The JSON schema of a plain value's field."""
    return TypeAdapter(Annotated[(field.annotation, *field.metadata, None)]).json_schema()


def describe_field(field: FieldInfo) -> str:
    """The valid values of a field as text."""
    return _describe(json_schema(field))


_TYPES = {"integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false", "null": "null"}
_BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


def _describe(schema: Mapping[str, Any]) -> str:
    if "valid" in schema:
        return schema["valid"]
    if "anyOf" in schema:
        texts = [_describe(option) for option in schema["anyOf"]]
        return ", or ".join([join_or(texts[:-1]), "null"]) if texts[-1] == "null" else join_or(texts)
    if values := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return join_or(values)
    if schema.get("type") == "array":
        return f"a {'non-empty ' if schema.get('minItems') else ''}list, each item {_describe(schema['items'])}"
    bounds = " and ".join(f"{text} {schema[bound]}" for bound, text in _BOUNDS.items() if bound in schema)
    return ", ".join(filter(None, [_TYPES.get(schema.get("type", ""), "any value"), bounds]))


def join_or(values: Iterable[Any]) -> str:
    """Join alternatives as text: `a, b or c`."""
    texts = [str(value) for value in values]
    return " or ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)
