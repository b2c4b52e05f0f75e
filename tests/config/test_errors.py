"""The texts of configuration errors: errors.yaml has them, and a file and flags with the same mistake get the same."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gnunet.config import load_config, parse_args
from gnunet.config.merge import ConfigSource
from gnunet.config.yaml_io import format_value, parse_value
from gnunet.errors import ConfigError

CASES = parse_value((Path(__file__).parent / "errors.yaml").read_text())


def flags_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The flags that give nested values."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value and all(str(name).isidentifier() for name in value):
            yield from flags_of(value, f"{prefix}{key}.")
        else:
            yield from (f"--{prefix}{key}", format_value(value))


@pytest.mark.parametrize("case", CASES, ids=lambda case: format_value(case["given"]))
def test_error_text_of_file_and_flags(case: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as from_file:
        load_config(ConfigSource("FILE", case["given"]))
    assert str(from_file.value) == case["error"]
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(ConfigError) as from_flags:
        parse_args(list(flags_of(case["given"])), default_config=tmp_path / "empty.yaml")
    assert str(from_flags.value).replace("(command line)", "(FILE)") == case["error"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seed: 1\nseed: 2", "x.yaml, line 2: not valid YAML: duplicate key seed"),
        ("train:\n  total_images: 1\n  total_images: 2", "x.yaml, line 3: "),
        ("- 1", r"x.yaml: given \[1\]; valid: a mapping"),
        ("seed", "x.yaml: given seed; valid: a mapping"),
        ("seed: [1", "x.yaml, line 1: not valid YAML"),
        ("seed: 0x_", "x.yaml: not valid YAML"),
        ("seed: 2024-13-40", "x.yaml: not valid YAML"),
        ("a: b: c", "x.yaml, line 1: not valid YAML"),
        ("seed: !!python/name:os.system", "x.yaml, line 1: not valid YAML"),
    ],
)
def test_error_of_a_file_that_is_not_a_configuration(tmp_path, monkeypatch, text: str, named: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"^{named}") as caught:
        load_config("x.yaml")
    assert "\n" not in str(caught.value)


def test_error_of_a_file_that_cannot_be_read(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_bytes(b"\xff\xfe\x00")
    missing = "No such file or directory"
    for name, text in (
        ("bad.yaml", "bad.yaml: not UTF-8 text"),
        ("none.yaml", f"none.yaml: {missing}; valid: a YAML file, or one of the shipped configs cifar10"),
        ("accelerate/cpu", f"accelerate/cpu: {missing}"),
        ("cifar1O", f"cifar1O: {missing}; valid: a YAML file, "),
        (tmp_path, ".: Is a directory"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(name)
        assert str(caught.value).startswith(text)
        assert ("did you mean 'cifar10'?" in str(caught.value)) == (name == "cifar1O")
