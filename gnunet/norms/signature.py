"""The options of a class, read from the signature of its constructor, and a check of their values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any


@cache
def options_of(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor's arguments that have a default, with evaluated annotations, and those of the base classes that
    it passes `**kwargs` on to."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__, eval_str=True).parameters.values()  # type: ignore[misc]
        found = {p.name: p for p in parameters if p.default is not p.empty} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def validate_options(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a class: the given values, and defaults for the rest.

    Raises ValueError, with option and value, if the type or a bound in an option's annotation does not allow a value.
    """
    from pydantic import ValidationError  # only here, so that the layers can be imported without it

    try:
        return dict(_model_of(cls)(**values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for i, part in enumerate(first["loc"]) if i == 0 or isinstance(part, int))
        raise ValueError(f"{key}: {first['msg']}; got {repr(first['input'])[:100]}") from None


@cache
def _model_of(cls: type) -> Any:
    from pydantic import ConfigDict, create_model

    fields: dict[str, Any] = {name: (option.annotation, option.default) for name, option in options_of(cls).items()}
    return create_model(cls.__name__, __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields)
