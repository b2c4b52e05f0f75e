"""The command line: layers, merge rules, help, and one readable line for each mistake."""

from pathlib import Path

import pytest

from gnunet.config import Config, to_yaml
from gnunet.config.cli import parse
from gnunet.config.schema import section_types, walk
from gnunet.errors import ConfigError

LEAKS = (
    "pydantic",
    "TypedDict",
    "Traceback",
    "validation error",
    "<class",
    "UnparsedValue",
    "Options",
    "tagged-union",
)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes files into the current folder; `default.yaml`, empty, is what no --config reads."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "default.yaml").touch()

    def write(**texts: str) -> None:
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")

    return write


def run(*argv: str) -> Config:
    return parse(argv, default_config=Path.cwd() / "configs" / "default.yaml")


def message(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run(*argv)
    return str(caught.value)


def test_layers_go_over_one_another(files) -> None:
    files(a="seed: 1\ntrain: {total_images: 10, batch_size: 2}", b="train: {total_images: 20}")
    both = ("--config", "a.yaml", "--config", "b.yaml")
    assert run(*both).train.total_images == 20
    assert run(*both).train.batch_size == 2
    assert run("--config=b.yaml", "--config=a.yaml").train.total_images == 10
    assert run("--config", "b.yaml", "a.yaml").train.total_images == 10
    assert run("--train.total_images", "30", *both).train.total_images == 30  # flags win wherever they stand
    assert run("--seed", "5", *both, "--seed=6").seed == 6
    assert run() == Config()


def test_the_default_config_is_read_where_none_is_given(files) -> None:
    files(a="train: {total_images: 10}")
    Path("configs/default.yaml").write_text("seed: 7")
    assert run().seed == 7
    assert run("--config", "a.yaml").seed == 0
    assert "(configs/default.yaml)" in message_after_writing("configs/default.yaml", "seed: x")


def message_after_writing(path: str, text: str) -> str:
    Path(path).write_text(text)
    return message()


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        (["--train.learning_rate", "1e-4"], "train.learning_rate", 1e-4),
        (["--train.learning-rate=+1.5E-3"], "train.learning_rate", 1.5e-3),
        (["--train.total_images", "1e6"], "train.total_images", 1_000_000),
        (["--train.total_images", "1_000"], "train.total_images", 1_000),
        (["--diffusion.kind", "edm", "--diffusion.p_mean", "-1.5"], "diffusion.p_mean", -1.5),
        (["--diffusion.kind=edm", "--diffusion.p_mean=-1e-1"], "diffusion.p_mean", -0.1),
        (["--data.flip", "false"], "data.flip", False),
        (["--data.flip=no"], "data.flip", False),
        (["--train.mixed_precision", "no"], "train.mixed_precision", "no"),
        (["--model.attention_head_dim", "null"], "model.attention_head_dim", None),
        (["--data.label_column", "null"], "data.label_column", None),
        (["--run_dir", "2024"], "run_dir", "2024"),
        (["--run_dir", "runs/a: b"], "run_dir", "runs/a: b"),
        (
            ["--model.block_out_channels", "32", "64", "64", "96"],
            "model.block_out_channels",
            [32, 64, 64, 96],
        ),
        (["--model.block_out_channels", "[32, 64, 64, 96]"], "model.block_out_channels", [32, 64, 64, 96]),
        (["--model.block-out-channels=[32,64,64,96]"], "model.block_out_channels", [32, 64, 64, 96]),
        (["--train.trackers", "tensorboard", "wandb"], "train.trackers", ["tensorboard", "wandb"]),
        (["--train.trackers", "tensorboard"], "train.trackers", ["tensorboard"]),
        (["--train.trackers", "[]"], "train.trackers", []),
        (["--data.subset", "{a: [b, 1, true], c: d}"], "data.subset", {"a": ["b", 1, True], "c": "d"}),
    ],
)
def test_a_flag_is_written_as_in_a_file(files, argv: list[str], path: str, value: object) -> None:
    found: object = run(*argv, "--model.norm.groups", "8")
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_a_change_of_kind_drops_what_the_new_kind_lacks(files) -> None:
    files(
        ddpm="diffusion: {kind: ddpm, beta_end: 0.03}\nsampling: {sampler: ddpm, num_inference_steps: 7}",
        edm="diffusion: {kind: edm, p_mean: -1}",
        more="diffusion: {p_std: 1.1}",
        group="model: {norm: {groups: 16, eps: 1e-6}}",
    )
    config = run("--config", "ddpm.yaml", "--diffusion.kind", "edm")
    assert (
        config.diffusion.kind == "edm" and config.sampling.sampler is None and config.sampling.num_inference_steps == 7
    )
    assert run("--config", "ddpm.yaml", "edm.yaml", "more.yaml").diffusion.p_std == 1.1
    assert run("--config", "ddpm.yaml", "--diffusion.kind", "ddpm").diffusion.beta_end == 0.03
    assert run("--config", "ddpm.yaml", "edm.yaml", "ddpm.yaml").sampling.sampler == "ddpm"
    norm = run("--config", "group.yaml", "--model.norm.kind", "layer").model.norm
    assert (norm.kind, norm.eps) == ("layer", 1e-6)


def test_groups_and_channels_per_group_replace_one_another(files) -> None:
    files(a="model: {norm: {groups: 16}}", b="model: {norm: {channels_per_group: 8}}")
    assert run("--config", "a.yaml", "b.yaml").model.norm.groups is None
    assert run("--config", "a.yaml", "b.yaml").model.norm.channels_per_group == 8
    assert run("--config", "b.yaml", "a.yaml").model.norm.groups == 16
    assert run("--config", "b.yaml", "a.yaml").model.norm.channels_per_group is None
    files(whole=to_yaml(run("--config", "a.yaml")))
    assert run("--config", "whole.yaml", "--model.norm.channels_per_group", "4").model.norm.groups is None


def test_keys_that_do_not_belong_to_a_kind_are_refused(files) -> None:
    files(
        ddpm="diffusion: {kind: ddpm, beta_end: 0.03}",
        late="diffusion: {beta_end: 0.04}",
        typo="diffusion: {bta: 1}",
    )
    text = message("--config", "ddpm.yaml", "--diffusion.kind", "edm", "--diffusion.beta_end", "0.05")
    assert "diffusion.beta_end: unknown key (command line); it belongs to kind ddpm" in text
    assert "valid keys of diffusion with kind edm: kind, p_mean" in text
    text = message("--config", "ddpm.yaml", "--diffusion.kind", "edm", "--sampling.sampler", "ddim")
    assert "sampling.sampler: given ddim (command line); valid: heun, euler or dpm++" in text
    files(edm="diffusion: {kind: edm}")
    assert "(late.yaml)" in message("--config", "edm.yaml", "late.yaml")
    assert "diffusion.bta" in message("--config", "typo.yaml", "--diffusion.kind", "edm")  # not a key of any kind


# (flags, the same in a file, what the message has): a file and a flag get the same message.
MISTAKES = [
    (
        "--train.batch_size 4.5",
        "train: {batch_size: 4.5}",
        "train.batch_size: given 4.5 (?); valid: a whole number, at least 1",
    ),
    (
        "--train.batch_size 0",
        "train: {batch_size: 0}",
        "train.batch_size: given 0 (?); valid: a whole number, at least 1",
    ),
    (
        "--train.total_images many",
        "train: {total_images: many}",
        "train.total_images: given many (?); valid: a whole number",
    ),
    (
        "--train.total_images true",
        "train: {total_images: true}",
        "train.total_images: given true (?); valid: a whole number",
    ),
    (
        "--train.learning_rate 0",
        "train: {learning_rate: 0}",
        "train.learning_rate: given 0 (?); valid: a number, above 0",
    ),
    (
        "--train.learning_rate .nan",
        "train: {learning_rate: .nan}",
        "train.learning_rate: given .nan (?); valid: a number",
    ),
    (
        "--train.learning_rate 1e999",
        "train: {learning_rate: 1e999}",
        "train.learning_rate: given .inf (?); valid: a number",
    ),
    (
        "--train.ema_std 0.5",
        "train: {ema_std: 0.5}",
        "train.ema_std: given 0.5 (?); valid: a number, above 0 and at most 0.28",
    ),
    (
        "--train.lr_schedule step",
        "train: {lr_schedule: step}",
        "given step (?); valid: constant, linear, cosine or inverse_sqrt",
    ),
    (
        "--train.mixed_precision fp8",
        "train: {mixed_precision: fp8}",
        "given fp8 (?); valid: no, bf16 or fp16",
    ),
    (
        "--train.max_grad_norm no",
        "train: {max_grad_norm: no}",
        "given false (?); valid: a number, above 0, or null",
    ),
    ("--data.flip 1", "data: {flip: 1}", "data.flip: given 1 (?); valid: true or false"),
    ("--data.subset [a]", "data: {subset: [a]}", "data.subset: given [a] (?); valid: a mapping from columns"),
    (
        "--data.resolution null",
        "data: {resolution: null}",
        "data.resolution: given null (?); valid: a whole number",
    ),
    ("--model.in_channels 4", "model: {in_channels: 4}", "model.in_channels: given 4 (?); valid: 1 or 3"),
    (
        "--model.block_out_channels 32 x",
        "model: {block_out_channels: [32, x]}",
        "given [32, x] (?); valid: a list of one or more whole numbers, each at least 1",
    ),
    (
        "--model.norm.kind bach",
        "model: {norm: {kind: bach}}",
        "model.norm.kind: given bach (?); valid: group, layer",
    ),
    (
        "--diffusion.kind vp",
        "diffusion: {kind: vp}",
        "diffusion.kind: given vp (?); valid: ddpm, edm or flow",
    ),
    (
        "--model 3",
        "model: 3",
        "model: given 3 (?); valid: its keys model.in_channels, model.block_out_channels",
    ),
    (
        "--model.norm group",
        "model: {norm: group}",
        "model.norm: given group (?); valid: its keys model.norm.kind",
    ),
    (
        "--train.learning_rat 1",
        "train: {learning_rat: 1}",
        "unknown key (?); did you mean train.learning_rate? valid keys of train: total_images, ",
    ),
    (
        "--learning_rate 1",
        "learning_rate: 1",
        "learning_rate: unknown key (?); did you mean train.learning_rate?",
    ),
    ("--train.flip true", "train: {flip: true}", "train.flip: unknown key (?); did you mean data.flip?"),
    (
        "--batch_size 1",
        "batch_size: 1",
        "did you mean train.batch_size, validation.batch_size or sampling.batch_size?",
    ),
    (
        "--modl.norm.groups 1",
        "modl: {norm: {groups: 1}}",
        "modl: unknown key (?); did you mean model? valid keys: seed, ",
    ),
    ("--zzz 1", "zzz: 1", "zzz: unknown key (?); valid keys: seed, run_dir, data, model"),
    (
        "--diffusion.p_mean 1",
        "diffusion: {p_mean: 1}",
        "it belongs to kind edm; valid keys of diffusion with kind ddpm: kind",
    ),
    ("--train.lr 1", "train: {lr: 1}", "train.lr: unknown key (?); use train.learning_rate"),
    ("--model.norm_num_groups 8", "model: {norm_num_groups: 8}", "unknown key (?); use model.norm.groups;"),
    ("--model.norm_eps 8", "model: {norm_eps: 8}", "unknown key (?); use model.norm.eps;"),
    ("--model.sample_size 8", "model: {sample_size: 8}", "unknown key (?); use data.resolution;"),
    ("--model.out_channels 8", "model: {out_channels: 8}", "unknown key (?); use model.in_channels"),
    (
        "--model.num_class_embeds 8",
        "model: {num_class_embeds: 8}",
        "unknown key (?); use data.class_conditional",
    ),
    (
        "--data.resolution 30",
        "data: {resolution: 30}",
        "data.resolution: given 30 (?); valid: a multiple of 8, for instance 24 or 32",
    ),
]


@pytest.mark.parametrize(("flags", "text", "expected"), MISTAKES)
def test_a_file_and_a_flag_with_one_mistake_get_one_message(files, flags: str, text: str, expected: str) -> None:
    files(bad=text)
    from_flag, from_file = message(*flags.split()), message("--config", "bad.yaml")
    assert expected.replace("?)", "command line)") in from_flag
    assert from_file == from_flag.replace("(command line)", "(bad.yaml)")
    assert "\n" not in from_flag
    assert not [leak for leak in LEAKS if leak in from_flag]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--train.batch_size", ["train.batch_size: given nothing (command line)"]),
        ("--train.batch_size --seed 3", ["train.batch_size: given nothing (command line)"]),
        ("--train.batch_size 3 4", ["train.batch_size: given 3 4 (command line)"]),
        ("--data.subset {a:", ["data.subset: given {a: (command line)"]),
        ("--data.subset.a b", ["data.subset: given a b (command line)"]),
        ("--train.total_images.x 3 --train.total_images 3", ["train.total_images: given x 3 (command line)"]),
        ("--model 3 --model.x 4", ["model: given 3 (command line)"]),
        ("--model.block_out_channels 32 [", ["model.block_out_channels: given [32, '['] (command line)"]),
        ("--bogus", ["bogus: unknown key (command line)"]),
        ("-q 3", ["-q: not a flag", "3: not a flag", "--section.key VALUE"]),
        ("--print_config yes", ["yes: not a flag"]),
        ("a.yaml", ["a.yaml: not a flag (command line); did you mean --config a.yaml?"]),
        (
            "train.total_images=3",
            ["train.total_images=3: not a flag (command line); did you mean --train.total_images 3?"],
        ),
        ("--config", ["--config: given nothing"]),
        ("--config --seed 1", ["--config: given nothing"]),
        ("--config none.yaml", ["none.yaml: No such file", "configs/ has default.yaml"]),
        ("--config defalt", ["defalt: No such file", "did you mean configs/default.yaml?"]),
        ("--config configs", ["configs: Is a directory"]),
        ("--zzz 1 --train.total_images x --data.flip 2", ["3 problems", "zzz:", "train.total_images:", "data.flip:"]),
    ],
)
def test_mistakes_on_the_command_line(files, capsys, flags: str, parts: list[str]) -> None:
    text = message(*flags.split())
    assert all(part in text for part in parts), text
    assert not [leak for leak in LEAKS if leak in text]
    assert capsys.readouterr() == ("", "")


def test_a_file_that_is_not_text(files) -> None:
    Path("bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bad.yaml: not UTF-8 text" in message("--config", "bad.yaml")


def test_help_describes_every_key(files, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--bogus", "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    words = " ".join(text.replace("│", " ").split())
    for path, field in walk([Config]):
        assert " ".join(field.description.split()) in words, path
        if not section_types(field.annotation):
            assert f"--{'.'.join(path)} " in words, path
    assert words.count("(default: ") == words.count("valid: ") > 90
    assert "Kind edm: Mean of log sigma in training. (default: -1.2; valid: a number)" in words
    assert "--config FILE" in words and "--print_config" in words and "configs/default.yaml is read" in words
    assert not [leak for leak in LEAKS if leak in text]


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--diffusion.kind flow --seed 3",
        "--model.norm.kind layer --train.mixed_precision no --run_dir a:b",
    ],
)
def test_print_config_gives_the_tree_back(files, capsys, flags: str) -> None:
    config = run(*flags.split())
    with pytest.raises(SystemExit) as stopped:
        run("--print_config", *flags.split())
    assert stopped.value.code == 0
    files(printed=capsys.readouterr().out)
    assert run("--config", "printed.yaml") == config


def test_an_unconditional_run_forgets_a_files_guidance(tmp_path):
    file = tmp_path / "guided.yaml"
    file.write_text("data: {class_conditional: true}\nsampling: {guidance_scale: 3}\n")
    flags = ["--config", str(file), "--data.class_conditional", "false"]
    assert parse(flags, default_config=file).sampling.guidance_scale == 1
    with pytest.raises(ConfigError, match="sampling.guidance_scale: given 2"):
        parse([*flags, "--sampling.guidance_scale", "2"], default_config=file)
