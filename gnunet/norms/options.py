"""Keys of a norm config: their defaults, and which values are valid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """A key of a norm config, as layers check it and as configuration files and their help show it."""

    default: Any
    is_valid: Callable[[Any], bool]
    words: str
    """What `is_valid` accepts, as a message says it."""
    help: str
    """What the key means."""
    type: Any = float
    """What Python type its values have."""


def is_number(value: Any) -> bool:
    """A finite int or float; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """An int above 0."""
    return isinstance(value, int) and is_number(value) and value > 0


def _ascends(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not all(map(is_number, value)):
        return False
    return all(low < high for low, high in zip(value[:-1], value[1:], strict=True))


EPS = Option(
    1e-5, lambda value: is_number(value) and value > 0, "a number above 0", "Added to the variance inside the root."
)
MOMENTUM = Option(
    0.1,
    lambda value: is_number(value) and 0 < value <= 1,
    "a number above 0, at most 1",
    "Share of the newest batch in the running statistics.",
)
NOISE_EDGES = Option(
    (), _ascends, "a list of ascending timesteps", "Timesteps that part the sets of running statistics.", list
)


def first_problem(options: Mapping[str, Option], config: Mapping[str, Any]) -> str | None:
    """What is wrong with the first of these keys that has a value which is not valid, in words, or None."""
    for key, option in options.items():
        if not option.is_valid(config[key]):
            return f"{key} must be {option.words}; got {config[key]!r}"
    return None
