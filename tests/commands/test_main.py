"""The console command and what `import gnunet` loads."""

import errno
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gnunet
from gnunet.__main__ import COMMANDS, main
from gnunet.errors import run_cli

ROOT = Path(__file__).parents[2]
NAMES = ("class", "device", "gpus", "num_samples", "output", "resume", "source", "steps", "workers")
SOURCE_SUFFIXES = (".py", ".j2", ".cu", ".h")


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_at_each_level(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 0 and "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["sample", "--help"]], ids=str)
@pytest.mark.parametrize("closed", ["reader", "stream"])
def test_help_that_nobody_reads(arguments, closed, monkeypatch):
    """As in `gnunet train --help | head -1` and `gnunet train --help >&-`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output if closed == "reader" else None)
        with pytest.raises(SystemExit) as exit:
            main(arguments)
    assert exit.value.code == 0


def test_version_and_unknown_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and gnunet.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        main(["smaple"])
    assert exit.value.code == 2 and "sample" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "evaluate", "ema", "push", "ablate"])
def test_hints_at_flags_that_the_command_has(command, capsys):
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main([command, *arguments])
        return "".join(capsys.readouterr())

    flags = set(re.findall(r"--\w+", said("--help")))
    hints = {name: said(f"--{name}").partition(command)[2] for name in NAMES if f"--{name}" not in flags}
    for name, hint in hints.items():
        assert {flag for flag in re.findall(r"--[\w.]+", hint) if "." not in flag} <= flags, name
    assert ("--out" in hints["output"]) == (command in ("sample", "evaluate", "ema"))
    assert ("first argument" in hints["source"]) == (command != "ablate")
    assert ("accelerate" in hints["gpus"]) == (command in ("sample", "evaluate"))


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `code`."""
    code = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("command", ["ema", "push"])
def test_what_several_processes_would_write_at_once(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        main([command, "run"])
    assert f"{command}: started as 2 processes" in capsys.readouterr().err


def test_help_loads_no_torch_and_the_operator_no_trainer():
    for command in ("sample", "evaluate", "ablate"):
        assert "torch" not in loaded_by(f"from gnunet.commands import {command}")
    assert "torch" not in loaded_by("import gnunet.__main__")
    loaded = loaded_by("from gnunet import group_norm_silu")
    assert "torch" in loaded and not loaded & {"accelerate", "diffusers", "datasets"}


def test_public_names_resolve():
    for name in gnunet.__all__:
        assert callable(getattr(gnunet, name))
    with pytest.raises(AttributeError):
        gnunet.smaple  # noqa: B018


@pytest.mark.parametrize("script", ["train.py", "scripts/sample.py", "scripts/evaluate.py", "scripts/ablate.py"])
def test_scripts_are_the_commands(script):
    source = (ROOT / script).read_text()
    assert f'main(["{Path(script).stem}", *sys.argv[1:]])' in source


def test_wheel_has_the_configs_the_data_and_the_command(tmp_path):
    """What `pip install gnunet` gives."""
    wheel = pytest.importorskip("hatchling.builders.wheel")
    [path] = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        [scripts] = [name for name in names if name.endswith("entry_points.txt")]
        assert "gnunet = gnunet.__main__:main" in archive.read(scripts).decode()
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "gnunet").rglob("*") if file.suffix in SOURCE_SUFFIXES}
    expected |= {f"gnunet/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.yaml")}
    expected |= {"gnunet/assets/noto_emoji/noto_emoji.parquet", "gnunet/assets/noto_emoji/LICENSE"}
    assert expected <= names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "assets/", "configs/"))]


def test_full_disk_is_an_error_of_one_line_and_other_failures_are_bugs(capsys):
    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number), "runs/x/file")

    assert run_cli(lambda: fail(errno.ENOSPC)) == 2
    assert capsys.readouterr().err == "error: runs/x/file cannot be written: No space left on device\n"
    with pytest.raises(PermissionError):
        run_cli(lambda: fail(errno.EACCES))
