"""The command line: precedence, the syntax of flags, --help and --print_config."""

import re
from pathlib import Path
from typing import Any

import pytest

from gnunet.config import Config, parse_args, to_yaml
from gnunet.config.schema import sections_of, walk
from gnunet.errors import ConfigError


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes files into the current folder; `default.yaml`, empty, is read without --config."""
    monkeypatch.chdir(tmp_path)
    Path("default.yaml").touch()

    def write(**texts: str) -> None:
        for name, text in texts.items():
            Path(f"{name}.yaml").write_text(text, encoding="utf-8")

    return write


def run(*argv: str) -> Config:
    return parse_args(argv, default_config="default.yaml")


def test_flags_take_precedence_over_files_and_later_files_over_earlier(files) -> None:
    files(a="seed: 1\ntrain: {total_images: 10, batch_size: 2}", b="train: {total_images: 20}")
    both = ("--config", "a.yaml", "--config", "b.yaml")
    assert (run(*both).train.total_images, run(*both).train.batch_size) == (20, 2)
    assert run("--config=b.yaml", "--config=a.yaml").train.total_images == 10
    assert run("--config", "b.yaml", "a.yaml").train.total_images == 10
    assert run("--train.total_images", "30", *both).train.total_images == 30
    assert run("--seed", "5", *both, "--seed=6").seed == 6
    assert run() == Config()
    files(default="seed: 7")
    assert (run().seed, run("--config", "b.yaml").seed) == (7, 0)


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        ("--train.learning_rate 1e-4", "train.learning_rate", 1e-4),
        ("--train.learning-rate=+1.5E-3", "train.learning_rate", 1.5e-3),
        ("--train.total_images 1e6", "train.total_images", 1_000_000),
        ("--train.total_images 1_000", "train.total_images", 1_000),
        ("--diffusion.kind edm --diffusion.p_mean -1.5", "diffusion.p_mean", -1.5),
        ("--diffusion.p_mean=-1e-1 --diffusion.kind=edm", "diffusion.p_mean", -0.1),
        ("--data.flip false", "data.flip", False),
        ("--data.flip=no", "data.flip", False),
        ("--train.mixed_precision no", "train.mixed_precision", "no"),
        ("--train.compile true", "train.compile", True),
        ("--train.compile max-autotune", "train.compile", "max-autotune"),
        ("--model.attention_head_dim null", "model.attention_head_dim", None),
        ("--data.label_column null", "data.label_column", None),
        ("--run_dir 2024", "run_dir", "2024"),
        ("--run_dir runs/a: b", "run_dir", "runs/a: b"),
        ("--model.block_out_channels 32 64 64 96", "model.block_out_channels", [32, 64, 64, 96]),
        ("--model.block_out_channels [32, 64, 64, 96]", "model.block_out_channels", [32, 64, 64, 96]),
        ("--model.block-out-channels=[32,64,64,96]", "model.block_out_channels", [32, 64, 64, 96]),
        ("--train.trackers tensorboard wandb", "train.trackers", ["tensorboard", "wandb"]),
        ("--train.trackers tensorboard", "train.trackers", ["tensorboard"]),
        ("--train.trackers []", "train.trackers", []),
        ("--data.subset {a: [b, 1, true], c: d}", "data.subset", {"a": ["b", 1, True], "c": "d"}),
        ("--data {split: test, flip: false} --data.flip true", "data.flip", True),
    ],
)
def test_value_of_a_flag(files, argv: str, key: str, value: Any) -> None:
    arguments = argv.split()
    if "{" in argv or "[32, " in argv or ": b" in argv:  # one shell argument
        arguments = [part for word in argv.split(" --") for part in f"--{word.removeprefix('--')}".split(" ", 1)]
    result: Any = run(*arguments, "--model.norm.groups", "8")
    for name in key.split("."):
        result = getattr(result, name)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--train.batch_size", "train.batch_size: no value given"),
        ("--train.batch_size --seed 3", "train.batch_size: no value given"),
        ("--model.norm.overrides.decoder.groups --seed 3", "model.norm.overrides.decoder.groups: no value given"),
        ("--train.batch_size 3 4", "train.batch_size: given 3 4 "),
        ("--train.batch_size.x 3", "train.batch_size: given {x: 3} "),
        ("--data.subset {a:", "data.subset: given '{a:' "),
        ("--bogus 1", "bogus: unknown key"),
        ("--bogus", "bogus: unknown key"),
        ("--train.batchsize", "train.batchsize: unknown key (command line); did you mean train.batch_size?"),
        ("--resume", "resume: unknown key (command line); use the same command"),
        ("--device cuda", "device: unknown key (command line); use CUDA_VISIBLE_DEVICES"),
        ("--epochs 3", "epochs: unknown key (command line); use train.total_images"),
        ("--batch-size 8", "batch_size: unknown key (command line); use train.batch_size"),
        ("--data.image_size 8", "data.image_size: unknown key (command line); use data.resolution"),
        ("--train.device cuda", "train.device: unknown key (command line); use CUDA_VISIBLE_DEVICES"),
        ("--model.norm.name group", "model.norm.name: unknown key (command line); valid keys of model.norm: kind, "),
        ("--sampling.batch 8", "sampling.batch: unknown key (command line); did you mean sampling.batch_size?"),
        ("--train.batchsize 8", "train.batchsize: unknown key (command line); did you mean train.batch_size?"),
        ("--mixed_precision no", "mixed_precision: unknown key (command line); use train.mixed_precision"),
        ("-q 3", "-q: not a flag"),
        ("a.yaml", "a.yaml: not a flag (command line); did you mean --config a.yaml?"),
        ("train.batch_size=3", "train.batch_size=3: not a flag (command line); did you mean --train.batch_size 3?"),
        ("--config none.yaml", "none.yaml: No such file"),
    ],
)
def test_error_of_an_argument(files, capsys, argv: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(*argv.split())
    assert str(caught.value).startswith(named) and "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_config_without_a_value_exits_with_usage(files, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--config", "--seed", "1")
    assert stopped.value.code == 2 and "--config" in capsys.readouterr().err


def test_help_describes_every_key_and_kind(files, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--bogus", "--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for path, field in walk({"": Config}):
        assert " ".join((field.description or sections_of(field)[""].__doc__).split()) in text, path
        if not sections_of(field):
            assert f"--{'.'.join(path)} " in text, path
    assert "[kind edm] Mean of log sigma in training. (default: -1.2; valid: a number)" in text
    assert len(text) < 25_000 and "kind switchable:" not in text  # the 21 norms have a README
    assert "--config FILE" in text and "--print_config" in text and "default.yaml" in text


def test_help_has_the_values_of_the_files(files, capsys) -> None:
    files(default="train: {total_images: 10}", other="diffusion: {kind: edm, p_mean: -0.4}\nrun_dir: runs/x")
    for argv, values in {
        ("--help",): ["(default.yaml: 10; default: 1000000; ", "(default.yaml: ddpm; valid: ddpm, "],
        ("--help", "--config", "other.yaml"): ["(other.yaml: -0.4; default: -1.2; ", "(default: 1000000; ", "runs/x; "],
    }.items():
        with pytest.raises(SystemExit):
            run(*argv)
        text = " ".join(capsys.readouterr().out.split())
        assert all(value in text for value in values)


def test_known_flags_of_other_programs_name_keys() -> None:
    keys = {".".join(path) for path, _ in walk({"": Config})}
    for name, hint in Config.hints.items():
        assert name not in Config.model_fields
        assert re.split("[,; ]", hint)[0] in (*keys, "the", "CUDA_VISIBLE_DEVICES", "`accelerate"), hint


@pytest.mark.parametrize(
    "argv", ["", "--diffusion.kind flow --seed 3", "--model.norm.kind layer --train.mixed_precision no --run_dir a:b"]
)
def test_print_config_prints_a_config_with_the_same_result(files, capsys, argv: str) -> None:
    config = run(*argv.split())
    with pytest.raises(SystemExit) as stopped:
        run(*argv.split(), "--print_config")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed == to_yaml(config)
    files(printed=printed)
    assert run("--config", "printed.yaml") == config
