"""The command line of train.py: `[--config FILE ...] [--section.key VALUE ...]` to a checked configuration.

tyro reads the flags and writes the help, over a mirror of the tree whose values are raw words; the tree alone
judges values, so that a file and a flag with the same mistake get the same message.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from pydantic.fields import FieldInfo
from tyro.constructors import PrimitiveConstructorSpec

from gnunet.config import Config, to_yaml
from gnunet.config.load import load_config
from gnunet.config.merge import Layer, UnparsedValue, inline, load_yaml, read_value
from gnunet.config.schema import (
    Section,
    accepts,
    default_kind,
    describe_field,
    fields_of,
    find,
    kinds_of,
    list_item,
    metavar,
    one_of,
    section_types,
)
from gnunet.errors import ConfigError

_FLAGS = "command line"
_DESCRIPTION = (
    "Train a diffusion U-Net. Configuration files win over the defaults below, later files over earlier "
    "ones, and flags over files; without --config, {default} is read. A flag's value is written as in a file "
    "(null, 1e-4, '[32, 48]'); a list can also be given as separate words."
)


def parse(argv: Sequence[str], *, default_config: Path) -> Config:
    """Resolve the arguments of train.py into a checked configuration.

    Layers, each over the ones before: the defaults of the tree, the files given with --config in their order
    (`default_config` where there are none), the flags. `--help` and `--print_config` print and exit with 0;
    the YAML that --print_config prints resolves to the same configuration when given back with --config.

    Raises:
        ConfigError: a file cannot be read, or something in it or on the command line is not valid; the
            message has a line for each problem.
    """
    options, flags = _read_flags(argv, prog="train.py", description=_DESCRIPTION.format(default=_shown(default_config)))
    if [] in options.config:
        raise ConfigError("--config: given nothing (command line); valid: one or more YAML files")
    files = [Path(name) for names in options.config for name in names] or [default_config]
    layers = [_read_file(path, default_config.parent) for path in files]
    config = load_config([*layers, Layer(_FLAGS, flags)])
    if options.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Read `--section.key VALUE` flags, for programs that have options of their own beside them.

    Returns:
        The nested mapping that a file with the same keys would hold; what is wrong in it, `resolve` tells.

    Raises:
        ConfigError: a word that belongs to no flag.
    """
    return _read_flags(argv, prog="", description="")[1]


def _read_flags(argv: Sequence[str], *, prog: str, description: str) -> tuple[Any, dict[str, Any]]:
    """The options as tyro gives them, and the flags among them as a nested mapping, unknown ones included."""
    options, strays = tyro.cli(
        _mirror([Config]),
        prog=prog,
        description=description,
        args=argv,
        use_underscores=True,
        return_unknown_args=True,
    )
    flags = _values(options, [Config])
    _add_unknown(flags, strays)
    return options, flags


def _mirror(sections: Sequence[type[Section]], kind: str | None = None) -> type:
    """A dataclass with the keys of a section, of all its kinds, that takes any words for any value."""
    members: list[tuple[str, Any, Any]] = []
    if sections == [Config]:
        members += [("config", _ConfigFlag, ()), ("print_config", _PrintFlag, False)]
    for name, owners in fields_of(sections).items():
        field = next(iter(owners.values()))
        if inner := section_types(field.annotation):
            section = _mirror(inner, default_kind(field))
            help_ = tyro.conf.arg(help=_section_help(field, inner))
            members.append((name, Annotated[section, help_], dataclasses.field(default_factory=section)))
        else:
            metavars = dict.fromkeys(metavar(owner.annotation) for owner in owners.values())
            words, hint = _words("|".join(metavars)), _key_hint(owners)
            if name == "kind":
                kinds = [value for section in sections for value in kinds_of(section)]
                words, hint = _words(f"{{{','.join(kinds)}}}"), f"(default: {kind}; valid: {one_of(kinds)})"
            help_ = tyro.conf.arg(help=_key_help(sections, owners), help_behavior_hint=hint)
            members.append((name, Annotated[Any, words, help_], None))
    return dataclasses.make_dataclass("Options", members)


def _words(metavar: str) -> PrimitiveConstructorSpec:
    """Takes whatever words follow a flag; the tree reports where they are too many or none."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=list,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [],
    )


_ConfigFlag = Annotated[
    tyro.conf.UseAppendAction[tuple[Annotated[Any, _words("FILE ...")], ...]],
    tyro.conf.arg(help="Configuration files; later ones win over earlier ones.", help_behavior_hint=""),
]
_PrintFlag = Annotated[
    bool,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.arg(help="Print the resolved configuration as YAML and exit.", help_behavior_hint=""),
]


def _section_help(field: FieldInfo, sections: Sequence[type[Section]]) -> str:
    """The section's help, and where it has several kinds, what each of them is."""
    lines = [field.description or ""]
    if len(sections) > 1:
        lines += [f"Kind {one_of(kinds_of(section))}: {section.__doc__}" for section in sections]
    return "\n".join(lines)


def _key_help(sections: Sequence[type[Section]], owners: dict[type[Section], FieldInfo]) -> str:
    """The key's help, marked with the kinds that have it where others do not."""
    texts = dict.fromkeys(" ".join((field.description or "").split()) for field in owners.values())
    kinds = [kind for section in owners for kind in kinds_of(section)]
    mark = f"Kind {one_of(kinds)}: " if len(owners) < len(sections) else ""
    return mark + " / ".join(texts)


def _key_hint(owners: dict[type[Section], FieldInfo]) -> str:
    """The key's default and what is valid, once where all the kinds that have it agree."""
    defaults = {section: inline(field.get_default()) for section, field in owners.items()}
    default = next(iter(defaults.values()))
    if len(set(defaults.values())) > 1:
        default = ", ".join(f"{value} for {one_of(kinds_of(section))}" for section, value in defaults.items())
    valid = "; ".join(dict.fromkeys(describe_field(field) for field in owners.values()))
    return f"(default: {default}; valid: {valid})"


def _values(options: Any, sections: Sequence[type[Section]]) -> dict[str, Any]:
    """The flags that were given, as the nested mapping that a file with the same keys would hold."""
    values: dict[str, Any] = {}
    for name, owners in fields_of(sections).items():
        field = next(iter(owners.values()))
        given = getattr(options, name)
        if inner := section_types(field.annotation):
            if below := _values(given, inner):
                values[name] = below
        elif given is not None:
            values[name] = _read_words(field.annotation, given)
    return values


def _read_words(annotation: Any, words: list[str]) -> Any:
    """Read the words after a flag as YAML, except that where text is valid they are the text itself."""
    try:
        if (item := list_item(annotation)) is not None:
            whole = read_value(words[0]) if len(words) == 1 else None
            if isinstance(whole, list):
                return whole
            if words:
                return [_read_words(item, [word]) for word in words]
        elif len(words) == 1:
            is_text = accepts(annotation, str) and not accepts(annotation, bool) and words[0] != "null"
            return words[0] if is_text else read_value(words[0])
    except yaml.YAMLError:
        pass
    return UnparsedValue(" ".join(words))


def _add_unknown(values: dict[str, Any], strays: list[str]) -> None:
    """Put the flags that the tree does not have among the values, for the tree to refuse them by name.

    Raises ConfigError for words that belong to no flag.
    """
    path: list[str] = []
    unknown: dict[tuple[str, ...], list[str]] = {}
    lost: list[str] = []
    for word in strays:
        if word.startswith("--") and len(word) > 2:
            name, _, value = word[2:].partition("=")
            path = name.replace("-", "_").split(".")
            unknown[tuple(path)] = [value] if value else []
        elif path:
            unknown[tuple(path)].append(word)
        else:
            lost.append(word)
    if lost:
        raise ConfigError("\n".join(f"{word}: not a flag ({_FLAGS}); {_suggest_flag(word)}" for word in lost))
    for path_, words in unknown.items():
        _insert_unknown_key(values, path_, " ".join(words))


def _insert_unknown_key(values: dict[str, Any], path: tuple[str, ...], text: str) -> None:
    """Set a value below the sections that exist; the rest of the path is shown as given."""
    for depth, name in enumerate(path, start=1):
        field = find(Config, path[:depth])
        if depth == len(path) or field is None or not section_types(field.annotation):
            rest = ".".join(path[depth:])
            values[name] = UnparsedValue(f"{rest} {text}".strip())
            return
        values = values.setdefault(name, {})
        if isinstance(values, UnparsedValue):
            return  # already to be refused


def _suggest_flag(word: str) -> str:
    """Say what a word that belongs to no flag may have been meant to be."""
    if word.endswith((".yaml", ".yml")):
        return f"did you mean --config {word}?"
    key, equals, value = word.partition("=")
    if equals and find(Config, tuple(key.split("."))):
        return f"did you mean --{key} {value}?"
    return "valid: --config FILE and --section.key VALUE; --help lists them"


def _read_file(path: Path, shipped: Path) -> Layer:
    """Read a configuration file; where there is none, say which the folder `shipped` has."""
    where = _shown(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        names = sorted(file.name for file in shipped.glob("*.yaml"))
        close = difflib.get_close_matches(f"{path.stem}.yaml", names, 1)
        guess = f"did you mean {shipped.name}/{close[0]}? " if close else ""
        raise ConfigError(
            f"--config: given {where}: {reason}; {guess}{shipped.name}/ has {', '.join(names) or 'none'}"
        ) from None
    return Layer(where, load_yaml(text, where))


def _shown(path: Path) -> str:
    """A file's name for messages: short where it lies below the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
