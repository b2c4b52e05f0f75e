"""The tree itself: what it accepts, what does not go together, and its helpers."""

import pickle
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gnunet.config import (
    Config,
    TrainConfig,
    accumulation_steps,
    differences,
    from_yaml,
    load_config,
    to_yaml,
    unet_kwargs,
)
from gnunet.config.merge import Layer, load_yaml
from gnunet.config.norms import SECTIONS
from gnunet.config.schema import describe_field, section_types, walk
from gnunet.diffusion import PROCESSES, make_process
from gnunet.errors import ConfigError
from gnunet.models import UNet2D, norm_sites
from gnunet.norms import NORMS

SMALL = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
}
SMALL_NORM = {"norm": {"groups": 4}}


def build(**sections: Any) -> Config:
    return load_config([Layer("test.yaml", sections)])


def message(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(**sections)
    return str(caught.value)


def test_every_key_has_help_and_says_what_is_valid() -> None:
    for path, field in walk([Config]):
        assert field.description, path
        if not section_types(field.annotation):
            assert describe_field(field), path


def test_the_tree_is_immutable() -> None:
    with pytest.raises(ValidationError):
        Config().seed = 1


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1.0e-4", "0.0001", ".0001", "1_0e-5"])
def test_every_spelling_of_a_number_is_read(text: str) -> None:
    assert from_yaml(f"train: {{learning_rate: {text}}}", "x").train.learning_rate == 1e-4


def test_a_whole_float_is_a_count() -> None:
    assert build(train={"total_images": 1e6}).train.total_images == 1_000_000
    assert type(build(train={"total_images": 1e6}).train.total_images) is int


def test_no_means_no() -> None:
    assert from_yaml("train: {mixed_precision: no}", "x").train.mixed_precision == "no"
    assert from_yaml("train: {mixed_precision: 'no'}", "x").train.mixed_precision == "no"


def test_an_empty_section_is_its_defaults() -> None:
    assert from_yaml("train:\nmodel:\n", "x") == Config()
    assert from_yaml("# nothing\n", "x") == Config()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: 1\nseed: 2", ["x.yaml, line 2", "seed", "twice"]),
        ("train:\n  images: 1\n  images: 2", ["line 3", "images", "twice"]),
        ("- 1", ["x.yaml", "[1]", "mapping"]),
        ("seed", ["x.yaml", "seed", "mapping"]),
        ("seed: [1", ["x.yaml, line", "YAML"]),
        ("seed: 0x_", ["x.yaml", "YAML"]),
        ("a: b: c", ["x.yaml, line 1", "YAML"]),
        ("seed: !!python/name:os.system", ["x.yaml, line 1", "YAML"]),
    ],
)
def test_text_that_is_not_a_configuration(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_yaml(text, "x.yaml")
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


COMBINATIONS = [
    (
        {"model": {"down_block_types": ["DownBlock2D"]}},
        ["model.down_block_types: given 1", "valid: 4 of them"],
    ),
    ({"data": {"resolution": 20}}, ["data.resolution: given 20", "multiple of 8", "16 or 24"]),
    ({"data": {"resolution": 4}}, ["data.resolution: given 4", "for instance 8 ("]),
    ({"model": {"attention_head_dim": 5}}, ["model.attention_head_dim: given 5", "1, 2, 4, 8", "or null"]),
    (
        {"model": {**SMALL, "norm": {"groups": 16}}},
        ["model.norm.groups: given 16", "valid: 1, 2, 4 or 8", "8 channels of down_blocks.0.resnets.0.norm1"],
    ),
    (
        {"model": {**SMALL, "norm": {"channels_per_group": 16}}},
        ["model.norm.channels_per_group: given 16", "valid: 1, 2, 4 or 8"],
    ),
    (
        {"model": {**SMALL, **SMALL_NORM, "attn_norm_num_groups": 3}},
        ["model.attn_norm_num_groups: given 3", "1, 2, 4, 8 or 16", "mid_block.attentions.0.group_norm"],
    ),
    (
        {"model": {"norm": {"groups": 8, "channels_per_group": 8}}},
        ["model.norm.groups", "null for the other"],
    ),
    ({"model": {"norm": {"groups": None}}}, ["model.norm.groups: given null"]),
    ({"model": {"norm": {"kind": "batch", "momentum": 2}}}, ["model.norm.momentum: given 2", "at most 1"]),
    ({"model": {"norm": {"kind": "batch", "groups": 8}}}, ["model.norm.groups: unknown key", "belongs to kind group"]),
    ({"model": {"norm": {"overrides": {"decodr": {}}}}}, ["model.norm: given", "'decodr'", "'decoder'", "'32'"]),
    (
        {"model": {"norm": {"overrides": {"decoder": {"knd": "none"}}}}},
        ["model.norm.overrides.decoder.knd: unknown key", "valid keys: kind, groups"],
    ),
    (
        {"model": {"norm": {"overrides": {"decoder": {"kind": "nope"}}}}},
        ["model.norm: given", "up_blocks.0", "kind must be one of group", "'nope'"],
    ),
    (
        {"model": {"norm": {"overrides": {8: {"groups": 7}}}}},
        ["model.norm: given", "norm of down_blocks.2", "groups = 7 does not divide 256 channels"],
    ),
    ({"model": {"norm": {"overrides": {"middle": 3}}}}, ["model.norm.overrides: given", "a mapping from regions"]),
    (
        {"model": {"norm": {"kind": "batch_renorm"}, "gradient_checkpointing": True}},
        ["model.gradient_checkpointing: given true", "valid: false", "down_blocks.0"],
    ),
    ({"model": {"time_embedding_type": "fourier"}}, ["model.time_embedding_type", "positional", "ddpm"]),
    (
        {"train": {"batch_size": 24, "micro_batch_size": 7}},
        ["micro_batch_size: given 7", "1, 2, 3, 4, 6, 8, 12 or 24"],
    ),
    ({"train": {"lr_schedule": "inverse_sqrt"}}, ["train.lr_decay_start: given null", "warmup_images"]),
    (
        {"diffusion": {"kind": "edm"}, "sampling": {"sampler": "ddim"}},
        ["sampling.sampler: given ddim", "heun", "edm"],
    ),
    ({"sampling": {"num_inference_steps": 1001}}, ["sampling.num_inference_steps: given 1001", "1000"]),
    ({"sampling": {"guidance_scale": 2}}, ["sampling.guidance_scale: given 2 ", "data.class_conditional"]),
    (
        {"diffusion": {"beta_start": 0.5}},
        ["diffusion.beta_start: given 0.5", "below diffusion.beta_end 0.02"],
    ),
    (
        {"diffusion": {"kind": "edm", "sigma_min": 90}},
        ["diffusion.sigma_min: given 90", "below diffusion.sigma_max"],
    ),
    (
        {"validation": {"log_snr_min": 9}},
        ["validation.log_snr_min: given 9", "below validation.log_snr_max 8"],
    ),
    (
        {"validation": {"num_examples": 8}},
        ["validation.num_examples: given 8", "at least validation.num_bins 16"],
    ),
]


@pytest.mark.parametrize(("sections", "parts"), COMBINATIONS)
def test_values_that_do_not_go_together(sections: dict, parts: list[str]) -> None:
    text = message(**sections)
    assert all(part in text for part in parts), text
    assert "(test.yaml)" in text or "(default)" in text
    assert "\n" not in text


def test_every_problem_is_listed() -> None:
    text = message(data={"resolution": 30}, sampling={"num_inference_steps": 0, "guidance_scale": -1}, nonsense=1)
    assert text.startswith("3 problems") and len(text.splitlines()) == 4  # bad values first
    text = message(data={"resolution": 30}, sampling={"num_inference_steps": 2000, "guidance_scale": 2})
    assert text.startswith("3 problems") and len(text.splitlines()) == 4  # then bad combinations


def test_guidance_needs_dropped_labels() -> None:
    labels = {"class_conditional": True}
    assert build(data=labels, sampling={"guidance_scale": 2}).sampling.guidance_scale == 2
    assert "label_dropout" in message(data={**labels, "label_dropout": 0}, sampling={"guidance_scale": 2})


def test_the_groups_that_are_named_are_those_that_divide_every_layer() -> None:
    odd = {**SMALL, "block_out_channels": [12, 30]}
    named = message(model={**odd, "norm": {"groups": 5}, "attention_head_dim": None}).split("valid: ")[1].split(",")[0]
    assert "1, 2, 3 or 6".startswith(named)
    for groups in range(1, 31):
        sections = {"model": {**odd, "norm": {"groups": groups}, "attention_head_dim": None}}
        if groups in (1, 2, 3, 6):
            UNet2D(**unet_kwargs(build(**sections), None))
        else:
            message(**sections)


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [
        (24, None, 1, (24, 1)),
        (24, None, 2, (12, 1)),
        (24, 4, 2, (4, 3)),
        (24, 12, 2, (12, 1)),
        (1, None, 1, (1, 1)),
    ],
)
def test_accumulation_steps(batch: int, micro: int | None, processes: int, expected: tuple[int, int]) -> None:
    train = TrainConfig(batch_size=batch, micro_batch_size=micro)
    assert accumulation_steps(train, processes) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "parts"),
    [
        (24, None, 5, ["train.batch_size: given 24", "5 processes", "20 or 25", "6, 8, 12 or 24 processes"]),
        (24, 12, 4, ["train.micro_batch_size: given 12", "batch_size 24", "4 processes", "1, 2, 3 or 6"]),
        (2, None, 4, ["train.batch_size: given 2", "for instance 4"]),
    ],
)
def test_a_batch_that_does_not_split(batch: int, micro: int | None, processes: int, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        accumulation_steps(TrainConfig(batch_size=batch, micro_batch_size=micro), processes)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_differences() -> None:
    a, b = build(), build(seed=3, diffusion={"kind": "flow"}, model={"block_out_channels": [64, 64, 64, 64]})
    lines = differences(a, b)
    assert "seed: 0 -> 3" in lines
    assert "model.block_out_channels: [128, 256, 256, 256] -> [64, 64, 64, 64]" in lines
    assert "diffusion.kind: ddpm -> flow" in lines
    assert "diffusion.beta_end: 0.02 -> absent" in lines
    assert differences(a, a) == []
    long = [{"name": [*"abcdefgh" * 20, last]} for last in "xy"]  # differ only where the message is cut
    assert len(differences(*(build(data={"subset": subset}) for subset in long))) == 1
    assert len(differences(build(run_dir="a b"), build(run_dir="a  b"))) == 1


def test_unet_kwargs_build_the_model() -> None:
    data = {"class_conditional": True, "resolution": 16}
    config = build(data=data, model={**SMALL, **SMALL_NORM, "in_channels": 1, "attention_head_dim": 4})
    model = UNet2D(**unet_kwargs(config, 5))
    assert (model.config.sample_size, model.config.in_channels, model.config.out_channels) == (16, 1, 1)
    assert model.config.num_class_embeds == 6
    assert (model.config.norm_num_groups, model.config.norm["groups"]) == (4, 4)
    without = build(data={**data, "label_dropout": 0.0})
    assert unet_kwargs(without, 5)["num_class_embeds"] == 5
    assert unet_kwargs(without, None)["num_class_embeds"] is unet_kwargs(without, 0)["num_class_embeds"] is None


@pytest.mark.parametrize("norm", [*({"kind": kind} for kind in SECTIONS), {"channels_per_group": 4}])
def test_every_kind_of_norm_is_configured_and_built(norm: dict) -> None:
    if "groups" in SECTIONS[norm.get("kind", "group")].model_fields and "channels_per_group" not in norm:
        norm = {**norm, "groups": 4}
    arguments = unet_kwargs(build(model={**SMALL, "norm": norm}), None)
    UNet2D(**arguments)
    assert len(norm_sites(arguments)) > 0


def test_the_keys_of_a_kind_are_its_options() -> None:
    assert list(SECTIONS) == list(NORMS)
    for kind, section in SECTIONS.items():
        options = {**NORMS[kind].options, **NORMS[kind].block_options}
        keys = {"kind", "overrides", "separate_skip_norm", *options} - {"noise_edges", "input_std"}
        assert set(section.model_fields) == keys | ({"noise_bins"} if "noise_edges" in options else set())
        for name in set(options) & set(section.model_fields):
            assert section.model_fields[name].default == options[name].default


def test_a_configuration_goes_to_another_process() -> None:
    config = build(model={**SMALL, "norm": {"kind": "switchable"}})
    assert pickle.loads(pickle.dumps(config)) == config


def test_norms_differ_by_region() -> None:
    overrides = {"decoder": {"kind": "batch", "noise_bins": 2}, 8: {"kind": "layer"}, "out": {"groups": 2}}
    config = build(data={"resolution": 16}, model={**SMALL, "norm": {"groups": 4, "overrides": overrides}})
    assert set(config.model.norm.overrides) == {"decoder", "8", "out"}
    model = UNet2D(**unet_kwargs(config, None))
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["down_blocks.0.resnets.0.norm1"] is NORMS["group"]
    assert kinds["down_blocks.1.resnets.0.norm1"] is NORMS["layer"]
    assert kinds["up_blocks.1.resnets.0.norm1"] is NORMS["batch"]
    assert "groups = 32" in message(model={**SMALL, "norm": {"kind": "batch", "overrides": {"out": {"kind": "group"}}}})
    assert model.conv_norm_out.num_groups == 2
    assert from_yaml(to_yaml(config), "again") == config


@pytest.mark.parametrize("kind", PROCESSES)
def test_noise_bins_are_equally_frequent(kind: str) -> None:
    config = build(diffusion={"kind": kind}, model={"norm": {"kind": "batch", "noise_bins": 4}})
    edges = unet_kwargs(config, None)["norm"]["noise_edges"]
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    timesteps = make_process(**config.diffusion.model_dump()).noise_level(uniform).timestep.double()
    shares = torch.bincount(torch.bucketize(timesteps, torch.tensor(edges), right=True), minlength=4) / 10_000
    assert len(edges) == 3
    assert (shares - 0.25).abs().max() < 0.002


def values_of(annotation: Any, metadata: tuple = ()) -> st.SearchStrategy:
    """Values that an annotation of the tree takes, of the kinds of value that YAML could confuse."""
    if hasattr(annotation, "__metadata__"):
        inner = [m for item in annotation.__metadata__ for m in getattr(item, "metadata", [item])]
        return values_of(annotation.__origin__, (*metadata, *inner))
    bounds = {k: getattr(m, k) for m in metadata for k in ("ge", "gt", "le", "lt") if hasattr(m, k)}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values_of(arguments[0]), min_size=1, max_size=3)
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    if arguments:
        return st.one_of([values_of(arm, metadata) for arm in arguments])
    if annotation is float:
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
        edges = {"exclude_min": "gt" in bounds, "exclude_max": "lt" in bounds}
        return st.floats(low, high, allow_nan=False, allow_infinity=False, **edges)
    confusing = st.sampled_from(["no", "1e-4", "null", "~", "0x1F", "1_0", "2024-01-01", "- a", "a: b", "", "<<", "="])
    return {
        bool: st.booleans(),
        int: st.integers(bounds.get("ge", -(10**12)), bounds.get("le", 10**12)),
        str: (confusing | st.text()).filter(len),
        type(None): st.none(),
        Any: st.none() | st.booleans() | st.integers() | confusing,
    }[annotation]


LEAVES = [(path, field) for path, field in walk([Config]) if not section_types(field.annotation) and path[-1] != "kind"]


@st.composite
def trees(draw: st.DrawFn) -> Config:
    """A valid tree that differs from the defaults in kinds and a few keys."""
    norm = draw(st.sampled_from(list(SECTIONS)))
    raw: dict[str, Any] = {
        "diffusion": {"kind": draw(st.sampled_from(sorted(PROCESSES)))},
        "model": {"norm": {"kind": norm}},
    }
    leaves = [leaf for leaf in LEAVES if leaf[0][:2] != ("model", "norm") or leaf[0][2] in SECTIONS[norm].model_fields]
    for path, field in draw(st.lists(st.sampled_from(leaves), max_size=4, unique_by=lambda leaf: leaf[0])):
        section = raw
        for name in path[:-1]:
            section = section.setdefault(name, {})
        section[path[-1]] = draw(values_of(field.annotation, tuple(field.metadata)))
    try:
        return load_config([Layer("drawn", raw)])
    except ConfigError as error:
        assume("given" not in str(error) and "unknown key" not in str(error))
        raise


@settings(max_examples=100, deadline=None)
@given(trees())
@example(load_config([Layer("drawn", {"run_dir": "\x85"})]))
@example(load_config([Layer("drawn", {"run_dir": "a\u2028b"})]))
def test_a_tree_survives_yaml(config: Config) -> None:
    text = to_yaml(config)
    again = from_yaml(text, "again")
    assert again == config
    assert to_yaml(again) == text
    assert differences(again, config) == []
    assert load_yaml(text, "x").keys() == yaml.safe_load(text).keys()
