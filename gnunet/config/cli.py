"""The command line of training: `[--config FILE ...] [--section.key VALUE ...]` to a checked configuration."""

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from gnunet.config.load import load_config, to_yaml
from gnunet.config.merge import ABSENT, ConfigSource, lookup, nest
from gnunet.config.schema import (
    Section,
    Sections,
    describe_field,
    fields_of,
    find,
    join_or,
    json_schema,
    kinds_with,
    sections_of,
)
from gnunet.config.sections import Config
from gnunet.config.yaml_io import format_value, parse_value
from gnunet.errors import ConfigError, first_few

_DESCRIPTION = (
    "Trains a diffusion U-Net; the same command again resumes the run from its newest checkpoint. Files given "
    "with --config, by path or by the name of a shipped config, take precedence over the keys' defaults, later files "
    "over earlier ones, and flags over files. A flag's value is YAML, as in a file: null, 1e-4, '[32, 48]', "
    "'{decoder: {kind: batch}}'. The items of a list may be separate arguments."
)
MAX_KINDS_LISTED = 4  # of more kinds than this, the help has the names alone


def parse_args(argv: Sequence[str], *, default_config: str | Path) -> Config:
    """Resolve command-line arguments to a checked configuration; flags take precedence over files.

    Args:
        argv: the arguments, without the program's name.
        default_config: path or name of the config that is used without --config, unless flags have train.init_from.

    Raises:
        ConfigError: an argument is not a flag, or as `load_config`.
        SystemExit: after --help and --print_config, or if --config has no value.
    """
    parser = argparse.ArgumentParser(
        prog="gnunet train", usage="gnunet train [--config FILE ...] [--section.key VALUE ...] [--print_config]",
        description=_DESCRIPTION, allow_abbrev=False, add_help=False,
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="store_true", help="print this help, with the values of --config")
    parser.add_argument(
        "--config", nargs="+", action="extend", metavar="FILE", help=f"config files (default: {default_config})"
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration as YAML and exit")
    options, flags = parser.parse_known_args(argv)
    values = {} if options.help else parse_flags(flags)
    if lookup(values, ("train", "init_from")) is not ABSENT:
        default_config = "folder_small"  # what another model is trained on is seldom what the default is made for
    files = options.config or [default_config]
    if options.help:
        parser.print_help()
        print("", *_help_lines({"": Config}, load_config(*files), ", ".join(map(str, files))), sep="\n")
        raise SystemExit(0)
    config = load_config(*files, ConfigSource("command line", values))
    if options.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Parse `--section.key VALUE` and `--section.key=VALUE` to nested mappings, unknown keys included."""
    flags: list[tuple[str, list[str]]] = []
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            key = f"train.{name}" if name in ("init_from", "init_weights") else name
            flags.append((key, [value] if equals else []))
        elif flags:
            flags[-1][1].append(argument)
        else:
            raise ConfigError(f"{argument}: not a flag (command line); {_suggest_flag(argument)}")
    if missing := [name for name, values in flags if not values and _is_known(name)]:
        raise ConfigError(f"{missing[0]}: no value given (command line); valid: --{missing[0]} VALUE")
    return nest((name, _parse(name, values)) for name, values in flags)


def _is_known(name: str) -> bool:
    """Whether a name is a key, or below a key that holds a mapping of any names."""
    parts = name.split(".")
    *above, field = (find(Config, ".".join(parts[:n])) for n in range(1, len(parts) + 1))
    return bool(field) or any(each and not sections_of(each) for each in above)


def _suggest_flag(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if argument.endswith((".yaml", ".yml")):
        return f"did you mean --config {argument}?"
    if equals and find(Config, key):
        return f"did you mean --{key} {value}?"
    return "valid: --config FILE and --section.key VALUE; --help lists them"


def _parse(key: str, arguments: list[str]) -> Any:
    """The arguments of a flag as YAML, or as they are for a key that takes text."""
    field = find(Config, key)
    schema = json_schema(field) if field and not sections_of(field) else {}
    types = [option.get("type") for option in schema.get("anyOf", [schema])]
    text = " ".join(arguments)
    if "array" in types and (len(arguments) > 1 or not text.startswith("[")):
        return [_parse_yaml(argument) for argument in arguments]
    return text if "string" in types and text != "null" else _parse_yaml(text)


def _parse_yaml(text: str) -> Any:
    try:
        return parse_value(text)
    except yaml.YAMLError:
        return text


def _help_lines(sections: Sections, values: Section, files: str, prefix: str = "") -> Iterator[str]:
    """A paragraph for each key of a section with its value in `values`, which `files` give; nested sections after."""
    nested: list[str] = []
    for name, field in fields_of(sections).items():
        if inner := sections_of(field):
            nested += ["", _wrap(f"{prefix}{name}: {field.description or inner[''].__doc__}", "")]
            if len(inner) <= MAX_KINDS_LISTED:
                nested += [_wrap(f"kind {kind}: {section.__doc__}", "  ") for kind, section in inner.items() if kind]
            nested += _help_lines(inner, getattr(values, name), files, f"{prefix}{name}.")
            continue
        kinds = kinds_with(sections, name)
        fields = [sections[kind].model_fields[name] for kind in kinds]
        defaults = list(dict.fromkeys(format_value(field.get_default()) for field in fields))
        default = "" if name == "kind" else f"default: {join_or(defaults)}; "
        value = format_value(getattr(values, name, None))
        if name == "kind" or (hasattr(values, name) and value not in defaults[:1]):
            default = f"{files}: {value}; {default}"
        valid = join_or(kinds) if name == "kind" else "; ".join(dict.fromkeys(describe_field(f) for f in fields))
        listed = join_or(kinds) if len(kinds) <= MAX_KINDS_LISTED else first_few(kinds)
        only = f"[kind {listed}] " if len(kinds) < len(sections) else ""
        yield f"  --{prefix}{name}"
        yield _wrap(f"{only}{field.description} ({default}valid: {valid})", " " * 6)
    yield from nested


def _wrap(text: str, indent: str) -> str:
    return textwrap.fill(" ".join(text.split()), 110, initial_indent=indent, subsequent_indent=indent or "  ")
