"""Several things wrong at once, said in one error."""

from collections.abc import Iterable

from gnunet.errors import ConfigError


def lines_of(error: ConfigError) -> list[str]:
    """The lines of an error of `gnunet.config_layers.resolve`, one for each problem."""
    first, *rest = str(error).splitlines()  # of several problems, the first line says only how many
    return [line.removeprefix("- ") for line in rest] or [first]


def refuse(lines: Iterable[str], where: str) -> None:
    """Raise a ConfigError that has every line once, if there are any; `where` names what they are about."""
    lines = list(dict.fromkeys(lines))
    if len(lines) > 1:
        lines = [f"{len(lines)} problems in {where}:", *(f"- {line}" for line in lines)]
    if lines:
        raise ConfigError("\n".join(lines))
